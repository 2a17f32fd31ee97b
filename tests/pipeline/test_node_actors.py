"""What keeps a node's actors: probes in nobody's time, and a client whose end fails."""

from __future__ import annotations

import anyio
import pytest

from kvoffload.l2.breaker import BreakerState
from kvoffload.l2.node import Outcome
from kvoffload.l2.ring import NodeAddress
from kvoffload.messages import ToL2Prefetcher, ToL2Writer
from kvoffload.runtime.node_actors import Life, NodeActors, NodeState, ReadsBreaker
from kvoffload.testing.fake_node import FakeNode


def test_one_wait_in_vain_is_enough_and_no_request_is_a_probe() -> None:
    breaker = ReadsBreaker()
    assert breaker.allow(0.0)
    breaker.record(Outcome.LATE, 0.3, 0.3)
    assert breaker.state is BreakerState.OPEN
    assert not any(breaker.allow(now) for now in (0.4, 10.0, 1000.0))
    assert breaker.state is BreakerState.OPEN
    assert breaker.statistics().refused == 3
    assert not breaker.allow_probe(0.4)
    assert breaker.allow_probe(1000.0)
    assert not breaker.allow(1000.1)
    breaker.record(Outcome.DONE, 0.001, 1000.2)
    assert breaker.allow(1000.3)


def test_a_breaker_says_when_its_node_is_used_again_and_only_then() -> None:
    state, back = NodeState(), list[str]()
    state.reading.on_closed = lambda: back.append("reads")
    state.writing.on_closed = lambda: back.append("writes")
    for breaker in (state.reading, state.writing):
        breaker.record(Outcome.DONE, 0.01, 1.0)
    assert not back
    state.reading.record(Outcome.LATE, 1.0, 2.0)
    state.writing.record(Outcome.FULL, 0.01, 2.0)
    assert state.reading.allow_probe(1000.0)
    state.reading.record(Outcome.FAILED, 0.01, 1000.1)
    assert not back
    assert state.reading.allow_probe(2000.0)
    state.reading.record(Outcome.DONE, 0.01, 2000.1)
    assert back == ["reads"]
    assert state.writing.allow(2000.0)
    state.writing.record(Outcome.DONE, 0.01, 2000.1)
    assert back == ["reads", "writes"], "room has come back, which a node that served reads all the time never said"


class Ends:
    """An actor that has nothing to do until it is told to leave."""

    async def run(self) -> None:
        await anyio.sleep_forever()


def actors_of(node: FakeNode) -> NodeActors:
    prefetcher: Life[ToL2Prefetcher] = Life("p", lambda receiver: Ends())
    writer: Life[ToL2Writer] = Life("w", lambda receiver: Ends())
    return NodeActors(NodeAddress("n", "redis://n"), node, NodeState(), prefetcher, writer)


@pytest.mark.anyio
@pytest.mark.real_clock
async def test_a_node_that_is_left_alone_is_probed_and_used_again() -> None:
    actors = actors_of(FakeNode("n"))
    breaker = actors.state.reading
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(actors.run)
        breaker.record(Outcome.LATE, 1.0, 0.0)
        assert breaker.state is BreakerState.OPEN
        with anyio.fail_after(10):
            while not breaker.allow(anyio.current_time()):  # noqa: ASYNC110  (nobody tells)
                await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()


class Stubborn(FakeNode):
    async def close(self) -> None:
        raise ZeroDivisionError("a bug")


@pytest.mark.anyio
async def test_a_client_that_fails_to_close_ends_nobody_else() -> None:
    actors = actors_of(Stubborn("n"))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(actors.run)
        await anyio.sleep(0.1)
        tasks.cancel_scope.cancel()
