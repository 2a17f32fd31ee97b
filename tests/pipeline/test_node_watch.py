"""What watches a node: probes in nobody's time, and what the log says of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from kvoffload.l2.breaker import BreakerState
from kvoffload.l2.node import Outcome
from kvoffload.l2.node_breakers import ReadsBreaker, TellingBreaker
from kvoffload.runtime.node_watch import LOOK_S, PING_S, READS, RENEWED_S, TOLD_S, WRITES, NodeLog, NodeWatch
from kvoffload.testing.fake_node import FakeNode, NodeFault

CLOSED = BreakerState.CLOSED


class Watched:
    """A node that is watched, in virtual time."""

    def __init__(self) -> None:
        self.node = FakeNode("kv-0", latency_s=0.001, clock=anyio.current_time)
        self.reading = ReadsBreaker(chance=lambda: 0.5)
        self.writing = TellingBreaker(chance=lambda: 0.5)
        self.back: list[float] = []
        self.watch = NodeWatch(
            self.node, self.reading, self.writing, lambda: self.back.append(anyio.current_time()), clock=anyio.current_time
        )

    async def read(self, outcome: Outcome, seconds: float = 0.05) -> None:
        begun = anyio.current_time()
        await anyio.sleep(seconds)
        self.reading.record(outcome, anyio.current_time() - begun, anyio.current_time())

    async def until_used_again(self) -> float:
        """How long that takes; to a ms."""
        begun = anyio.current_time()
        while self.reading.state is not CLOSED:  # noqa: ASYNC110  (nobody tells of doubts)
            await anyio.sleep(0.001)
        return anyio.current_time() - begun


@asynccontextmanager
async def watched() -> AsyncIterator[Watched]:
    rig = Watched()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.watch.run)
        await anyio.sleep(0.1)
        yield rig
        tasks.cancel_scope.cancel()


@pytest.mark.anyio
async def test_a_first_timeout_brings_a_ping_at_once(caplog: pytest.LogCaptureFixture) -> None:
    async with watched() as rig:
        for _ in range(10):
            await rig.read(Outcome.LATE)
            assert await rig.until_used_again() < 0.01
            for _ in range(10):
                await rig.read(Outcome.DONE, 0.001)
        assert rig.node.count("ping") == 10
        assert not rig.back
        assert not caplog.records


@pytest.mark.anyio
async def test_connections_that_were_lost_unnoticed_are_told_of_once_a_minute() -> None:
    async with watched() as rig:
        await anyio.sleep(100)
        assert not rig.back
        rig.node.store.restart()
        await anyio.sleep(2 * LOOK_S)
        assert len(rig.back) == 1
        rig.node.store.restart()
        rig.node.store.restart()
        await anyio.sleep(RENEWED_S / 2)
        assert len(rig.back) == 1
        await anyio.sleep(RENEWED_S)
        assert len(rig.back) == 2
        await anyio.sleep(10 * RENEWED_S)
        assert len(rig.back) == 2


@pytest.mark.anyio
async def test_one_that_is_left_alone_is_told_of_when_it_is_used_again_and_not_before() -> None:
    async with watched() as rig:
        rig.node.store.kill()
        for _ in range(6):
            await rig.read(Outcome.FAILED)
        assert rig.reading.state is not CLOSED
        await anyio.sleep(5)
        assert not rig.back
        rig.node.store.restart()
        await rig.until_used_again()
        await anyio.sleep(10)
        assert len(rig.back) == 1


@pytest.mark.anyio
async def test_one_that_is_frozen_is_probed_in_nobodys_time_and_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    async with watched() as rig:
        rig.node.store.freeze()
        await rig.read(Outcome.LATE)
        await anyio.sleep(30)
        assert not rig.reading.allow(anyio.current_time())
        assert 3 <= rig.node.count("ping") <= 6
        [line] = caplog.messages
        assert "node left alone" in line
        assert "node=kv-0" in line
        assert READS in line
        assert "the probe failed" in line
        assert "is it frozen" in line
        assert "tried_again_in_s=0.5" in line
        rig.node.store.thaw()
        assert await rig.until_used_again() < 30
        assert len(rig.back) == 1
        assert "node used again" in caplog.messages[-1]
        assert len(caplog.messages) == 2


@pytest.mark.anyio
async def test_a_client_whose_ping_has_a_bug_is_probed_again(caplog: pytest.LogCaptureFixture) -> None:
    async with watched() as rig:
        rig.node.fail_next("ping", NodeFault.RAISE, calls=2)
        await rig.read(Outcome.LATE)
        assert 0.4 < await rig.until_used_again() < 5 + LOOK_S + PING_S
        assert "InjectedNodeCrash" in caplog.text
        assert len(rig.back) == 1


@pytest.mark.anyio
async def test_writes_of_a_full_node_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    async with watched() as rig:
        rig.writing.record(Outcome.FULL, 0.01, anyio.current_time())
        assert WRITES in caplog.text
        assert "the node is full" in caplog.text
        assert "tried_again_in_s=10.0" in caplog.text
        await anyio.sleep(11)
        assert rig.writing.allow(anyio.current_time())
        begun = anyio.current_time()
        await anyio.sleep(0.1)
        rig.writing.record(Outcome.DONE, 0.1, begun + 0.1)
        assert len(rig.back) == 1
        assert len(caplog.messages) == 2


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_node_that_comes_and_goes_is_told_of_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    log = NodeLog("kv-0", clock)
    for _ in range(10 * int(TOLD_S)):
        log.left_alone(READS, "5 errors in a row", 0.5)
        log.left_alone(WRITES, "the node is full", 10.0)
        log.used_again(READS)
        log.used_again(WRITES)
        clock.now += 1
    assert caplog.text.count("node left alone") == 10
    assert caplog.text.count("node used again") == 10


def test_one_that_goes_for_good_right_after_it_came_back_is_told_of_as_well(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    log = NodeLog("kv-0", clock)
    log.left_alone(READS, "5 errors in a row", 0.5)
    log.used_again(READS)
    for _ in range(10):  # each time that a probe fails
        clock.now += 30
        log.left_alone(READS, "the probe failed (FAILED)", 30.0)
    assert ["left alone" in line for line in caplog.messages] == [True, False, True]
