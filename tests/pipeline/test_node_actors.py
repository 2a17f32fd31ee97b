"""What keeps a node's actors: those that crash, what their ends leave unsettled, and a client whose end fails."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
import pytest

from kvoffload.l2.breaker import BreakerState
from kvoffload.l2.node import Item, Outcome
from kvoffload.l2.remains import Remains, Reports
from kvoffload.l2.ring import NodeAddress
from kvoffload.mailbox import EndOfMailbox, Receiver
from kvoffload.messages import FetchFinished, FindBlocks, FromL2, ToL2Prefetcher, ToL2Writer, TransfersSettled, WriteFinished
from kvoffload.runtime.node_actors import RESTARTS, RETRY_S, Life, NodeActors, NodeParts, NodeState, Runs
from kvoffload.testing.fake_node import FakeNode, NodeFault


class Actor:
    """Ends as it is told; ``at_end`` comes before that, when it is cancelled too."""

    def __init__(self, receiver: Receiver[ToL2Prefetcher] | Receiver[ToL2Writer], at_end: Callable[[], None] = lambda: None) -> None:
        self.receiver = receiver
        self.at_end = at_end
        self.crash = anyio.Event()

    async def run(self) -> None:
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._until_left, tasks.cancel_scope)
                await self.crash.wait()
                raise ZeroDivisionError("a bug")
        finally:
            self.at_end()

    async def _until_left(self, scope: anyio.CancelScope) -> None:
        try:
            while True:
                await self.receiver.receive_burst()
        except EndOfMailbox:
            scope.cancel()


class Rig:
    """A node whose actors' ends are the test's; ``at_end`` gets where its prefetcher, or writer, reports to."""

    def __init__(self, node: FakeNode | None = None, at_end: Callable[[str, Reports], None] = lambda who, report: None) -> None:
        self.node = node or FakeNode("n")
        self.at_end = at_end
        self.state = NodeState()
        self.reported: list[FromL2] = []
        self.cleared: list[tuple[int, ...]] = []
        self.back = 0
        self.lives: dict[str, list[Actor]] = {"p": [], "w": []}
        self.prefetcher: Life[ToL2Prefetcher] = Life("p", lambda receiver, report: self.make("p", receiver, report), self.reported.append)
        self.writer: Life[ToL2Writer] = Life("w", lambda receiver, report: self.make("w", receiver, report), self.reported.append)
        remains = Remains(self.node, "n", self.reported.append, self.cleared.append)
        parts = NodeParts(NodeAddress("n", "redis://n"), self.node, self.state, self.prefetcher, self.writer, remains)
        self.actors = NodeActors(parts, self.count_back)

    def make(self, who: str, receiver: Receiver[ToL2Prefetcher] | Receiver[ToL2Writer], report: Reports) -> Runs:
        self.lives[who].append(Actor(receiver, lambda: self.at_end(who, report)))
        return self.lives[who][-1]

    def count_back(self) -> None:
        self.back += 1

    async def crash(self, who: str) -> None:
        """And wait for the next life, for as long as that takes."""
        lives = len(self.lives[who])
        self.lives[who][-1].crash.set()
        while len(self.lives[who]) == lives:  # noqa: ASYNC110  (nobody tells)
            await anyio.sleep(0.1)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.actors.run)
            await anyio.sleep(0.01)
            yield
            tasks.cancel_scope.cancel()


@pytest.mark.anyio
@pytest.mark.real_clock
async def test_a_node_that_is_left_alone_is_probed_and_used_again() -> None:
    rig = Rig()
    async with rig.running():
        for _ in range(5):
            rig.state.reading.record(Outcome.FAILED, 0.0, time.monotonic())
        assert rig.state.reading.state is BreakerState.OPEN
        with anyio.fail_after(10):
            while not rig.state.reading.allow(time.monotonic()):  # noqa: ASYNC110  (nobody tells)
                await anyio.sleep(0.01)
        assert rig.back == 1


@pytest.mark.anyio
@pytest.mark.parametrize("who", ["p", "w"])
async def test_an_actor_that_crashed_too_often_is_tried_again_in_a_minute(who: str, caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    find = FindBlocks(1, (b"k" * 24,), 1e9)
    async with rig.running():
        for _ in range(RESTARTS):
            await rig.crash(who)
            assert not rig.actors.is_out
        begun = anyio.current_time()
        rig.lives[who][-1].crash.set()
        await anyio.sleep(1)
        assert rig.actors.is_out
        assert rig.prefetcher.offer(find) == (who == "w"), "the other one goes on"
        assert not rig.back
        await rig.crash(who)
        assert 0.7 * RETRY_S < anyio.current_time() - begun < 1.3 * RETRY_S
        assert rig.prefetcher.offer(find)
        assert not rig.actors.is_out
        assert rig.back == 1, "L1 offers again what it was not given meanwhile"
        begun = anyio.current_time()
        await rig.crash(who)
        assert anyio.current_time() - begun > 0.7 * RETRY_S, "one crash a minute from then on"
        assert rig.back == 2
    assert caplog.text.count("node out") == 2
    assert caplog.text.count("node tried again") == 2


@pytest.mark.anyio
async def test_one_that_leaves_while_it_is_given_up_ends() -> None:
    rig = Rig()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.actors.run)
        await anyio.sleep(0.01)
        for _ in range(RESTARTS):
            await rig.crash("p")
        rig.lives["p"][-1].crash.set()
        await anyio.sleep(1)
        rig.actors.leave()
        begun = anyio.current_time()
    assert anyio.current_time() - begun < 2 * RETRY_S
    assert len(rig.lives["p"]) == RESTARTS + 1
    assert not rig.back


def leave_unsettled(who: str, report: Reports) -> None:
    if who == "p":
        report(FetchFinished(7, "n", (), (), (), unsettled=(1, 2)))
    else:
        report(WriteFinished(8, "n", (), (), unsettled=(3,)))


async def unsettle(node: FakeNode) -> None:
    node.fail_next("read", NodeFault.UNSETTLED)
    assert await node.read([Item("x", memoryview(bytearray(8)))], time.monotonic() + 5) == [Outcome.UNSETTLED]


SETTLED = [TransfersSettled(7, "n", (1, 2)), TransfersSettled(8, "n", (3,))]


@pytest.mark.anyio
async def test_what_a_crash_left_unsettled_is_settled_when_the_node_says_so() -> None:
    rig = Rig(at_end=leave_unsettled)
    await unsettle(rig.node)
    async with rig.running():
        await rig.crash("p")
        await anyio.sleep(30)
        assert rig.reported == [FetchFinished(7, "n", (), (), (), unsettled=(1, 2))]
        assert not rig.cleared
        rig.node.settle_now()
        await anyio.sleep(0.01)
        assert rig.reported[1:] == SETTLED[:1]
        assert rig.cleared == [(1, 2)]
        rig.at_end = lambda who, report: None


@pytest.mark.anyio
async def test_what_actors_left_unsettled_is_settled_once_the_client_is_closed() -> None:
    rig = Rig(at_end=leave_unsettled)
    await unsettle(rig.node)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.actors.run)
        await anyio.sleep(0.01)
        rig.actors.leave()
    assert sorted(rig.reported[2:], key=str) == sorted(SETTLED, key=str)


class Slow(FakeNode):
    """Cannot be closed before it lets go."""

    def __init__(self) -> None:
        super().__init__("n")
        self.lets_go = anyio.Event()

    async def close(self) -> None:
        await self.lets_go.wait()
        await super().close()


@pytest.mark.anyio
async def test_a_node_that_leaves_may_take_its_time_to_let_go() -> None:
    node = Slow()
    rig = Rig(node, at_end=leave_unsettled)
    await unsettle(node)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.actors.run)
        await anyio.sleep(0.01)
        rig.actors.leave()
        await anyio.sleep(30)
        assert len(rig.reported) == 2
        node.lets_go.set()
    assert len(rig.reported) == 4


@pytest.mark.anyio
async def test_an_engine_that_ends_waits_for_none_and_calls_nothing_settled_that_is_not(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(Slow(), at_end=leave_unsettled)
    await unsettle(rig.node)
    async with rig.running():
        pass
    assert len(rig.reported) == 2
    assert "slots stay out of use" in caplog.text


class Stubborn(FakeNode):
    async def close(self) -> None:
        raise ZeroDivisionError("a bug")


@pytest.mark.anyio
async def test_a_client_that_fails_to_close_ends_nobody_else_and_proves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(Stubborn("n"), at_end=leave_unsettled)
    await unsettle(rig.node)
    async with rig.running():
        await anyio.sleep(0.1)
    assert len(rig.reported) == 2
    assert caplog.text.count("closing a node's client failed") == 1
