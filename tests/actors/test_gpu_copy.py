from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import anyio
import pytest
from tests.copy.rigs import WAIT_S, Rig

from kvoffload.actors.gpu_copy import FromGpuCopy, GpuCopy, GpuCopyConfig
from kvoffload.copy.hands import CopyFact, CopyHands, HandsConfig, LoadState
from kvoffload.errors import InternalError
from kvoffload.mailbox import OnFull, Receiver, Reply, Sender, ThreadSender, current_call_soon, open_mailbox
from kvoffload.messages import (
    BlocksFilled,
    Drain,
    DropReason,
    Flush,
    LoadBlocks,
    LoadEnded,
    LoadFinished,
    LoadOutcome,
    SaveBlocks,
    SegmentGrown,
    SlotGrant,
    ToGpuCopy,
)
from kvoffload.testing.cancel import cancel_at_every_checkpoint
from kvoffload.testing.copy_faults import FaultyCopyEngine, InjectedCrash

RANK = 2


@dataclass
class Stage:
    """One actor with its hands, and what it said. Made on the loop; its threads are started only where a test copies."""

    clock: Callable[[], float] = time.monotonic
    facts_to_end: int | None = None
    """After so many facts the threads' end of the mailbox closes, so that the actor ends by itself."""
    settle_timeout_s: float = WAIT_S
    port: Callable[[FromGpuCopy], None] | None = None
    """Where reports go in place of `to_l1`."""
    after_report: threading.Event | None = None
    """Where a thread that has just reported waits for this."""
    to_l1: list[FromGpuCopy] = field(default_factory=list)
    ended: list[LoadEnded] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rig = Rig.make(blocks=16, slots=16)
        self.engine = FaultyCopyEngine(self.rig.engine)
        opened: tuple[Sender[ToGpuCopy | CopyFact], Receiver[ToGpuCopy | CopyFact]]
        opened = open_mailbox("gpu_copy", 64, OnFull.REFUSE, call_soon=current_call_soon())
        self.sender, self.receiver = opened
        self.thread_sender: ThreadSender[ToGpuCopy | CopyFact] = self.sender.threadsafe()
        self.reported = 0
        self.hands = CopyHands(self.engine, self.ended.append, self.report, HandsConfig(rank=RANK, pair_timeout_s=5.0), self.clock)
        config = GpuCopyConfig(rank=RANK, settle_timeout_s=self.settle_timeout_s)
        self.actor = GpuCopy(config, self.hands, self.receiver, self.port or self.to_l1.append, self.clock)

    def report(self, fact: CopyFact) -> None:
        self.thread_sender.owe(fact)
        self.reported += 1
        if self.after_report is not None:
            self.after_report.wait(WAIT_S)
        if self.reported == self.facts_to_end:
            self.thread_sender.close()

    def close_senders(self) -> None:
        self.sender.close()
        self.thread_sender.close()

    def close(self) -> None:
        self.engine.release()
        assert self.hands.close(WAIT_S)
        self.rig.close()

    def save(self, job: int, *slots: int) -> None:
        """Both halves of a save."""
        self.grant(job, *slots)
        assert self.hands.saved(SaveBlocks(job, None))

    def grant(self, job: int, *slots: int) -> None:
        self.sender.owe(grant(job, *slots))

    def load(self, job: int) -> None:
        self.hands.load(LoadBlocks(job, f"request {job}", (1,), (9,), None))

    def filled(self) -> list[BlocksFilled]:
        return [message for message in self.to_l1 if isinstance(message, BlocksFilled)]


def grant(job: int, *slots: int) -> SlotGrant:
    return SlotGrant(job, slots, slots, (0,) * len(slots))


@pytest.fixture
def stages() -> Iterator[list[Stage]]:
    """Stages to be closed after the test."""
    made: list[Stage] = []
    yield made
    for stage in made:
        stage.close()


async def until(condition: Callable[[], bool]) -> None:
    """A bounded wait, in real time, for what threads do."""
    with anyio.fail_after(WAIT_S):
        while not condition():  # noqa: ASYNC110  no event of theirs reaches the loop
            await anyio.sleep(0.002)


@pytest.mark.anyio
@pytest.mark.real_clock
async def test_saves_and_loads_are_reported(stages: list[Stage]) -> None:
    stage = Stage(facts_to_end=3)
    stages.append(stage)
    stage.hands.start()
    stage.save(1, 4, 5)
    stage.load(2)
    stage.save(3, 6)
    stage.sender.owe(SlotGrant(7, (), (), ()))
    stage.sender.close()
    await stage.actor.run()
    assert stage.filled() == [BlocksFilled(1, RANK, (4, 5), ()), BlocksFilled(3, RANK, (6,), ())]
    assert LoadFinished(2, RANK, LoadOutcome.LOADED) in stage.to_l1
    assert stage.rig.slot(5) == stage.rig.block(5)


