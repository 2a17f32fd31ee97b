"""L1Manager with nodes: what they refuse has failed at once, deadlines come by themselves, and a Flush waits for writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import anyio
import pytest
from tests.l1.remote_rig import TOKENS, TestRing
from tests.l1.rig import chain, run

from kvoffload.actors.l1_manager import BURST_S, L1Manager
from kvoffload.l1 import L1Config, L1Core, RemoteConfig, State
from kvoffload.mailbox import OnFull, Receiver, Reply, Sender, open_mailbox
from kvoffload.messages import (
    BlocksFilled,
    BlocksFound,
    Drain,
    FetchBlocks,
    FetchFinished,
    FindBlocks,
    Flush,
    HitReason,
    MatchPrefix,
    Node,
    NodeBack,
    NodesChanged,
    PrefixHit,
    ReserveSlots,
    SegmentGrown,
    SlotGrant,
    ToL1Manager,
    ToScheduler,
    TransfersSettled,
    WriteBlocks,
    WriteFinished,
)
from kvoffload.testing.cancel import cancel_at_every_checkpoint

A = chain("a", 6)


@dataclass
class Nodes:
    """Takes what it is offered, or not."""

    takes: bool = True
    finds: list[tuple[Node, FindBlocks]] = field(default_factory=list)
    fetches: list[tuple[Node, FetchBlocks]] = field(default_factory=list)
    writes: list[tuple[Node, WriteBlocks]] = field(default_factory=list)
    refused: int = 0

    def to_prefetcher(self, node: Node, message: FindBlocks | FetchBlocks) -> bool:
        if not self.takes:
            self.refused += 1
        elif isinstance(message, FindBlocks):
            self.finds.append((node, message))
        else:
            self.fetches.append((node, message))
        return self.takes

    def to_writer(self, node: Node, message: WriteBlocks) -> bool:
        if self.takes:
            self.writes.append((node, message))
        else:
            self.refused += 1
        return self.takes


class Bench:
    """An L1Manager between an engine and nodes."""

    def __init__(self, nodes: Nodes | None = None, clock: Callable[[], float] = anyio.current_time) -> None:
        self.nodes = nodes or Nodes()
        self.core = L1Core(L1Config(), 16, RemoteConfig(min_tokens=1))
        self.sender: Sender[ToL1Manager]
        receiver: Receiver[ToL1Manager]
        self.sender, receiver = open_mailbox("l1_manager", 100, OnFull.REFUSE)
        self.grants: list[SlotGrant] = []
        self.answers: list[ToScheduler] = []
        self.manager = L1Manager(
            self.core,
            receiver,
            lambda rank, grant: self.grants.append(grant),
            self.answers.append,
            clock,
            to_prefetcher=self.nodes.to_prefetcher,
            to_writer=self.nodes.to_writer,
        )
        self.post(SegmentGrown(0, 16), NodesChanged(TestRing()))

    def post(self, *messages: ToL1Manager) -> None:
        for message in messages:
            assert self.sender.offer(message)

    def hits(self) -> list[PrefixHit]:
        return [answer for answer in self.answers if isinstance(answer, PrefixHit)]


def match(deadline: float, request: str = "r", sequence: int = 1) -> MatchPrefix:
    return MatchPrefix(request, sequence, A, deadline, 0, 0.0, TOKENS)


@pytest.mark.anyio
async def test_a_match_is_answered_when_its_blocks_have_come() -> None:
    bench = Bench()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.manager.run)
        bench.post(match(anyio.current_time() + 60))
        await anyio.wait_all_tasks_blocked()
        for node, find in bench.nodes.finds:
            bench.post(BlocksFound(find.batch, node, (True,) * len(find.keys)))
        await anyio.wait_all_tasks_blocked()
        assert not bench.hits()
        for node, fetch in bench.nodes.fetches:
            bench.post(FetchFinished(fetch.batch, node, fetch.slots, (), ()))
        await anyio.wait_all_tasks_blocked()
        assert [len(hit.slots) for hit in bench.hits()] == [6]
        bench.sender.close()


@pytest.mark.anyio
async def test_a_match_is_answered_at_its_deadline_though_no_message_comes() -> None:
    bench = Bench()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.manager.run)
        begun = anyio.current_time()
        bench.post(match(begun + 3600, "late"), match(begun + 1800, "early"))
        await anyio.sleep(1799)
        assert not bench.hits()
        await anyio.sleep(2)
        assert [hit.request for hit in bench.hits()] == ["early"]
        await anyio.sleep(1797)
        assert len(bench.hits()) == 1
        await anyio.sleep(3)
        assert [(hit.request, hit.reason) for hit in bench.hits()] == [("early", HitReason.MISS), ("late", HitReason.MISS)]
        bench.sender.close()


@pytest.mark.anyio
async def test_what_nodes_refuse_has_failed_and_costs_no_time() -> None:
    bench = Bench(Nodes(takes=False))
    bench.post(match(anyio.current_time() + 3600), ReserveSlots(1, (run(A),)), BlocksFilled(1, 0, tuple(range(6)), ()))
    bench.sender.close()
    await bench.manager.run()
    assert [hit.reason for hit in bench.hits()] == [HitReason.MISS]
    assert bench.nodes.refused == 6, "three questions and three writes"
    assert bench.core.statistics().slots[State.READY] == 6
    assert not bench.core.open_jobs()


@pytest.mark.anyio
async def test_a_fetch_that_is_refused_has_failed() -> None:
    bench = Bench()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.manager.run)
        bench.post(match(anyio.current_time() + 3600))
        await anyio.wait_all_tasks_blocked()
        bench.nodes.takes = False
        for node, find in bench.nodes.finds:
            bench.post(BlocksFound(find.batch, node, (True,) * len(find.keys)))
        await anyio.wait_all_tasks_blocked()
        assert [hit.reason for hit in bench.hits()] == [HitReason.MISS]
        assert bench.core.statistics().slots[State.FREE] == 16
        bench.core.check()
        bench.sender.close()


@pytest.mark.anyio
async def test_without_nodes_everything_is_refused() -> None:
    core = L1Core(L1Config(), 16, RemoteConfig(min_tokens=1))
    sender: Sender[ToL1Manager]
    receiver: Receiver[ToL1Manager]
    sender, receiver = open_mailbox("l1_manager", 100, OnFull.REFUSE)
    answers: list[ToScheduler] = []
    manager = L1Manager(core, receiver, lambda rank, grant: None, answers.append, anyio.current_time)
    assert sender.offer(NodesChanged(TestRing()))
    assert sender.offer(match(anyio.current_time() + 60))
    sender.close()
    await manager.run()
    assert len(answers) == 1


@pytest.mark.anyio
async def test_a_flush_waits_for_the_writes_that_the_saves_before_it_led_to() -> None:
    bench = Bench()
    flush: Reply[bool] = Reply()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.manager.run)
        bench.post(ReserveSlots(1, (run(A),)), Flush(flush))
        await anyio.wait_all_tasks_blocked()
        bench.post(BlocksFilled(1, 0, bench.grants[0].slots, ()))
        await anyio.wait_all_tasks_blocked()
        assert flush.is_open
        assert len(bench.nodes.writes) == 3
        bench.post(ReserveSlots(2, (run(chain("b", 3)),)), BlocksFilled(2, 0, tuple(range(6, 9)), ()))
        for node, write in tuple(bench.nodes.writes):
            bench.post(WriteFinished(write.batch, node, write.slots, ()))
        assert await flush.wait()
        assert bench.core.open_writes(), "later ones are not waited for"
        bench.sender.close()


@pytest.mark.anyio
async def test_a_flush_does_not_wait_for_what_never_settles_and_a_drain_does_until_its_deadline() -> None:
    """A node that was given up on, and may read or write slots for as long as it lives."""
    bench = Bench()
    flushes: list[Reply[bool]] = [Reply(), Reply()]
    drain: Reply[bool] = Reply()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.manager.run)
        bench.post(match(anyio.current_time() + 60), ReserveSlots(1, (run(chain("b", 3)),)), BlocksFilled(1, 0, (0, 1, 2), ()))
        await anyio.wait_all_tasks_blocked()
        for node, find in bench.nodes.finds:
            bench.post(BlocksFound(find.batch, node, (True,) * len(find.keys)))
        bench.post(Flush(flushes[0]))
        await anyio.wait_all_tasks_blocked()
        assert flushes[0].is_open
        for node, fetch in bench.nodes.fetches:
            bench.post(FetchFinished(fetch.batch, node, (), (), (), fetch.slots))
        for node, write in bench.nodes.writes:
            bench.post(WriteFinished(write.batch, node, (), (), write.slots))
        bench.post(Flush(flushes[1]))
        with anyio.fail_after(1):
            assert [await flush.wait() for flush in flushes] == [True, True]
        begun = anyio.current_time()
        bench.post(Drain(begun + 30, drain))
        assert await drain.wait() is False
        assert anyio.current_time() - begun >= 30
        bench.sender.close()


@pytest.mark.anyio
async def test_a_drain_is_answered_as_soon_as_all_has_settled() -> None:
    bench = Bench()
    drain: Reply[bool] = Reply()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.manager.run)
        bench.post(ReserveSlots(1, (run(chain("b", 3)),)), BlocksFilled(1, 0, (0, 1, 2), ()))
        await anyio.wait_all_tasks_blocked()
        bench.post(Drain(anyio.current_time() + 30, drain))
        for node, write in bench.nodes.writes:
            bench.post(WriteFinished(write.batch, node, (), (), write.slots))
        await anyio.sleep(1)
        assert drain.is_open
        for node, write in bench.nodes.writes:
            bench.post(TransfersSettled(write.batch, node, write.slots))
        with anyio.fail_after(1):
            assert await drain.wait()
        bench.sender.close()


@pytest.mark.anyio
async def test_a_node_that_is_back_is_caught_up_though_no_message_comes() -> None:
    bench = Bench()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.manager.run)
        bench.post(ReserveSlots(1, (run(A),)), BlocksFilled(1, 0, tuple(range(6)), ()))
        await anyio.wait_all_tasks_blocked()
        for node, write in bench.nodes.writes:
            bench.post(WriteFinished(write.batch, node, write.slots, ()))
        bench.post(NodeBack("n1"))
        await anyio.sleep(1)
        [(node, find)] = bench.nodes.finds
        assert (node, find.keys) == ("n1", A[1::3])
        bench.nodes.writes.clear()
        bench.post(BlocksFound(find.batch, node, (False, True)))
        await anyio.sleep(1)
        [(node, write)] = bench.nodes.writes
        assert (node, write.keys) == ("n1", A[1:2])
        bench.post(WriteFinished(write.batch, node, write.slots, ()))
        await anyio.sleep(1)
        assert bench.core.next_deadline() is None
        bench.sender.close()


@pytest.mark.anyio
async def test_a_node_that_refuses_the_question_is_asked_again_later() -> None:
    bench = Bench()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.manager.run)
        bench.post(ReserveSlots(1, (run(A),)), BlocksFilled(1, 0, tuple(range(6)), ()))
        await anyio.wait_all_tasks_blocked()
        for node, write in bench.nodes.writes:
            bench.post(WriteFinished(write.batch, node, write.slots, ()))
        bench.nodes.takes = False
        bench.post(NodeBack("n1"))
        await anyio.sleep(1)
        assert bench.nodes.refused == 1
        bench.nodes.takes = True
        await anyio.sleep(10)
        assert [node for node, _ in bench.nodes.finds] == ["n1"]
        bench.sender.close()


@pytest.mark.anyio
async def test_a_drain_refuses_who_waits_and_is_answered_when_fetches_and_writes_have_ended() -> None:
    bench = Bench()
    drain: Reply[bool] = Reply()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.manager.run)
        bench.post(match(anyio.current_time() + 60))
        await anyio.wait_all_tasks_blocked()
        for node, find in bench.nodes.finds:
            bench.post(BlocksFound(find.batch, node, (True,) * len(find.keys)))
        bench.post(Drain(anyio.current_time() + 60, drain))
        await anyio.wait_all_tasks_blocked()
        assert [hit.reason for hit in bench.hits()] == [HitReason.OFF]
        assert drain.is_open
        for node, fetch in bench.nodes.fetches:
            bench.post(FetchFinished(fetch.batch, node, (), fetch.slots, ()))
        assert await drain.wait()
        bench.sender.close()


@pytest.mark.anyio
async def test_cancelled_anywhere_every_slot_is_accounted_for() -> None:
    bench = Bench()
    flush: Reply[bool] = Reply()
    ticks = iter(range(10**9))

    def make_run() -> object:
        nonlocal bench, flush
        bench, flush = Bench(clock=lambda: next(ticks) * BURST_S), Reply()
        bench.post(ReserveSlots(1, (run(A[:2]),)), BlocksFilled(1, 0, (0, 1), ()), match(10**9), Flush(flush))
        bench.post(NodesChanged(TestRing(names=("n9",))), match(10**9, sequence=2), match(0, sequence=3))
        bench.sender.close()
        return bench.manager.run()

    async def check(nth: int) -> None:
        bench.core.check()
        slots = bench.core.statistics().slots
        assert slots[State.FREE] + slots[State.READY] + slots[State.FILLING] == bench.core.statistics().usable
        assert not flush.is_open, "somebody waits for ever"

    assert await cancel_at_every_checkpoint(make_run, check) > 3  # type: ignore[arg-type]
