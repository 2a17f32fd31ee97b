"""A worker half that no hub joins: it takes no memory but for its first slots. (A scheduler's half that is off has no way to tell it.)"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kvoffload.bridge import LoopThread
from kvoffload.config import Config
from kvoffload.ledger import Ledger
from kvoffload.messages import ConnectorOff, SegmentGrown
from kvoffload.runtime.worker import FromRank, Rank, WorkerRuntime
from kvoffload.segment import STEP_BYTES

WAIT_S = 20.0
BLOCKS, PAGE = 16, 4096
CAPACITY = 4 * STEP_BYTES


class Half:
    """A worker's runtime on a loop of its own, as `WorkerHost` has it."""

    def __init__(self) -> None:
        self.loop = LoopThread("worker", lambda error: None)
        self.loop.start()
        config = Config.load({"l1": {"capacity_bytes": CAPACITY, "reserve_bytes": 0}})
        tensors = {"layer0": np.zeros((BLOCKS, PAGE), dtype=np.uint8)}
        self.rank = Rank.prepare(config, 0, tensors, BLOCKS, lambda engine: engine)
        self.runtime = WorkerRuntime(config, self.rank, self.loop.call_soon)
        self.loop.submit(self.runtime.run)
        self.told: list[FromRank] = []
        self.ledger = Ledger(BLOCKS)

    def join(self) -> None:
        self.runtime.attach(self.ledger, self.told.append)

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline
            threading.Event().wait(0.002)

    def populates(self) -> bool:
        return any(thread.name == "kvoffload-populate" for thread in threading.enumerate())


@pytest.fixture
def half() -> Iterator[Half]:
    made = Half()
    yield made
    assert made.runtime.close(WAIT_S)
    assert made.loop.stop(WAIT_S)
    made.ledger.close()


def test_memory_is_taken_when_the_hub_is_there(half: Half) -> None:
    half.runtime.start()
    first = STEP_BYTES // half.rank.segment.slot_bytes
    assert half.rank.segment.populated_slots == first
    assert not half.populates()
    half.join()
    half.until(lambda: half.rank.segment.populated_slots == half.rank.segment.slots)
    half.until(lambda: half.told and half.told[-1] == SegmentGrown(0, half.rank.segment.slots))


def test_or_when_it_starts_where_the_hub_is_there_before(half: Half) -> None:
    half.join()
    assert not half.populates()
    half.runtime.start()
    half.until(lambda: half.rank.segment.populated_slots == half.rank.segment.slots)


def test_no_memory_is_taken_once_it_is_off(half: Half) -> None:
    half.runtime.start()
    first = half.rank.segment.populated_slots
    half.runtime.turn_off("nobody needs it", quiet=True)
    half.join()
    assert half.told[-1] == ConnectorOff("nobody needs it")
    assert not half.populates()
    assert half.rank.segment.populated_slots == first
