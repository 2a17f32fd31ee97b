"""How fast the CUDA engine moves blocks: each way, both at once, and one load of so many pieces of some size."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from kvoffload.bench.copy import _rotation as rotation
from kvoffload.bench.gpu_clock import Clock
from kvoffload.copy.cuda import CudaCopyEngine
from kvoffload.doctor.gpu_memory import Rig


@dataclass(frozen=True, slots=True)
class Rates:
    """GB/s of whole calls, the median; ``both`` is the sum of both ways."""

    load: float
    save: float
    both: float


class Calls:
    """Calls of ``count`` blocks each, all blocks and slots of a rig in turn and in random order. Nothing checks the bytes here."""

    def __init__(self, rig: Rig, engine: CudaCopyEngine, count: int) -> None:
        self._engine, self._epochs = engine, np.zeros(count, np.int64)
        self.num_bytes = count * rig.layout.payload_bytes
        random = np.random.default_rng(count)
        blocks, slots = rig.layout.num_blocks, rig.segment.slots
        # Halves: a load and a save at once must not meet in a block or a slot.
        self._load_blocks, self._load_slots = rotation(random, blocks // 2, count), rotation(random, slots // 2, count)
        self._save_blocks, self._save_slots = rotation(random, blocks // 2, count), rotation(random, slots // 2, count)
        self._other_blocks, self._other_slots = blocks // 2, slots // 2

    def load(self) -> None:
        self._engine.load(self._load_slots(), self._load_blocks(), self._engine.mark())

    def save(self) -> None:
        blocks, slots = self._save_blocks() + self._other_blocks, self._save_slots() + self._other_slots
        self._engine.save(blocks, slots, self._epochs, self._engine.mark())


def measure_rates(rig: Rig, engine: CudaCopyEngine, count: int, calls: int) -> Rates:
    """``count`` blocks a call. Raises CudaError and what a copy raises."""
    ways = Calls(rig, engine, count)
    with closing(Clock(rig.driver, rig.stream)) as clock:
        load = median_s(clock, ways.load, calls)
        save = median_s(clock, ways.save, calls)
        together = clock.seconds(lambda: _at_once(ways.load, ways.save, calls))
    return Rates(ways.num_bytes / load / 1e9, ways.num_bytes / save / 1e9, 2 * calls * ways.num_bytes / together / 1e9)


def median_s(clock: Clock, call: Callable[[], None], calls: int) -> float:
    """Of ``calls`` calls, after one that warms up: submission and completion are in it, as in the engine's life."""
    call()
    return statistics.median(clock.seconds(call) for _ in range(calls))


class Repeated:
    """Calls ``work`` in a thread, ``times`` times or until `stop`."""

    def __init__(self, work: Callable[[], None], times: int | None = None) -> None:
        self._work, self._times = work, times
        self._ended, self._has_run = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="kvoffload-bench", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        done = 0
        try:
            while done != self._times and not self._ended.is_set():
                self._work()
                done += 1
                self._has_run.set()
        except BaseException as error:  # raised again where it is waited for
            self._error = error
        finally:
            self._has_run.set()

    def wait_first(self) -> None:
        """Until one call has been made, so that what starts up once has."""
        self._has_run.wait()

    def join(self) -> None:
        """Until all calls have been made. Raises what one raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Until the call that is being made has ended. Raises what one raised."""
        self._ended.set()
        self.join()


def _at_once(first: Callable[[], None], second: Callable[[], None], times: int) -> None:
    threads = [Repeated(first, times), Repeated(second, times)]
    for thread in threads:
        thread.join()