@pytest.mark.anyio
@pytest.mark.real_clock
async def test_reports_come_in_the_order_of_the_grants(stages: list[Stage]) -> None:
    stage = Stage()
    stages.append(stage)
    stage.hands.start()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stage.actor.run)
        for job in (1, 2, 3):
            stage.grant(job, job)
        stage.hands.saved(SaveBlocks(3, None))
        stage.hands.saved(SaveBlocks(2, None))
        await until(lambda: stage.reported == 2)
        assert stage.to_l1 == []
        stage.hands.saved(SaveBlocks(1, None))
        await until(lambda: len(stage.to_l1) == 3)
        stage.close_senders()
    assert [fact.job for fact in stage.filled()] == [1, 2, 3]


@pytest.mark.anyio
async def test_a_grant_alone_is_dropped_in_time(stages: list[Stage]) -> None:
    start = anyio.current_time()
    reports: list[tuple[float, FromGpuCopy]] = []
    stage = Stage(clock=anyio.current_time, port=lambda message: reports.append((anyio.current_time() - start, message)))
    stages.append(stage)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stage.actor.run)
        stage.grant(1, 4)
        await anyio.sleep(2)
        stage.grant(2, 5, 6)
        await anyio.sleep(60)
        stage.close_senders()
    assert [round(when, 2) for when, _ in reports] == [5.0, 7.0]
    assert [message for _, message in reports] == [
        BlocksFilled(1, RANK, (), (4,), DropReason.UNPAIRED),
        BlocksFilled(2, RANK, (), (5, 6), DropReason.UNPAIRED),
    ]


@pytest.mark.anyio
async def test_growth_is_passed_on_the_last_of_a_burst(stages: list[Stage]) -> None:
    stage = Stage()
    stages.append(stage)
    for slots in (1, 5, 9):
        stage.report(SegmentGrown(RANK, slots))
    stage.close_senders()
    await stage.actor.run()
    assert stage.to_l1 == [SegmentGrown(RANK, 9)]


@pytest.mark.anyio
@pytest.mark.real_clock
async def test_flush_waits_for_what_came_before_and_for_nothing_else(stages: list[Stage]) -> None:
    stage = Stage()
    stages.append(stage)
    stage.hands.start()
    first, second, third = Reply[bool](), Reply[bool](), Reply[bool]()
    stage.engine.hold_saves()
    stage.engine.hold_loads()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stage.actor.run)
        stage.sender.owe(Flush(first))
        assert await first.wait()
        stage.load(1)
        stage.save(2, 4)
        stage.sender.owe(Flush(second))
        stage.grant(3, 5)  # its other half does not come
        stage.sender.owe(Flush(third))
        await until(lambda: stage.engine.wait_held("save", 0))
        await until(lambda: stage.sender.statistics().depth == 0)
        assert second.is_open
        stage.engine.release()
        assert await second.wait()
        assert {type(message) for message in stage.to_l1} == {LoadFinished, BlocksFilled}
        assert third.is_open
        stage.hands.saved(SaveBlocks(3, None))
        assert await third.wait()
        stage.close_senders()


@pytest.mark.anyio
@pytest.mark.real_clock
async def test_flush_does_not_wait_for_a_load_whose_end_it_has_passed_on(stages: list[Stage]) -> None:
    stage = Stage(after_report=threading.Event())
    stages.append(stage)
    assert stage.after_report is not None
    stage.hands.start()
    reply = Reply[bool]()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stage.actor.run)
        stage.load(1)
        await until(lambda: len(stage.to_l1) == 1)
        assert stage.hands.live_loads() == [1]  # its thread has told, and not yet forgotten it
        stage.sender.owe(Flush(reply))
        with anyio.fail_after(WAIT_S):
            assert await reply.wait()
        stage.after_report.set()
        stage.close_senders()


@pytest.mark.anyio
@pytest.mark.real_clock
async def test_drain_finishes_what_was_begun_and_takes_no_more(stages: list[Stage]) -> None:
    stage = Stage()
    stages.append(stage)
    stage.hands.start()
    stage.engine.hold_saves()
    reply = Reply[bool]()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stage.actor.run)
        stage.save(1, 4)
        stage.sender.owe(Drain(time.monotonic() + WAIT_S, reply))
        stage.save(2, 5)
        await until(lambda: stage.engine.wait_held("save", 0))
        stage.engine.release()
        assert await reply.wait()
        stage.close_senders()
    assert stage.filled() == [BlocksFilled(1, RANK, (4,), ()), BlocksFilled(2, RANK, (), (5,), DropReason.OFF)]


@pytest.mark.anyio
async def test_drain_gives_up_at_its_deadline(stages: list[Stage]) -> None:
    stage = Stage(clock=anyio.current_time)
    stages.append(stage)
    start, reply, later = anyio.current_time(), Reply[bool](), Reply[bool]()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stage.actor.run)
        stage.grant(1, 4)
        stage.sender.owe(Drain(start + 3, reply))
        stage.sender.owe(Flush(later))
        assert not await reply.wait()
        assert anyio.current_time() - start == pytest.approx(3.0, abs=0.01)
        assert await later.wait()  # the grant expired
        assert anyio.current_time() - start == pytest.approx(5.0, abs=0.01)
        stage.close_senders()


