"""What the shell around L1Core does with the second tier: refusals, and who waits for writes."""

from __future__ import annotations

import anyio
import pytest
from tests.l1.remote_rig import TestRing
from tests.l1.rig import chain, run

from kvoffload.actors.l1_manager import L1Manager
from kvoffload.l1 import L1Config, L1Core, RemoteConfig
from kvoffload.mailbox import OnFull, Receiver, Reply, Sender, open_mailbox
from kvoffload.messages import (
    BlocksFilled,
    Drain,
    FetchBlocks,
    FindBlocks,
    Flush,
    MatchPrefix,
    NodesChanged,
    PrefixHit,
    RankLost,
    ReserveSlots,
    SegmentGrown,
    SlotGrant,
    ToL1Manager,
    ToScheduler,
    WriteBlocks,
    WriteFinished,
)

A = chain("a", 4)


class Bench:
    """An L1Manager with one node, whose writer takes everything and whose prefetcher takes ``takes_reads``."""

    def __init__(self, *, takes_reads: bool = True, takes_writes: bool = True) -> None:
        core = L1Core(L1Config(), 8, RemoteConfig(min_tokens=1))
        self.core = core
        self.sender: Sender[ToL1Manager]
        receiver: Receiver[ToL1Manager]
        self.sender, receiver = open_mailbox("l1_manager", 100, OnFull.REFUSE)
        self.grants: list[SlotGrant] = []
        self.told: list[ToScheduler] = []
        self.reads: list[FindBlocks | FetchBlocks] = []
        self.writes: list[WriteBlocks] = []

        def read(node: str, message: FindBlocks | FetchBlocks) -> bool:
            self.reads.append(message)
            return takes_reads

        def write(node: str, message: WriteBlocks) -> bool:
            self.writes.append(message)
            return takes_writes

        self.manager = L1Manager(
            core,
            receiver,
            lambda rank, grant: self.grants.append(grant),
            self.told.append,
            anyio.current_time,
            to_prefetcher=read,
            to_writer=write,
        )
        self.post(SegmentGrown(0, 8), NodesChanged(TestRing(("n0",))))

    def post(self, *messages: ToL1Manager) -> None:
        for message in messages:
            assert self.sender.offer(message)

    async def save(self, job: int = 1) -> None:
        """A job whose blocks are in L1, and on their way to the node."""
        self.post(ReserveSlots(job, (run(A),)))
        await anyio.wait_all_tasks_blocked()
        self.post(BlocksFilled(job, 0, self.grants[-1].slots, ()))
        await anyio.wait_all_tasks_blocked()
        assert self.writes

    def written(self) -> WriteFinished:
        return WriteFinished(self.writes[-1].batch, "n0", self.writes[-1].slots, ())


@pytest.mark.anyio
async def test_a_flush_waits_for_the_nodes_only_where_it_says_so() -> None:
    bench = Bench()
    here, there = Reply[bool](), Reply[bool]()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.manager.run)
        await bench.save()
        bench.post(Flush(here, nodes=False), Flush(there))
        assert await here.wait()
        assert there.is_open
        bench.post(bench.written())
        assert await there.wait()
        bench.sender.close()


@pytest.mark.anyio
async def test_a_flush_before_the_copy_ended_waits_for_the_writes_that_follow() -> None:
    bench = Bench()
    here, there = Reply[bool](), Reply[bool]()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.manager.run)
        bench.post(ReserveSlots(1, (run(A),)), Flush(here, nodes=False), Flush(there))
        await anyio.wait_all_tasks_blocked()
        bench.post(BlocksFilled(1, 0, bench.grants[0].slots, ()))
        assert await here.wait()
        assert there.is_open
        bench.post(bench.written())
        assert await there.wait()
        bench.sender.close()


@pytest.mark.anyio
async def test_a_drain_waits_for_writes_though_a_rank_is_lost() -> None:
    """vLLM ends its workers first."""
    bench = Bench()
    drained = Reply[bool]()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.manager.run)
        await bench.save()
        bench.post(RankLost(0, "it ended"), Drain(anyio.current_time() + 60, drained))
        await anyio.wait_all_tasks_blocked()
        assert drained.is_open
        bench.post(bench.written())
        assert await drained.wait()
        bench.sender.close()


@pytest.mark.anyio
async def test_a_drain_does_not_wait_for_what_a_lost_rank_was_to_report() -> None:
    bench = Bench()
    drained = Reply[bool]()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.manager.run)
        await bench.save()
        bench.post(ReserveSlots(2, (run(chain("b", 2)),)), RankLost(0, "it ended"), Drain(anyio.current_time() + 60, drained))
        await anyio.wait_all_tasks_blocked()
        assert drained.is_open  # for the write
        bench.post(bench.written())
        assert not await drained.wait()  # not all that was begun has ended
        bench.sender.close()


@pytest.mark.anyio
async def test_what_the_node_s_actors_refuse_is_a_miss_and_a_dropped_write_at_once() -> None:
    bench = Bench(takes_reads=False, takes_writes=False)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.manager.run)
        await bench.save()
        bench.post(MatchPrefix("r", 1, chain("b", 4), anyio.current_time() + 60, 0, 0.0, 16))
        await anyio.wait_all_tasks_blocked()
        assert [type(message) for message in bench.reads] == [FindBlocks]
        (hit,) = bench.told
        assert isinstance(hit, PrefixHit)
        assert hit.slots == ()
        assert bench.core.open_jobs() == frozenset()
        bench.core.check()
        bench.sender.close()


@pytest.mark.anyio
async def test_a_match_is_answered_at_its_deadline_by_itself() -> None:
    bench = Bench()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.manager.run)
        begun = anyio.current_time()
        bench.post(MatchPrefix("r", 1, A, begun + 5, 0, 0.0, 16))
        await anyio.wait_all_tasks_blocked()
        assert not bench.told
        await anyio.sleep(5.1)
        assert [hit.slots for hit in bench.told if isinstance(hit, PrefixHit)] == [()]
        bench.sender.close()
