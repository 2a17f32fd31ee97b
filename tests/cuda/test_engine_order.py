"""What is copied is what the engine's stream has written by then: seen in the bytes, with the engine's stream or ours held."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from tests.copy.rigs import ids
from tests.cuda.rigs import CudaRig, Running
from tests.cuda.standin import BatchOrder, Standin

from kvoffload.cuda.settings import CopyMode, GpuCopySettings
from kvoffload.errors import CopyError

pytestmark = pytest.mark.cuda

WAYS = [
    GpuCopySettings(copy=CopyMode.DMA),
    GpuCopySettings(copy=CopyMode.KERNEL),
    GpuCopySettings(copy=CopyMode.SINGLE),
    GpuCopySettings(pin=False),
]
NAMES = ["dma", "kernel", "single", "unpinned"]


@pytest.fixture(params=WAYS, ids=NAMES)
def rig(request: pytest.FixtureRequest, standin: Standin) -> Iterator[CudaRig]:
    made = CudaRig.plain(standin, request.param)
    yield made
    made.close()


@pytest.fixture
def dma(standin: Standin) -> Iterator[CudaRig]:
    made = CudaRig.plain(standin, WAYS[0])
    yield made
    made.close()


def filled(rig: CudaRig, byte: int) -> bytes:
    return bytes([byte]) * rig.layout.payload_bytes


def starting(rig: CudaRig, what: str, call: Callable[[], object]) -> Running:
    """The call in a thread, once it has told the driver to wait for the mark, and behind that to copy; our stream runs up to there."""
    lane = rig.lane(what)
    rig.standin.hold(lane)
    running = Running(call)
    rig.standin.wait_pending(lane, 2)
    assert rig.standin.stream(lane).kinds[0] == "wait"
    rig.standin.release(lane)
    assert running.is_running
    return running


# ---------------------------------------------------------------- behind the mark


def test_a_save_reads_what_was_still_to_be_written_when_it_was_marked(rig: CudaRig, standin: Standin) -> None:
    standin.hold(rig.stream)
    rig.write_block(3, 0xC3)
    mark = rig.engine.mark()
    saving = starting(rig, "save", lambda: rig.engine.save(ids(3), ids(5), ids(0), mark))
    assert rig.block(3) != filled(rig, 0xC3)
    standin.release(rig.stream)
    assert saving.result().tolist() == [True]
    assert rig.slot(5) == filled(rig, 0xC3)
    assert standin.violations() == []


def test_a_save_does_not_wait_for_what_comes_behind_its_mark(rig: CudaRig, standin: Standin) -> None:
    before = rig.block(3)
    mark = rig.engine.mark()
    standin.wait_idle(rig.stream)
    standin.hold(rig.stream)
    rig.write_block(2, 0xC3)
    assert rig.engine.save(ids(3), ids(5), ids(0), mark).tolist() == [True]
    assert rig.slot(5) == before
    standin.release(rig.stream)


def test_a_load_comes_after_the_zeroing_of_its_destination(rig: CudaRig, standin: Standin) -> None:
    before = rig.block(3)
    rig.engine.save(ids(3), ids(5), ids(0), rig.engine.mark())
    standin.hold(rig.stream)
    rig.write_block(6, 0)
    mark = rig.engine.mark()
    loading = starting(rig, "load", lambda: rig.engine.load(ids(5), ids(6), mark))
    standin.release(rig.stream)
    loading.result()
    standin.wait_idle()
    assert rig.block(6) == before
    assert standin.violations() == []


def test_each_copy_waits_for_its_own_mark(dma: CudaRig, standin: Standin) -> None:
    """The first mark has happened, the second is held: one save ends, the other does not."""
    first = dma.engine.mark()
    standin.wait_idle(dma.stream)
    standin.hold(dma.stream)
    dma.write_block(3, 0xC3)
    second = dma.engine.mark()
    dma.engine.save(ids(1), ids(1), ids(0), first)
    waiting = starting(dma, "save", lambda: dma.engine.save(ids(3), ids(5), ids(0), second))
    standin.release(dma.stream)
    waiting.result()
    assert dma.slot(5) == filled(dma, 0xC3)


def test_one_mark_serves_several_copies_in_both_directions(rig: CudaRig, standin: Standin) -> None:
    rig.engine.save(ids(1), ids(1), ids(0), rig.engine.mark())
    standin.hold(rig.stream)
    rig.write_block(3, 0xC3)
    rig.write_block(4, 0)
    mark = rig.engine.mark()
    saving = starting(rig, "save", lambda: [rig.engine.save(ids(3), ids(slot), ids(0), mark) for slot in (5, 6)])
    loading = starting(rig, "load", lambda: rig.engine.load(ids(1), ids(4), mark))
    standin.release(rig.stream)
    saving.result()
    loading.result()
    assert rig.slot(5) == rig.slot(6) == filled(rig, 0xC3)
    assert rig.block(4) == rig.slot(1)


def test_an_event_is_used_again_only_when_nobody_holds_its_mark(dma: CudaRig, standin: Standin) -> None:
    marks = [dma.engine.mark() for _ in range(40)]
    recorded = [call.arguments["event"] for call in standin.calls("cuEventRecord")]
    assert len(set(recorded)) == len(recorded) == 40
    del marks
    created = len(standin.calls("cuEventCreate"))
    for _ in range(100):
        dma.engine.mark()
    assert len(standin.calls("cuEventCreate")) == created


@pytest.mark.parametrize("after", [None, object(), 7])
def test_a_copy_without_a_mark_is_refused(dma: CudaRig, after: object) -> None:
    with pytest.raises(CopyError, match="comes after a mark of this engine"):
        dma.engine.save(ids(1), ids(1), ids(0), after)
    with pytest.raises(CopyError, match="comes after a mark of this engine"):
        dma.engine.load(ids(1), ids(1), after)


def test_a_mark_of_another_engine_is_refused(dma: CudaRig, standin: Standin) -> None:
    other = CudaRig.plain(standin, WAYS[0])
    with pytest.raises(CopyError, match="not after another's"):
        dma.engine.save(ids(1), ids(1), ids(0), other.engine.mark())
    other.close()


# ---------------------------------------------------------------- the ledger


def test_a_block_that_is_handed_over_while_it_is_read_is_seen(dma: CudaRig, standin: Standin) -> None:
    """Half of the batch has been read when the block gets a new owner, who writes: a torn copy, and its flag says so."""
    standin.configure(batch_order=BatchOrder.GIVEN)
    lane = dma.lane("save")
    standin.pause_inside(lane, 4)
    saving = Running(lambda: dma.engine.save(ids(3, 4), ids(5, 6), ids(0, 0), dma.engine.mark()))
    standin.wait_paused(lane)
    standin.wait_blocked("cuEventSynchronize", timeout_s=5.0)
    dma.ledger.bump([4])
    for cache in dma.caches.values():
        cache[4] = 0xEE
    standin.release(lane)
    assert saving.result().tolist() == [True, False]
    piece = dma.layout.payload_bytes // 3
    assert dma.slot(6)[piece:] == dma.block(4)[piece:]
    assert dma.slot(6)[:piece] != dma.block(4)[:piece]


def test_a_block_that_is_handed_over_between_its_last_byte_and_the_check_is_seen(rig: CudaRig, standin: Standin) -> None:
    """All bytes are there, and the event that says so is still to come."""
    lane = rig.lane("save")
    before = rig.block(3)
    standin.hold(lane)
    saving = Running(lambda: rig.engine.save(ids(3, 4), ids(5, 6), ids(0, 0), rig.engine.mark()))
    standin.wait_pending(lane)
    if rig.cuda.gpu.pinned.is_pinned(ids(0)).all():
        standin.wait_blocked("cuEventSynchronize")
        state = standin.stream(lane)
        standin.step(lane, state.pending - 1)
        standin.wait_executed(lane, state.executed + state.pending - 1)
        assert standin.stream(lane).kinds == ("record",)
        assert rig.slot(5) == before
    rig.ledger.bump([3])
    standin.release(lane)
    assert saving.result().tolist() == [False, True]


def test_a_bump_after_the_check_does_not_matter(dma: CudaRig) -> None:
    flags = dma.engine.save(ids(3), ids(5), ids(0), dma.engine.mark())
    dma.ledger.bump([3])
    assert flags.tolist() == [True]


# ---------------------------------------------------------------- two directions


@pytest.mark.parametrize("first", ["save", "load"])
def test_neither_direction_waits_for_the_other(rig: CudaRig, standin: Standin, first: str) -> None:
    rig.engine.save(ids(1), ids(1), ids(0), rig.engine.mark())
    before = rig.block(1)
    calls = {
        "save": lambda: rig.engine.save(ids(3), ids(5), ids(0), rig.engine.mark()),
        "load": lambda: rig.engine.load(ids(1), ids(6), rig.engine.mark()),
    }
    second = "load" if first == "save" else "save"
    for what in calls:
        standin.hold(rig.lane(what))
    running = {what: Running(call) for what, call in calls.items()}
    for what in calls:
        standin.wait_pending(rig.lane(what))
    standin.release(rig.lane(first))
    running[first].result()
    assert running[second].is_running
    standin.release(rig.lane(second))
    running[second].result()
    assert rig.slot(5) == rig.block(3)
    assert rig.block(6) == before


def test_streams_that_dawdle_each_in_its_own_way(standin: Standin) -> None:
    """Random delays between all operations of all streams, saves and loads at once, the engine writing in between."""
    standin.configure(jitter_us=300, seed=11)
    rig = CudaRig.plain(standin, GpuCopySettings(descriptors_per_call=4), blocks=16, slots=16)
    rounds = 12

    def saves() -> None:
        for number in range(rounds):
            rig.write_block(number % 4, number + 1)
            rig.engine.save(ids(number % 4), ids(number % 8), ids(0), rig.engine.mark())
            assert rig.slot(number % 8) == filled(rig, number + 1)

    def loads() -> None:
        rig.segment.slot(12)[64 : 64 + rig.layout.payload_bytes] = 0x77
        for number in range(rounds):
            block = 8 + number % 4
            rig.write_block(block, 0)
            rig.engine.load(ids(12, 12), ids(block, block + 4), rig.engine.mark())
            assert rig.block(block) == filled(rig, 0x77)

    both = Running(saves), Running(loads)
    for running in both:
        running.result()
    rig.close()


def test_every_call_binds_the_context_in_its_own_thread(dma: CudaRig, standin: Standin) -> None:
    marks = [dma.engine.mark() for _ in range(2)]
    Running(lambda: dma.engine.save(ids(1), ids(1), ids(0), marks[0])).result()
    Running(lambda: dma.engine.load(ids(1), ids(1), marks[1])).result()
    assert Running(dma.engine.mark).result().event is not None
    threads = {call.thread for call in standin.calls("cuCtxSetCurrent")}
    assert len(threads) == 3
    pushed, popped = ([call.thread for call in standin.calls(name)] for name in ("cuCtxPushCurrent", "cuCtxPopCurrent"))
    assert pushed == popped
    assert len(set(pushed) - threads) == 1, "a mark leaves its thread as it was"
    assert np.unique([call.code for call in standin.calls("cuCtxSetCurrent")]).tolist() == [0]