@pytest.mark.anyio
@pytest.mark.real_clock
@pytest.mark.parametrize("kind", ["save", "load"])
async def test_a_crash_of_a_thread_is_raised_after_everything_was_told(stages: list[Stage], kind: str) -> None:
    stage = Stage()
    stages.append(stage)
    stage.engine.crash_next(kind)
    flush = Reply[bool]()
    stage.save(1, 4)
    stage.load(2)
    stage.load(3)
    stage.grant(4, 5)
    stage.sender.owe(Flush(flush))
    stage.hands.start()
    with anyio.fail_after(WAIT_S):
        with pytest.raises(InternalError, match="copy thread of rank 2 crashed") as caught:
            await stage.actor.run()
    assert isinstance(caught.value.__cause__, InjectedCrash)
    assert sorted(fact.job for fact in stage.filled()) == [1, 4]
    assert sorted(fact.job for fact in stage.to_l1 if isinstance(fact, LoadFinished)) == [2, 3]
    assert sorted(fact.job for fact in stage.ended) == [2, 3]
    assert not flush.is_open
    if kind == "load":
        assert LoadFinished(2, RANK, LoadOutcome.FAILED) in stage.to_l1
    else:
        assert BlocksFilled(1, RANK, (), (4,), DropReason.COPY_FAILED) in stage.to_l1


@pytest.mark.anyio
@pytest.mark.real_clock
async def test_a_bug_in_the_receiver_of_reports_is_not_hidden(stages: list[Stage]) -> None:
    def broken(message: FromGpuCopy) -> None:
        raise LookupError("no L1")

    stage = Stage(port=broken)
    stages.append(stage)
    stage.save(1, 4)
    stage.hands.start()
    with anyio.fail_after(WAIT_S):
        with pytest.raises(LookupError):
            await stage.actor.run()
    assert not stage.hands.saved(SaveBlocks(2, None))


@pytest.mark.anyio
@pytest.mark.real_clock
async def test_ending_waits_for_running_copies_and_withdraws_the_rest(stages: list[Stage]) -> None:
    stage = Stage()
    stages.append(stage)
    stage.hands.start()
    stage.engine.hold_saves()
    stage.engine.hold_loads()
    stage.save(1, 4)
    stage.load(2)
    queued = stage.hands.load(LoadBlocks(3, "r", (1,), (8,), None))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stage.actor.run)
        await until(lambda: stage.engine.wait_held("load", 0) and stage.engine.wait_held("save", 0))
        tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await until(lambda: queued.state is LoadState.WITHDRAWN)
            assert stage.to_l1 == []
            stage.engine.release()
    assert stage.filled() == [BlocksFilled(1, RANK, (4,), ())]
    loads = {message.job: message.outcome for message in stage.to_l1 if isinstance(message, LoadFinished)}
    assert loads == {2: LoadOutcome.LOADED, 3: LoadOutcome.WITHDRAWN}


@pytest.mark.anyio
@pytest.mark.real_clock
async def test_a_copy_that_hangs_holds_up_nobody_and_keeps_its_slots(stages: list[Stage]) -> None:
    stage = Stage(settle_timeout_s=0.05)
    stages.append(stage)
    stage.hands.start()
    stage.engine.hold_saves()
    stage.save(1, 4)
    stage.grant(2, 5)
    stage.load(3)
    flush = Reply[bool]()
    stage.sender.owe(Flush(flush))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stage.actor.run)
        await until(lambda: stage.engine.wait_held("save", 0))
        tasks.cancel_scope.cancel()
    assert [fact.job for fact in stage.filled()] == [2]
    assert not await flush.wait()


@pytest.mark.anyio
@pytest.mark.real_clock
async def test_cancelled_at_any_checkpoint_everything_is_accounted_for(stages: list[Stage]) -> None:
    stage: Stage
    replies: list[Reply[bool]] = []

    async def run() -> None:
        nonlocal stage
        stage = Stage(facts_to_end=5)
        stages.append(stage)
        replies[:] = [Reply[bool](), Reply[bool]()]
        stage.hands.start()
        stage.save(1, 4, 5)
        stage.load(2)
        stage.sender.owe(Flush(replies[0]))
        stage.grant(3, 6)
        stage.load(4)
        stage.save(5, 7)
        stage.sender.owe(Drain(time.monotonic() + WAIT_S, replies[1]))
        stage.hands.saved(SaveBlocks(3, None))
        stage.sender.close()
        await stage.actor.run()

    def check(nth: int) -> None:
        assert sorted(fact.job for fact in stage.filled()) == [1, 3, 5] or not stage.to_l1
        granted = {1: (4, 5), 3: (6,), 5: (7,)}
        for fact in stage.filled():
            assert tuple(sorted((*fact.filled, *fact.failed))) == granted[fact.job]
        assert sorted(fact.job for fact in stage.ended) == [2, 4]
        assert sorted(fact.job for fact in stage.to_l1 if isinstance(fact, LoadFinished)) == [2, 4]
        assert not any(reply.is_open for reply in replies)
        assert stage.hands.wait_idle(0)

    assert await cancel_at_every_checkpoint(run, check) >= 1
