"""The shell around L1Core: order, Flush and Drain, its end, and cancellation at each checkpoint."""

from __future__ import annotations

from collections.abc import Callable

import anyio
import anyio.lowlevel
import pytest
from tests.l1.rig import chain, run

from kvoffload.actors.l1_manager import BURST_S, L1Manager
from kvoffload.errors import InternalError, PeerError
from kvoffload.l1 import L1Config, L1Core, State
from kvoffload.mailbox import OnFull, Receiver, Reply, Sender, open_mailbox
from kvoffload.messages import (
    BlocksFilled,
    Drain,
    Flush,
    HitReason,
    MatchPrefix,
    ParentMissing,
    PrefixHit,
    RankLost,
    ReserveSlots,
    SegmentGrown,
    SlotGrant,
    ToL1Manager,
    ToScheduler,
)
from kvoffload.testing.cancel import cancel_at_every_checkpoint

A = chain("a", 4)


class Bench:
    """An L1Manager, and all that came out of it, in order."""

    def __init__(self, ranks: int = 1, clock: Callable[[], float] = anyio.current_time) -> None:
        self.core = L1Core(L1Config(ranks=ranks), 8)
        self.sender: Sender[ToL1Manager]
        receiver: Receiver[ToL1Manager]
        self.sender, receiver = open_mailbox("l1_manager", 100, OnFull.REFUSE)
        self.out: list[tuple[int, SlotGrant] | ToScheduler] = []
        self.manager = L1Manager(self.core, receiver, lambda *grant: self.out.append(grant), self.out.append, clock)
        for rank in range(ranks):
            self.post(SegmentGrown(rank, 8))

    def post(self, *messages: ToL1Manager) -> None:
        for message in messages:
            assert self.sender.offer(message)

    def grants(self) -> list[SlotGrant]:
        return [entry[1] for entry in self.out if isinstance(entry, tuple)]


def reserve(job: int) -> ReserveSlots:
    return ReserveSlots(job, (run(A),))


@pytest.mark.anyio
async def test_effects_go_out_in_order_and_the_end_of_the_mailbox_ends_it() -> None:
    bench = Bench(ranks=2)
    bench.post(ReserveSlots(1, (run(A), run(chain("b", 2), 1))), MatchPrefix("r", 1, A, 0.0))
    bench.sender.close()
    await bench.manager.run()
    (rank0, grant0), (rank1, grant1), missing, hit = bench.out  # type: ignore[misc]
    assert (rank0, rank1) == (0, 1)
    assert grant0 == grant1
    assert missing == ParentMissing(1, ("r",))
    assert isinstance(hit, PrefixHit)
    assert hit.pending == 4


@pytest.mark.anyio
async def test_a_flush_waits_for_the_jobs_before_it_and_no_others() -> None:
    bench = Bench()
    flush: Reply[bool] = Reply()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.manager.run)
        bench.post(reserve(1), Flush(flush), ReserveSlots(2, (run(chain("b", 2)),)))
        await anyio.wait_all_tasks_blocked()
        assert flush.is_open
        bench.post(BlocksFilled(1, 0, bench.grants()[0].slots, ()))
        assert await flush.wait()
        assert bench.core.open_jobs() == {2}
        bench.sender.close()


@pytest.mark.anyio
async def test_a_flush_of_nothing_is_answered_at_once() -> None:
    bench = Bench()
    flush: Reply[bool] = Reply()
    bench.post(Flush(flush))
    bench.sender.close()
    await bench.manager.run()
    assert await flush.wait()


@pytest.mark.anyio
async def test_a_drain_refuses_new_work_and_is_answered_when_the_old_is_done() -> None:
    bench = Bench()
    drain: Reply[bool] = Reply()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.manager.run)
        bench.post(reserve(1), Drain(anyio.current_time() + 60, drain), reserve(2), MatchPrefix("r", 1, A, 0.0))
        await anyio.wait_all_tasks_blocked()
        first, second = bench.grants()
        assert (len(first.slots), len(second.slots)) == (4, 0)
        assert [hit.reason for hit in bench.out if isinstance(hit, PrefixHit)] == [HitReason.OFF]
        bench.post(BlocksFilled(1, 0, first.slots, ()))
        assert await drain.wait()
        bench.sender.close()


