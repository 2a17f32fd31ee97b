"""GpuCopy and its hands, unchanged, on CUDA: what is reported, when, and how often."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import anyio
import pytest
from tests.copy.rigs import WAIT_S
from tests.cuda.rigs import CudaRig
from tests.cuda.standin import BatchOrder, Code, Standin

from kvoffload.actors.gpu_copy import FromGpuCopy, GpuCopy, GpuCopyConfig
from kvoffload.copy.hands import CopyFact, CopyHands, HandsConfig, HandsCrashed
from kvoffload.cuda.settings import CopyMode, GpuCopySettings
from kvoffload.errors import EngineLost, InternalError
from kvoffload.mailbox import OnFull, Receiver, Reply, Sender, ThreadSender, current_call_soon, open_mailbox
from kvoffload.messages import (
    BlocksFilled,
    Drain,
    DropReason,
    LoadBlocks,
    LoadEnded,
    LoadFinished,
    LoadOutcome,
    SaveBlocks,
    SlotGrant,
    ToGpuCopy,
)

pytestmark = pytest.mark.cuda

RANK = 3


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@dataclass
class Bench:
    """Hands alone, on CUDA."""

    rig: CudaRig
    ended: list[LoadEnded] = field(default_factory=list)
    facts: list[CopyFact] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.hands = CopyHands(self.rig.engine, self.ended.append, self.facts.append, HandsConfig(rank=RANK))
        self.hands.start()

    def save(self, job: int, *slots: int) -> None:
        """Blocks of the numbers of the slots."""
        assert self.hands.saved(SaveBlocks(job, self.rig.engine.mark()))
        self.hands.granted(SlotGrant(job, slots, slots, self.rig.ledger.epochs(slots)))

    def load(self, job: int, slots: tuple[int, ...], blocks: tuple[int, ...]) -> None:
        self.hands.load(LoadBlocks(job, f"request {job}", slots, blocks, self.rig.engine.mark()))

    def idle(self) -> None:
        assert self.hands.wait_idle(WAIT_S)

    def filled(self) -> list[BlocksFilled]:
        return [fact for fact in self.facts if isinstance(fact, BlocksFilled)]

    def close(self) -> None:
        for state in self.rig.standin.streams():
            self.rig.standin.release(state.handle)
        assert self.hands.close(WAIT_S)
        self.rig.close()


@pytest.fixture
def bench(standin: Standin) -> Iterator[Bench]:
    made = Bench(CudaRig.plain(standin, GpuCopySettings(copy=CopyMode.DMA), blocks=16, slots=16))
    yield made
    made.close()


# ---------------------------------------------------------------- hands


def test_loads_and_saves_are_reported_once(bench: Bench) -> None:
    before = [bench.rig.block(number) for number in range(16)]
    bench.save(1, 4, 5)
    bench.idle()
    bench.load(2, (4, 5), (9, 8))
    bench.idle()
    assert bench.filled() == [BlocksFilled(1, RANK, (4, 5), ())]
    assert bench.ended == [LoadEnded(2, "request 2", LoadOutcome.LOADED, (9, 8))]
    assert [bench.rig.block(9), bench.rig.block(8)] == [before[4], before[5]]


def test_a_load_that_never_completes_is_not_reported(bench: Bench, standin: Standin) -> None:
    bench.save(1, 4)
    bench.idle()
    lane = bench.rig.lane("load")
    standin.hold(lane)
    bench.load(2, (4,), (9,))
    bench.load(3, (4,), (10,))
    standin.wait_blocked("cuEventSynchronize")
    assert not bench.hands.wait_idle(0.05)
    assert bench.ended == []
    assert bench.hands.live_loads() == [2, 3]
    bench.save(4, 5)  # the other direction goes on, once the loads have had their time
    while not bench.hands.wait_idle(0.01) and len(bench.filled()) < 2:
        pass
    assert bench.filled()[-1] == BlocksFilled(4, RANK, (5,), ())
    assert not bench.hands.close(0.05)  # bounded, and says that the engine must be kept
    assert bench.ended == [LoadEnded(3, "request 3", LoadOutcome.WITHDRAWN, (10,))]
    standin.release(lane)
    assert bench.hands.close(WAIT_S)
    assert bench.ended[1:] == [LoadEnded(2, "request 2", LoadOutcome.LOADED, (9,))]
    assert bench.rig.block(9) == bench.rig.slot(4)


def test_a_save_that_never_completes_keeps_its_slots(bench: Bench, standin: Standin) -> None:
    lane = bench.rig.lane("save")
    standin.hold(lane)
    bench.save(1, 4, 5)
    standin.wait_blocked("cuEventSynchronize")
    bench.hands.stop_saving()
    assert not bench.hands.wait_idle(0.05)
    assert bench.filled() == []
    standin.release(lane)
    bench.idle()
    assert bench.filled() == [BlocksFilled(1, RANK, (4, 5), ())]


@pytest.mark.parametrize(
    "function", ["cuStreamWaitEvent", "cuMemcpyBatchAsync", "cuEventRecord", "cuEventSynchronize", "cuThreadExchangeStreamCaptureMode"]
)
def test_a_copy_that_fails_is_reported_once_and_the_next_one_is_done(bench: Bench, standin: Standin, function: str) -> None:
    mark = bench.rig.engine.mark()
    standin.fail(function, Code.UNKNOWN)
    bench.hands.load(LoadBlocks(1, "request 1", (4,), (9,), mark))
    bench.idle()
    standin.fail(function, Code.UNKNOWN)
    assert bench.hands.saved(SaveBlocks(2, mark))
    bench.hands.granted(SlotGrant(2, (4, 5), (4, 5), (0, 0)))
    bench.idle()
    bench.save(3, 4)
    bench.idle()
    bench.load(4, (4,), (9,))
    bench.idle()
    assert [(ended.job, ended.outcome) for ended in bench.ended] == [(1, LoadOutcome.FAILED), (4, LoadOutcome.LOADED)]
    assert bench.filled() == [BlocksFilled(2, RANK, (), (4, 5), DropReason.COPY_FAILED), BlocksFilled(3, RANK, (4,), ())]
    assert bench.hands.crashed is None


@pytest.mark.parametrize("what", ["save", "load"])
def test_a_broken_context_ends_copying_and_frees_no_slot(standin: Standin, what: str) -> None:
    """It does not say whether the copy has ended, so the slots of a save may be written yet."""
    bench = Bench(CudaRig.plain(standin, GpuCopySettings(copy=CopyMode.DMA), blocks=16, slots=16))
    standin.fail_operation(Code.ILLEGAL_ADDRESS, kind="batch")
    if what == "save":
        bench.save(1, 4, 5)
    else:
        bench.load(1, (4,), (9,))
    for thread in bench.hands._threads[what == "save" :][:1]:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert isinstance(bench.hands.crashed, EngineLost)
    assert [fact.error for fact in bench.facts if isinstance(fact, HandsCrashed)] == [bench.hands.crashed]
    bench.hands.load(LoadBlocks(2, "request 2", (4,), (9,), None))
    assert not bench.hands.saved(SaveBlocks(3, None))
    assert bench.filled() == []
    assert [(ended.job, ended.outcome.name) for ended in bench.ended] == [(1, "FAILED")] * (what == "load") + [(2, "WITHDRAWN")]
    assert not bench.hands.close(WAIT_S)
    bench.rig.close()
    standin.reset()


def test_a_block_with_a_new_owner_is_never_reported_as_filled(bench: Bench, standin: Standin) -> None:
    """Its bytes are torn: half from the old owner, half from the new one."""
    standin.configure(batch_order=BatchOrder.GIVEN)
    lane = bench.rig.lane("save")
    standin.pause_inside(lane, 4)
    bench.save(1, 4, 5)
    standin.wait_paused(lane)
    bench.rig.ledger.bump([5])
    for cache in bench.rig.caches.values():
        cache[5] = 0xEE
    standin.release(lane)
    bench.idle()
    assert bench.filled() == [BlocksFilled(1, RANK, (4,), (5,), DropReason.OVERWRITTEN)]


def test_the_interpreter_goes_on_while_a_copy_waits(bench: Bench, standin: Standin) -> None:
    """With its lock held by the waiting thread this test would never get to its next line."""
    for what in ("save", "load"):
        standin.hold(bench.rig.lane(what))
    bench.save(1, 4)
    standin.wait_blocked("cuEventSynchronize")
    bench.load(2, (5,), (9,))
    standin.wait_blocked("cuEventSynchronize", threads=2)
    for what in ("load", "save"):
        standin.release(bench.rig.lane(what))
    bench.idle()


# ---------------------------------------------------------------- the actor


@dataclass
class Stage:
    """The actor with its hands; made on the loop."""

    rig: CudaRig
    settle_timeout_s: float = WAIT_S
    to_l1: list[FromGpuCopy] = field(default_factory=list)
    ended: list[LoadEnded] = field(default_factory=list)

    def __post_init__(self) -> None:
        opened: tuple[Sender[ToGpuCopy | CopyFact], Receiver[ToGpuCopy | CopyFact]]
        opened = open_mailbox("gpu_copy", 64, OnFull.REFUSE, call_soon=current_call_soon())
        self.sender, receiver = opened
        self.from_threads: ThreadSender[ToGpuCopy | CopyFact] = self.sender.threadsafe()
        self.hands = CopyHands(self.rig.engine, self.ended.append, self.from_threads.owe, HandsConfig(rank=RANK))
        config = GpuCopyConfig(rank=RANK, settle_timeout_s=self.settle_timeout_s)
        self.actor = GpuCopy(config, self.hands, receiver, self.to_l1.append)
        self.hands.start()

    def save(self, job: int, *slots: int) -> None:
        self.sender.owe(SlotGrant(job, slots, slots, (0,) * len(slots)))
        assert self.hands.saved(SaveBlocks(job, self.rig.engine.mark()))

    def load(self, job: int, slot: int, block: int) -> None:
        self.hands.load(LoadBlocks(job, f"request {job}", (slot,), (block,), self.rig.engine.mark()))

    def end(self) -> None:
        self.sender.close()
        self.from_threads.close()

    async def until(self, count: int) -> None:
        """So many reports have come to L1, within a bound."""
        with anyio.fail_after(WAIT_S):
            while len(self.to_l1) < count:  # noqa: ASYNC110  no event of the actor's reaches this test
                await anyio.sleep(0.002)


async def in_thread(call: partial[None]) -> None:
    """A wait of the stand-in, which must not stop the loop. (It is bounded.)"""
    await anyio.to_thread.run_sync(call)


@pytest.fixture
def stage_rig(standin: Standin) -> Iterator[CudaRig]:
    rig = CudaRig.plain(standin, GpuCopySettings(copy=CopyMode.DMA), blocks=16, slots=16)
    yield rig
    for thread in threading.enumerate():
        if thread.name in ("kvoffload-save", "kvoffload-load"):
            for state in standin.streams():
                standin.release(state.handle)
            thread.join(WAIT_S)
    rig.close()


@pytest.mark.anyio
@pytest.mark.real_clock
async def test_nothing_is_said_of_copies_that_do_not_complete(stage_rig: CudaRig, standin: Standin) -> None:
    """L1 keeps their slots; a Drain is answered when its time is over; what completes later is told once."""
    stage = Stage(stage_rig)
    for what in ("save", "load"):
        standin.hold(stage_rig.lane(what))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stage.actor.run)
        stage.save(1, 4, 5)
        await in_thread(partial(standin.wait_blocked, "cuEventSynchronize"))
        stage.load(2, 6, 9)
        await in_thread(partial(standin.wait_blocked, "cuEventSynchronize", 2))
        reply: Reply[bool] = Reply()
        stage.sender.owe(Drain(anyio.current_time() * 0, reply))
        assert await reply.wait() is False
        assert stage.to_l1 == []
        assert stage.ended == []
        standin.release(stage_rig.lane("load"))
        await stage.until(1)
        assert stage.to_l1 == [LoadFinished(2, RANK, LoadOutcome.LOADED)]
        standin.release(stage_rig.lane("save"))
        await stage.until(2)
        assert stage.to_l1[1:] == [BlocksFilled(1, RANK, (4, 5), ())]
        stage.end()
    assert stage.hands.close(WAIT_S)


@pytest.mark.anyio
@pytest.mark.real_clock
async def test_the_actor_ends_in_time_without_a_copy_that_does_not(stage_rig: CudaRig, standin: Standin) -> None:
    stage = Stage(stage_rig, settle_timeout_s=0.05)
    lane = stage_rig.lane("load")
    standin.hold(lane)
    stage.load(2, 6, 9)
    await in_thread(partial(standin.wait_blocked, "cuEventSynchronize"))
    stage.end()
    with anyio.fail_after(WAIT_S):
        await stage.actor.run()
    assert stage.to_l1 == []
    assert stage.ended == []
    assert not stage.hands.close(0.05)
    standin.release(lane)
    assert stage.hands.close(WAIT_S)
    assert stage.ended == [LoadEnded(2, "request 2", LoadOutcome.LOADED, (9,))]
    assert stage_rig.block(9) == stage_rig.slot(6)


@pytest.mark.anyio
@pytest.mark.real_clock
async def test_a_save_of_which_the_end_is_not_known_ends_the_actor_and_l1_keeps_its_slots(stage_rig: CudaRig, standin: Standin) -> None:
    stage = Stage(stage_rig)
    standin.fail("cuEventSynchronize", Code.UNKNOWN)
    standin.fail("cuStreamSynchronize", Code.OPERATING_SYSTEM, times=2)
    stage.save(1, 4)
    stage.save(2, 5)
    with anyio.fail_after(WAIT_S / 2), pytest.raises(InternalError, match="copy thread of rank 3 crashed: EngineLost"):
        await stage.actor.run()
    assert [fact for fact in stage.to_l1 if isinstance(fact, BlocksFilled) and fact.job == 1] == []
    assert stage.ended == []
    assert not stage.hands.close(WAIT_S)
    standin.wait_idle()
    stage_rig.close()
    standin.reset()


@pytest.mark.anyio
@pytest.mark.real_clock
async def test_an_error_on_an_event_is_told_as_a_failure_in_order(stage_rig: CudaRig, standin: Standin) -> None:
    stage = Stage(stage_rig)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stage.actor.run)
        standin.fail("cuEventSynchronize", Code.UNKNOWN)
        stage.save(1, 4)
        await stage.until(1)
        stage.save(2, 5)
        await stage.until(2)
        stage.end()
    assert stage.to_l1 == [BlocksFilled(1, RANK, (), (4,), DropReason.COPY_FAILED), BlocksFilled(2, RANK, (5,), ())]
    assert stage.hands.close(WAIT_S)
