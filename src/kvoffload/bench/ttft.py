"""First tokens of long prompts that L1 has, against computing them and against vLLM's ExampleConnector: ``kvoffload bench ttft``."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from kvoffload.bench.engine_process import EngineOptions, EngineProcess
from kvoffload.bench.figures import Figure
from kvoffload.bench.measuring import unique_prompts
from kvoffload.bench.stolen import MachineTime, machine_time, stolen_share
from kvoffload.errors import PeerError
from kvoffload.testing.model import BENCH, TINY, ModelShape, make_model

SPEED_UP_TARGET = 15.0
WORST_TARGET = 2.0
SHARE_TARGET_MS = 4.0

LENGTHS = (3116, 3372, 3628, 3884)
"""Tokens, each 44 beyond a multiple of the CPU backend's 128-token blocks: the same rest is left to compute, and ExampleConnector,
which never hits where that rest is 1, hits too."""
QUICK_LENGTHS = (556, 684)

SPIN_S = 1.2
"""vLLM's processes poll shared memory without a pause for 1 s after the last message (0.32, `SpinCondition`). Those of the engine that
was measured before would take the cores from the one that is: first tokens that wait for up to a second, with either connector."""


@dataclass(slots=True)
class Hit:
    """One first token from the connector. ``around``: the machine's time before and after."""

    seconds: float
    around: tuple[MachineTime | None, MachineTime | None]
    share_s: float | None = None


@dataclass(slots=True)
class Times:
    """Seconds to first token. ``shares``: kvoffload's own part of each hit, where it is measured; ``memcpy_s``: a plain copy of as much."""

    computed: list[float] = field(default_factory=list)
    loaded: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    memcpy_s: float = 0.0
    around: list[tuple[MachineTime | None, MachineTime | None]] = field(default_factory=list)
    """The machine's time before and after each of ``loaded``."""

    def add(self, hit: Hit) -> None:
        self.loaded.append(hit.seconds)
        self.around.append(hit.around)
        if hit.share_s is not None:
            self.shares.append(hit.share_s)


def run(quick: bool = False) -> list[Figure]:
    """In one process and in several, both connectors in turn."""
    shape, lengths, hits = (TINY, QUICK_LENGTHS, 4) if quick else (BENCH, LENGTHS, 50)
    figures = []
    for multiprocessing in (False, True):
        with _storage() as storage, tempfile.TemporaryDirectory(prefix="kvoffload-bench-") as directory:
            ours, theirs = measure(shape, directory, storage, lengths, hits, multiprocessing=multiprocessing)
        figures += _figures("several processes" if multiprocessing else "one process", ours, theirs)
    return figures


@contextmanager
def _storage() -> Iterator[str]:
    """A directory in memory for ExampleConnector's files, where there is one: its disk is not what is compared."""
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(prefix="kvoffload-bench-", dir=memory if os.access(memory, os.W_OK) else None) as directory:
        yield directory