@pytest.mark.anyio
async def test_a_drain_is_answered_false_at_its_deadline() -> None:
    bench = Bench()
    drain: Reply[bool] = Reply()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.manager.run)
        begun = anyio.current_time()
        bench.post(reserve(1), Drain(begun + 3600, drain))
        assert not await drain.wait()
        assert anyio.current_time() - begun == pytest.approx(3600, abs=1)
        bench.sender.close()


@pytest.mark.anyio
async def test_jobs_of_a_lost_rank_keep_nobody_waiting() -> None:
    bench = Bench(ranks=2)
    flush: Reply[bool] = Reply()
    late: Reply[bool] = Reply()
    bench.post(reserve(1), Flush(flush), RankLost(1, "test"), Flush(late))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.manager.run)
        assert not await flush.wait()
        assert not await late.wait()
        bench.sender.close()


@pytest.mark.anyio
async def test_who_waits_when_the_mailbox_ends_is_told_so() -> None:
    bench = Bench()
    flush: Reply[bool] = Reply()
    bench.post(reserve(1), Flush(flush))
    bench.sender.close()
    await bench.manager.run()
    assert not await flush.wait()


@pytest.mark.anyio
async def test_a_bug_in_the_core_ends_it_and_replies_behind_it_are_gone() -> None:
    bench = Bench()
    flush: Reply[bool] = Reply()
    bench.post(BlocksFilled(7, 0, (), ()), Flush(flush))
    with pytest.raises(InternalError, match="save 7"):
        await bench.manager.run()
    with pytest.raises(PeerError, match="gone"):
        await flush.wait()
    assert not bench.sender.offer(reserve(1))


@pytest.mark.anyio
async def test_a_long_burst_lets_others_on_the_loop_run() -> None:
    ticks = iter(range(10**6))
    bench = Bench(clock=lambda: next(ticks) * BURST_S)
    bench.post(*(MatchPrefix("r", sequence, A, 0.0) for sequence in range(1, 20)))
    bench.sender.close()
    seen: list[int] = []

    async def other() -> None:
        while len(bench.out) < 19:
            seen.append(len(bench.out))
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.manager.run)
        tasks.start_soon(other)
    assert len(set(seen)) > 5, "it was let in between the messages of one burst"


@pytest.mark.anyio
async def test_cancelled_anywhere_every_slot_lease_and_reply_is_accounted_for() -> None:
    bench = Bench()
    replies: list[Reply[bool]] = []
    ticks = iter(range(10**9))

    def make_run() -> object:
        nonlocal bench
        bench = Bench(clock=lambda: next(ticks) * BURST_S)
        replies[:] = [Reply(), Reply(), Reply()]
        bench.post(reserve(1), Flush(replies[0]), MatchPrefix("r", 1, A, 0.0))
        bench.post(BlocksFilled(1, 0, tuple(range(4)), ()), Flush(replies[1]), reserve(2), MatchPrefix("r", 2, A, 0.0))
        bench.post(Drain(10**12, replies[2]))
        bench.sender.close()
        return bench.manager.run()

    async def check(nth: int) -> None:
        bench.core.check()
        slots = bench.core.statistics().slots
        assert slots[State.FREE] + slots[State.FILLING] + slots[State.READY] == bench.core.statistics().usable
        assert len(bench.grants()) == bench.core.statistics().offered // 4, "what was decided was sent"
        assert not any(reply.is_open for reply in replies), "somebody waits for ever"

    cancelled = await cancel_at_every_checkpoint(make_run, check)  # type: ignore[arg-type]
    assert cancelled > 5
    for reply in replies:
        assert await reply.wait()
