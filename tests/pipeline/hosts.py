"""A worker half and a hub on loop threads of their own, as inside vLLM, in one process: joined in it, or over the link."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from kvoffload import link
from kvoffload.bridge import LoopThread
from kvoffload.config import Config
from kvoffload.copy.engine import CopyEngine
from kvoffload.copy.hands import LoadJob
from kvoffload.l1.states import State
from kvoffload.l1.statistics import L1Statistics
from kvoffload.ledger import Ledger
from kvoffload.messages import (
    ROOT,
    BlockKey,
    ConnectorOff,
    LoadBlocks,
    LoadEnded,
    MatchPrefix,
    PrefixHit,
    ReserveSlots,
    SaveBlocks,
    SaveRun,
    StartLoad,
)
from kvoffload.runtime.hosts import HubHost, WorkerHost
from kvoffload.testing.copy_faults import FaultyCopyEngine

WAIT_S = 20.0
"""A bound for what takes milliseconds; only a failing test waits for it."""

BLOCKS, LAYERS, PAGE, SLOTS = 64, 3, 2048, 32
CONFIG = {"l1": {"capacity_bytes": SLOTS * 8192, "reserve_bytes": 0}}


def keys(count: int, seed: int = 0) -> tuple[BlockKey, ...]:
    return tuple(seed.to_bytes(8, "big") + number.to_bytes(16, "big") for number in range(count))


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {WAIT_S} s: {what}"
        threading.Event().wait(0.002)


@contextmanager
def blocked(*loops: LoopThread) -> Iterator[None]:
    """These loops hang."""
    go_on = threading.Event()
    try:
        for loop in loops:
            hangs = threading.Event()
            loop.call_soon(lambda hangs=hangs: (hangs.set(), go_on.wait()))  # type: ignore[misc]
            assert hangs.wait(WAIT_S)
        yield
    finally:
        go_on.set()


class Hosts:
    """Drives both halves as the hooks do. `blocks` are engine blocks, numbered from 1."""

    def __init__(self, *, over_link: bool) -> None:
        random = np.random.default_rng(7)
        self.tensors = {f"layer{i}": random.integers(0, 256, (BLOCKS, PAGE), dtype=np.uint8) for i in range(LAYERS)}
        config = Config.load(CONFIG)
        self.ledger = Ledger(BLOCKS)
        self.worker = WorkerHost.start(config, 0, self.tensors, BLOCKS, self._wrap)
        self.host = HubHost(config, self.ledger)
        if over_link:
            link.unregister_half(self.worker.address.token)
        self.host.join(self.worker.address)
        self.over_link = over_link
        self.hub = self.host.hub
        self.jobs = 0
        self.ended: list[LoadEnded] = []
        self.off: list[ConnectorOff] = []
        self.hits: dict[str, PrefixHit] = {}

    def _wrap(self, engine: CopyEngine) -> CopyEngine:
        self.copies = FaultyCopyEngine(engine)
        return self.copies

    def __enter__(self) -> Self:
        until(lambda: self.hub.is_live and self.statistics().usable == SLOTS, "joined and populated")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.copies.release()
        self.close()

    def close(self) -> None:
        self.worker.close(2.5)
        self.host.close(2.5)

    @property
    def loops(self) -> tuple[LoopThread, ...]:
        """The worker's, and the hub's if it has its own."""
        return (self.worker.loop, *((self.host._loop,) if self.host._loop is not None else ()))

    def statistics(self) -> L1Statistics:
        found = self.hub.statistics()
        assert found is not None
        return found

    def ready(self) -> int:
        return self.statistics().slots[State.READY]

    def page(self, block: int) -> NDArray[np.uint8]:
        return np.stack([tensor[block].copy() for tensor in self.tensors.values()])

    def overwrite(self, *blocks: int) -> None:
        """As a new owner would: first the ledger, then the bytes."""
        self.ledger.bump(blocks)
        for tensor in self.tensors.values():
            tensor[list(blocks)] ^= 0xFF

    # ------------------------------------------------------------ what hooks do

    def save(self, blocks: list[int], seed: int = 0) -> bool:
        """Plan and launch a save; whether the hub took it."""
        self.jobs += 1
        run = SaveRun("saver", ROOT, keys(len(blocks), seed), tuple(blocks), self.ledger.epochs(blocks))
        if not self.hub.offer(ReserveSlots(self.jobs, (run,))):
            return False
        self.worker.runtime.save(SaveBlocks(self.jobs, None))
        return True

    def flush(self) -> None:
        assert self.hub.flush().wait_sync(WAIT_S) is True

    def match(self, request: str, count: int, seed: int = 0) -> PrefixHit:
        assert self.hub.offer(MatchPrefix(request, 1, keys(count, seed), time.monotonic() + WAIT_S))
        until(lambda: self._pump() and request in self.hits, "an answer")
        return self.hits.pop(request)

    def load(self, hit: PrefixHit, blocks: list[int]) -> LoadJob | None:
        self.jobs += 1
        self.hub.owe(StartLoad(self.jobs, hit.request, 1, 0, len(blocks)))
        return self.worker.runtime.load(LoadBlocks(self.jobs, hit.request, hit.slots[: len(blocks)], tuple(blocks), None))

    def take_ended(self) -> list[LoadEnded]:
        """Loads that have ended so far, and were not taken before."""
        return list(self.worker.runtime.take())

    def wait_ended(self) -> LoadEnded:
        ended: list[LoadEnded] = []

        def has_ended() -> bool:
            ended.extend(self.take_ended())
            return bool(ended)

        until(has_ended, "a load ends")
        [one] = ended
        return one

    def wait_off(self) -> str:
        """Everybody is off; gives what SchedulerSide is told."""
        until(lambda: bool(self._pump() and self.off and self.worker.runtime.off_reason), "both halves are off")
        assert not self.hub.is_live
        assert len(self.off) == 1, self.off
        return self.off[0].reason

    def _pump(self) -> bool:
        for message in self.hub.take():
            if isinstance(message, PrefixHit):
                self.hits[message.request] = message
            elif isinstance(message, ConnectorOff):
                self.off.append(message)
        return True
