"""How a rank's slots become usable and how all of it ends, on the host's engine: what it is asked, what is reported, what is left."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import numpy as np
import pytest

import kvoffload
from kvoffload.bridge import LoopThread
from kvoffload.config import Config
from kvoffload.copy.engine import CopyEngine
from kvoffload.errors import CapacityError, CopyError, LayoutError, UnsupportedError
from kvoffload.ledger import Ledger
from kvoffload.limits import available_bytes
from kvoffload.messages import SegmentGrown
from kvoffload.runtime.hosts import WorkerHost
from kvoffload.runtime.rank import copy_settings
from kvoffload.runtime.worker import FromRank, Rank, WorkerRuntime
from kvoffload.segment import STEP_BYTES
from kvoffload.testing.copy_faults import FaultyCopyEngine

WAIT_S = 20.0
BLOCKS, PAGE = 16, 4096
STEPS = 4
SLOT = 8192
IN_A_STEP = STEP_BYTES // SLOT


class Choosy(FaultyCopyEngine):
    """Gives at most ``most`` slots, and records what it is asked for, and when it is closed."""

    def __init__(self, engine: CopyEngine) -> None:
        super().__init__(engine)
        self.asked: list[tuple[int, bool]] = []
        self.most = 1 << 30
        self.end: Callable[[], None] = lambda: None
        self.segment_at_close = -1

    def prepare_slots(self, populated: int, *, at_start: bool = False) -> int:
        self.asked.append((populated, at_start))
        return min(super().prepare_slots(populated, at_start=at_start), self.most)

    def close(self) -> None:
        self.segment_at_close = len(self.segment.array)
        self.end()
        super().close()


class Half:
    """A worker's runtime on a loop of its own, with a hub that only listens."""

    def __init__(self) -> None:
        self.loop = LoopThread("worker", lambda error: None)
        self.loop.start()
        config = Config.load({"l1": {"capacity_bytes": STEPS * STEP_BYTES, "reserve_bytes": 0}})
        self.rank = Rank.prepare(config, 0, {"layer0": np.zeros((BLOCKS, PAGE), dtype=np.uint8)}, BLOCKS, self._wrap)
        self.runtime = WorkerRuntime(config, self.rank, self.loop.call_soon)
        self.loop.submit(self.runtime.run)
        self.told: list[FromRank] = []
        self.ledger = Ledger(BLOCKS)

    def _wrap(self, engine: CopyEngine) -> CopyEngine:
        self.engine = Choosy(engine)
        return self.engine

    def join(self) -> None:
        self.runtime.attach(self.ledger, self.told.append)

    def grown(self) -> list[int]:
        return [message.slots for message in self.told if isinstance(message, SegmentGrown)]

    def end(self) -> None:
        self.runtime.close(WAIT_S)
        assert self.loop.stop(WAIT_S)
        self.ledger.close()


@pytest.fixture
def half() -> Iterator[Half]:
    made = Half()
    yield made
    made.end()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.002)


def test_slots_are_usable_step_by_step_without_any_leave(half: Half) -> None:
    half.runtime.start()
    assert half.engine.asked == [(IN_A_STEP, True)]
    half.join()
    until(lambda: half.grown()[-1:] == [half.rank.segment.slots])
    assert half.engine.asked == [(IN_A_STEP, True), *((step * IN_A_STEP, False) for step in range(2, STEPS + 1))]


def test_only_what_the_engine_calls_usable_is_reported(half: Half) -> None:
    half.engine.most = IN_A_STEP + 5
    half.runtime.start()
    half.join()
    until(lambda: half.rank.segment.populated_slots == half.rank.segment.slots)
    until(lambda: half.engine.asked.count((half.rank.segment.slots, False)) == 1)
    until(lambda: half.grown()[-1:] == [IN_A_STEP + 5])
    half.engine.most = half.rank.segment.slots
    assert half.grown()[-1] == IN_A_STEP + 5
    half.runtime.mark()
    until(lambda: half.grown()[-1] == half.rank.segment.slots)
    assert half.engine.asked.count((half.rank.segment.slots, False)) == 2, "the next step's mark is the next chance, and no sooner"