def measure(
    shape: ModelShape, directory: str, storage: str, lengths: Sequence[int], hits: int, *, multiprocessing: bool
) -> tuple[Times, Times]:
    """kvoffload's times and ExampleConnector's: every prompt computed once by each, then ``hits`` of each, in rounds, A B A B."""
    model = str(make_model(directory, shape))
    common: dict[str, Any] = {"multiprocessing": multiprocessing, "dtype": shape.dtype}
    ours_options = EngineOptions(model, "kvoffload", l1_bytes=512 << 20, **common)
    with EngineProcess(ours_options) as ours, EngineProcess(EngineOptions(model, "example", storage=storage, **common)) as theirs:
        engines = {"kvoffload": ours, "example": theirs}
        prompts = unique_prompts(len(lengths), lengths, seed=7)
        times = {name: Times() for name in engines}
        for engine in engines.values():
            engine.wait_ready()
            engine.call("generate", prompts=unique_prompts(1, [lengths[0]], seed=8))
        if not multiprocessing:
            ours.call("wait_populated")
            ours.call("time_hooks")
        for prompt in prompts:
            for name, engine in engines.items():
                times[name].computed.append(_first_token(engine, prompt, expected=0))
        for engine in engines.values():
            engine.call("flush")
        times["kvoffload"].memcpy_s = ours.call("memcpy_s", size=shape.kv_bytes_per_token * sorted(lengths)[len(lengths) // 2])
        # One round through the prompts by each engine in turn. The first hit of each warms the files' page cache, and ours alike.
        for number in range(0, hits + len(prompts), len(prompts)):
            for name, engine in engines.items():
                if multiprocessing:
                    time.sleep(SPIN_S)
                for prompt in prompts[: hits + len(prompts) - number]:
                    hit = _hit(engine, prompt, shares=name == "kvoffload" and not multiprocessing)
                    if number:
                        times[name].add(hit)
    return times["kvoffload"], times["example"]


def _hit(engine: EngineProcess, prompt: list[int], *, shares: bool) -> Hit:
    """``shares``: find out what of it was ours."""
    if shares:
        engine.call("hook_times")
    before = machine_time()
    seconds = _first_token(engine, prompt, expected=(len(prompt) - 1) // 128 * 128)
    hit = Hit(seconds, (before, machine_time()))
    if shares:
        taken = engine.call("hook_times")
        hit.share_s = (taken["hooks_us"] + taken["pending_load_us"]) / 1e6
    return hit


def _first_token(engine: EngineProcess, prompt: list[int], expected: int) -> float:
    """Seconds, with vLLM's own prefix cache empty; ``expected`` tokens must come from the connector."""
    if not engine.call("reset"):
        raise PeerError("vLLM did not reset its prefix cache")
    result = engine.call("generate", prompts=[prompt])
    cached = result["answers"][0]["cached"]
    if cached != expected:
        raise PeerError(
            f"{engine.options.connector}: {cached} of {len(prompt)} tokens came from a cache, not {expected}\n{engine.log_tail()}"
        )
    seconds: float = result["seconds"]
    return seconds


def _figures(mode: str, ours: Times, theirs: Times) -> list[Figure]:
    computed, loaded, example = (statistics.median(values) for values in (ours.computed, ours.loaded, theirs.loaded))
    speed_up, against, worst = computed / loaded, example / loaded, max(ours.loaded) / loaded
    figures = [
        Figure(
            f"ttft, {mode}: computed / loaded",
            speed_up,
            "x",
            f">= {SPEED_UP_TARGET:.0f}",
            speed_up >= SPEED_UP_TARGET,
            f"{computed * 1e3:.0f} ms / {loaded * 1e3:.1f} ms, medians of {len(ours.computed)} and {len(ours.loaded)}",
        ),
        Figure(
            f"ttft, {mode}: ExampleConnector / kvoffload",
            against,
            "x",
            "> 1",
            against > 1,
            f"ExampleConnector {example * 1e3:.1f} ms, median of {len(theirs.loaded)}, in rounds, in turn with ours",
        ),
        Figure(
            f"ttft, {mode}: worst / median",
            worst,
            "x",
            f"<= {WORST_TARGET:.0f}",
            worst <= WORST_TARGET,
            f"{_worst_words(ours)}; ExampleConnector in the same run {max(theirs.loaded) / example:.2f}: {_worst_words(theirs)}"
            f"{_stolen_words(ours)}",
        ),
    ]
    if ours.shares:
        share = statistics.median(ours.shares) * 1e3
        detail = (
            f"in hooks and until the copy is reported; worst {max(ours.shares) * 1e3:.1f} ms; "
            f"a plain memcpy of as much takes {ours.memcpy_s * 1e3:.1f} ms here"
        )
        name, target = f"ttft, {mode}: our share", f"<= {SHARE_TARGET_MS:.0f}"
        figures.append(Figure(name, share, "ms", target, share <= SHARE_TARGET_MS, detail))
    return figures


def _worst_words(times: Times) -> str:
    """The worst first token, and how much of what the machine was to do meanwhile had to wait for its hypervisor."""
    worst, (before, after) = max(zip(times.loaded, times.around, strict=True), key=lambda pair: pair[0])
    stolen = stolen_share(before, after)
    return f"worst of {len(times.loaded)} {worst * 1e3:.1f} ms" + ("" if stolen is None else f" ({100 * stolen:.0f} % stolen)")


def _stolen_words(times: Times) -> str:
    """Outliers that the machine makes are not ours: the reader may judge by this."""
    stolen = stolen_share(times.around[0][0], times.around[-1][1])
    return "" if stolen is None else f"; of the CPU time asked for in the run the hypervisor stole {100 * stolen:.1f} %"