def test_the_log_says_which_engine_and_why(half: Half, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kvoffload")
    half.runtime.start()
    [line] = [record.getMessage() for record in caplog.records if "ready to copy" in record.getMessage()]
    assert "host" in line
    assert "KV is in ordinary memory" in line


# ------------------------------------------------------------ ends


def test_the_engine_ends_before_its_memory(half: Half) -> None:
    half.runtime.start()
    assert half.runtime.close(WAIT_S)
    assert half.engine.segment_at_close == half.rank.segment.num_bytes
    assert len(half.rank.segment.array) == 0


def test_an_engine_that_does_not_end_keeps_its_memory(half: Half, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise CopyError("the device is gone")

    half.engine.end = fail
    half.runtime.start()
    half.runtime.close(WAIT_S)
    assert len(half.rank.segment.array) == half.rank.segment.num_bytes
    assert "does not end" in caplog.text


def test_the_end_does_not_wait_for_a_driver_that_takes_long(half: Half) -> None:
    go_on = threading.Event()

    def end() -> None:
        go_on.wait(WAIT_S)

    half.engine.end = end
    half.runtime.start()
    begun = time.monotonic()
    assert not half.runtime.close(0.3)
    assert time.monotonic() - begun < 5
    assert len(half.rank.segment.array) == half.rank.segment.num_bytes
    go_on.set()
    until(lambda: len(half.rank.segment.array) == 0)


def test_a_copy_that_still_runs_leaves_all_in_place(half: Half) -> None:
    from kvoffload.messages import LoadBlocks

    half.runtime.start()
    half.engine.hold_loads()
    half.runtime.load(LoadBlocks(1, "r", (0,), (1,), half.runtime.mark()))
    assert half.engine.wait_held("load")
    assert not half.runtime.close(0.2)
    assert half.engine.segment_at_close == -1
    assert len(half.rank.segment.array) == half.rank.segment.num_bytes
    half.engine.release()


# ------------------------------------------------------------ what cannot be made


def left() -> tuple[set[str], int]:
    """Open files, and segments mapped."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text()
    return set(os.listdir("/proc/self/fd")), maps.count("kvoffload-segment")


def tensors() -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
    return {"layer0": np.zeros((BLOCKS, PAGE), dtype=np.uint8)}


SMALL = Config.load({"l1": {"capacity_bytes": 8 * SLOT, "reserve_bytes": 0}})


class OnGpu:
    """A tensor in a GPU that this machine does not have."""

    shape, dtype, device = (BLOCKS, PAGE), "torch.uint8", "cuda:99"

    def stride(self) -> tuple[int, int]:
        return (PAGE, 1)

    def element_size(self) -> int:
        return 1

    def data_ptr(self) -> int:
        return 1 << 40


def test_a_gpu_that_cannot_be_reached_leaves_nothing() -> None:
    before = left()
    with pytest.raises(UnsupportedError, match="no CUDA: "):
        Rank.prepare(SMALL, 0, {"layer0": OnGpu()}, BLOCKS, lambda engine: engine)
    assert left() == before


def test_a_layout_that_is_not_proven_leaves_nothing() -> None:
    before = left()
    few = {"layer0": np.zeros((3, PAGE), dtype=np.uint8)}
    with pytest.raises(LayoutError, match="too few to prove"):
        Rank.prepare(SMALL, 0, few, 3, lambda engine: engine)
    assert left() == before


def test_an_engine_that_cannot_be_wrapped_leaves_nothing() -> None:
    engines: list[CopyEngine] = []

    def wrap(engine: CopyEngine) -> CopyEngine:
        engines.append(engine)
        raise CopyError("no")

    before = left()
    with pytest.raises(CopyError):
        Rank.prepare(SMALL, 0, tensors(), BLOCKS, wrap)
    with pytest.raises(CopyError, match="closed"):
        engines.pop().load(np.zeros(1, np.int64), np.zeros(1, np.int64), None)
    assert left() == before


def test_a_runtime_that_cannot_be_made_leaves_neither_rank_nor_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def preparation(rank: Rank, config: Config) -> None:
        raise CapacityError("no")

    before, threads = left(), set(threading.enumerate())
    monkeypatch.setattr(Rank, "preparation", preparation)
    with pytest.raises(CapacityError):
        WorkerHost.start(SMALL, 0, tensors(), BLOCKS, lambda engine: engine)
    assert set(threading.enumerate()) == threads
    assert left() == before


def test_too_much_is_refused_before_anything_is_made() -> None:
    before = left()
    too_much = Config.load({"l1": {"capacity_bytes": available_bytes().bytes + (1 << 30)}})
    with pytest.raises(CapacityError, match="does not fit"):
        Rank.prepare(too_much, 0, tensors(), BLOCKS, lambda engine: engine)
    assert left() == before


def test_the_engine_gets_the_settings_of_the_gpu() -> None:
    config = Config.load(
        {"gpu": {"copy": "single", "pin": False, "pin_piece_bytes": 1 << 21, "kernel_blocks": 3, "inflight_bytes": 1 << 20}}
    )
    settings = copy_settings(config.gpu)
    assert (settings.copy.value, settings.pin, settings.pin_piece_bytes) == ("single", False, 1 << 21)
    assert (settings.kernel_blocks, settings.inflight_bytes) == (3, 1 << 20)
    assert copy_settings(Config().gpu) == type(settings)()
    assert not hasattr(settings, "pin_at_start_s"), "the runtime keeps it: two that say it may say two things"


@pytest.mark.parametrize("where", ["preparation", "start"])
@pytest.mark.asyncio
async def test_a_program_whose_tensors_cannot_be_served_keeps_nothing_of_them(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise CapacityError("no")

    async with kvoffload.open_runtime(SMALL):
        pass  # threads and files that the first one leaves to its process
    before = left()
    async with kvoffload.open_runtime(SMALL) as runtime:
        monkeypatch.setattr(Rank if where == "preparation" else WorkerRuntime, where, fail)
        with pytest.raises(CapacityError, match="no"):
            await runtime.register(tensors(), block_size=4)
        await anyio.to_thread.run_sync(gc.collect)  # that thread held the error, and with it all that its frames saw
        assert left()[1] == before[1]
        assert not [thread for thread in threading.enumerate() if thread.name == "kvoffload-standalone"]
        monkeypatch.undo()
        await runtime.register(tensors(), block_size=4)
        assert (await runtime.save(range(8), [1, 2])).stored_tokens == 8
    assert left()[1] == before[1]
