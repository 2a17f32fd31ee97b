"""What every `L2Node` does, the fake included: the same tests for all, against real servers where there are any."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import anyio
import pytest
from anyio.lowlevel import checkpoint
from tests.contracts.rigs import SLACK_S, Rig, are_right, empty, eventually, full, is_painted, opened, paint, serves, soon, timed, value_of

from kvoffload.l2.infinistore_rdma import InfiniStoreRdmaNode
from kvoffload.l2.node import Item, L2Node, NodeUnreachable, Outcome
from kvoffload.testing.cancel import cancel_at_every_checkpoint

pytestmark = pytest.mark.asyncio

MIB = 1 << 20
BROKEN = {Outcome.FAILED, Outcome.LATE, Outcome.UNSETTLED}


def names(count: int, prefix: str = "kvo1:test") -> list[str]:
    return [f"{prefix}:{index:04}:r0" for index in range(count)]


async def stored(node: L2Node, wanted: Sequence[str], size: int) -> None:
    assert await node.write(full(wanted, size), soon()) == [Outcome.DONE] * len(wanted)


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(("count", "size"), [(1, 1), (1, 100), (7, 4096), (100, 65_600), (1, MIB + 64), (7, MIB), (2, 9 * MIB + 1)])
async def test_what_is_written_is_found_and_read(rig: Rig, count: int, size: int) -> None:
    async with opened(rig, 2) as (writer, reader):
        await stored(writer, names(count), size)
        assert await reader.find(names(count), soon()) == [True] * count
        items = empty(names(count), size)
        assert await reader.read(items, soon()) == [Outcome.DONE] * count
        assert are_right(items, [Outcome.DONE] * count)


async def test_nothing_is_asked_for(rig: Rig) -> None:
    async with opened(rig) as (node,):
        assert await node.find([], soon()) == []
        assert await node.read([], soon()) == []
        assert await node.write([], soon()) == []


async def test_what_is_not_there_is_absent(rig: Rig) -> None:
    async with opened(rig) as (node,):
        await stored(node, names(20)[::2], 3000)
        items = empty(names(20), 3000)
        outcomes = await node.read(items, soon())
        assert outcomes == [Outcome.DONE, Outcome.ABSENT] * 10
        assert are_right(items, outcomes)


async def test_find_sees_the_holes(rig: Rig) -> None:
    async with opened(rig) as (node,):
        wanted = names(250)
        await stored(node, wanted[::3], 100)
        assert await node.find(wanted, soon()) == [index % 3 == 0 for index in range(250)]


async def test_the_first_value_stays(rig: Rig) -> None:
    async with opened(rig, 2) as (first, second):
        await stored(first, names(3), 5000)
        others = empty(names(3), 5000)
        paint(others)
        assert await second.write(others, soon()) == [Outcome.DONE] * 3
        for node in (first, second):
            items = empty(names(3), 5000)
            assert await node.read(items, soon()) == [Outcome.DONE] * 3
            assert are_right(items, [Outcome.DONE] * 3)


async def test_what_is_discarded_is_not_there_and_is_written_again(rig: Rig) -> None:
    """Over RDMA it stays."""
    async with opened(rig, 2) as (first, second):
        await stored(first, names(3), 5000)
        await second.discard([names(3)[1], "kvo1:test:nobody wrote this:r0"], soon())
        is_gone = [False, True, False] if not isinstance(second, InfiniStoreRdmaNode) else [False] * 3
        for node in (first, second):
            assert await node.find(names(3), soon()) == [not gone for gone in is_gone]
            expected = [Outcome.ABSENT if gone else Outcome.DONE for gone in is_gone]
            assert await node.read(empty(names(3), 5000), soon()) == expected
        await stored(first, names(3), 5000)
        items = empty(names(3), 5000)
        assert await second.read(items, soon()) == [Outcome.DONE] * 3
        assert are_right(items, [Outcome.DONE] * 3)
        await second.discard([], soon())
        await second.discard(names(3), soon() - 100)
        assert await first.find(names(3), soon()) == [True] * 3, "there was no time"


@pytest.mark.parametrize("other", [1, 4999, 5001, 100_000])
async def test_a_value_of_another_length_is_malformed_and_no_harm_to_its_neighbours(rig: Rig, other: int) -> None:
    async with opened(rig, connections=1) as (node,):
        wanted = names(5)
        await stored(node, wanted, 5000)
        await stored(node, ["other"], other)
        items = [*empty(wanted[:2], 5000), *empty(["other"], 5000), *empty(wanted[2:], 5000)]
        outcomes = await node.read(items, soon())
        assert outcomes == [Outcome.DONE, Outcome.DONE, Outcome.MALFORMED, Outcome.DONE, Outcome.DONE, Outcome.DONE]
        assert are_right(items, outcomes)
        assert await serves(node, "more")


async def test_many_calls_at_once(rig: Rig) -> None:
    async with opened(rig) as (node,):

        async def one(index: int) -> None:
            wanted = names(5, f"call {index}")
            await stored(node, wanted, 20_000)
            items = empty(wanted, 20_000)
            outcomes = await node.read(items, soon())
            assert outcomes == [Outcome.DONE] * 5
            assert are_right(items, outcomes)
            assert await node.find(wanted, soon()) == [True] * 5

        async with anyio.create_task_group() as group:
            for index in range(20):
                group.start_soon(one, index)


async def test_two_clients_write_and_read_the_same_names_at_once(rig: Rig) -> None:
    async with opened(rig, 3) as nodes:
        wanted, size = names(6), 200_000

        async def write(node: L2Node) -> None:
            for _ in range(3):
                for name in wanted:
                    assert await node.write(full([name], size), soon()) == [Outcome.DONE]

        async def read(node: L2Node) -> None:
            for _ in range(15):
                items = empty(wanted, size)
                outcomes = await node.read(items, soon())
                assert set(outcomes) <= {Outcome.DONE, Outcome.ABSENT}
                assert are_right(items, outcomes)

        async with anyio.create_task_group() as group:
            for node in nodes:
                group.start_soon(write, node)
                group.start_soon(read, node)
        items = empty(wanted, size)
        assert await nodes[0].read(items, soon()) == [Outcome.DONE] * len(wanted)
        assert are_right(items, [Outcome.DONE] * len(wanted))


# ---------------------------------------------------------------- deadlines


async def test_a_deadline_in_the_past(rig: Rig) -> None:
    async with opened(rig) as (node,):
        await stored(node, names(3), 1000)
        past = time.monotonic() - 1
        assert await node.find(names(3), past) is None
        items = empty(names(3), 1000)
        assert set(await node.read(items, past)) <= BROKEN
        written = full(["new"], 1000)
        assert set(await node.write(written, past)) <= BROKEN
        await node.settle()
        with pytest.raises(NodeUnreachable):
            await node.ping(past)
        assert await serves(node, "more")


@pytest.mark.parametrize("connected", [True, False])
async def test_a_frozen_server_costs_the_deadline_and_no_more(mortal: Rig, connected: bool) -> None:
    async with opened(mortal) as (node,):
        if connected:
            await stored(node, names(4), 100_000)
        mortal.freeze()
        wrote: list[Item] = []
        read: list[Item] = []
        for deadline_s in (0.02, 0.2):
            wrote, read = full(names(4, f"after {deadline_s}"), MIB), empty(names(4), 100_000)
            calls = (
                node.find(names(4), soon(deadline_s)),
                node.read(read, soon(deadline_s)),
                node.write(wrote, soon(deadline_s)),
            )
            async with asyncio.timeout(deadline_s + SLACK_S):
                found, reads, writes = await asyncio.gather(*calls)
            assert found is None
            assert set(reads) | set(writes) <= BROKEN
            async with asyncio.timeout(deadline_s + SLACK_S):
                with pytest.raises(NodeUnreachable):
                    await node.ping(soon(deadline_s))
            await node.settle()
            paint([*wrote, *read])
        mortal.thaw()
        assert await serves(node, "more")
        assert is_painted([*wrote, *read])


async def test_what_did_not_arrive_in_time_is_late_and_the_next_call_is_not_confused(rig: Rig) -> None:
    """Deadlines so short that they come anywhere in the middle."""
    async with opened(rig, connections=2) as (node,):
        await stored(node, names(8), MIB)
        for index in range(12):
            items = empty(names(8), MIB)
            outcomes = await node.read(items, soon(index * 0.0008))
            assert are_right(items, outcomes)
            assert set(outcomes) <= BROKEN | {Outcome.DONE}
            await node.settle()
            paint(items)
            others = empty(names(8)[index % 8 :][:2], MIB)
            outcomes = await node.read(others, soon())
            assert set(outcomes) == {Outcome.DONE}
            assert are_right(others, outcomes)
            assert is_painted(items)


# ---------------------------------------------------------------- cancellation


@pytest.mark.parametrize("by", ["anyio", "asyncio"])
async def test_a_cancelled_read_leaves_the_buffers_and_the_next_read_alone(rig: Rig, by: str) -> None:
    async with opened(rig, connections=2) as (node,):
        await stored(node, names(8), MIB)
        for index in range(12):
            items = empty(names(8), MIB)
            await cancelled_after(node.read(items, soon()), index * 0.0008, by)
            paint(items)
            others = empty(names(8)[index % 8 :][:2], MIB)
            outcomes = await node.read(others, soon())
            assert outcomes == [Outcome.DONE] * len(others)
            assert are_right(others, outcomes)
            assert is_painted(items)


@pytest.mark.parametrize("by", ["anyio", "asyncio"])
async def test_a_cancelled_write_stores_a_whole_value_or_none(rig: Rig, by: str) -> None:
    async with opened(rig, 2, connections=2) as (node, reader):
        for index in range(12):
            wanted = names(4, f"round {index}")
            items = full(wanted, MIB)
            await cancelled_after(node.write(items, soon()), index * 0.0008, by)
            paint(items)
            for client in (reader, node):
                back = empty(wanted, MIB)
                outcomes = await client.read(back, soon())
                assert set(outcomes) <= {Outcome.DONE, Outcome.ABSENT}
                assert are_right(back, outcomes)
            assert is_painted(items)
        assert await serves(node, "more")


@pytest.mark.parametrize("what", ["find", "read", "write", "ping"])
async def test_cancelled_at_every_checkpoint(rig: Rig, what: str) -> None:
    async with opened(rig) as (node,):
        await stored(node, names(3), 70_000)
        used: list[Item] = []

        async def run() -> None:
            used[:] = empty(names(3), 70_000) if what == "read" else full(names(3, f"new {len(used)}"), 70_000)
            match what:
                case "find":
                    assert await node.find(names(3), soon()) == [True] * 3
                case "ping":
                    assert await node.ping(soon()) >= 0
                case "read":
                    assert await node.read(used, soon()) == [Outcome.DONE] * 3
                case _:
                    assert await node.write(used, soon()) == [Outcome.DONE] * 3

        async def check(nth: int) -> None:
            paint(used)
            assert await serves(node, f"after {what} {nth}")
            assert is_painted(used)

        assert await cancel_at_every_checkpoint(run, check) >= 1


@pytest.mark.parametrize("what", ["read", "write"])
async def test_cancelled_while_the_server_is_frozen(mortal: Rig, what: str) -> None:
    """The bytes are on their way in neither direction, and would go on when it thaws."""
    async with opened(mortal, 2) as (node, reader):
        await stored(node, names(4), MIB)
        mortal.freeze()
        items = empty(names(4), MIB) if what == "read" else full(names(4, "new"), MIB)
        call = node.read(items, soon()) if what == "read" else node.write(items, soon())
        assert await timed(cancelled_after(call, 0.05, "anyio")) < 0.05 + SLACK_S
        paint(items)
        mortal.thaw()
        assert await serves(node, "more")
        back = empty(names(4, "new"), MIB)
        outcomes = await reader.read(back, soon())
        assert are_right(back, outcomes)
        assert is_painted(items)


async def cancelled_after(call: object, seconds: float, by: str) -> None:
    """The call, ended after so long by one cancellation or the other, unless it ended before."""

    async def run() -> None:
        await call  # type: ignore[misc]

    if by == "anyio":
        with anyio.move_on_after(seconds):
            await run()
        return
    task = asyncio.ensure_future(run())
    await asyncio.wait([task], timeout=seconds)
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()


# ---------------------------------------------------------------- servers that die


@pytest.mark.parametrize("what", ["find", "read", "write"])
async def test_the_server_dies_in_the_middle_and_service_resumes(mortal: Rig, what: str) -> None:
    async with opened(mortal) as (node,):
        for delay_s in (0.0, 0.003):
            await stored(node, names(6), 2 * MIB)
            results: list[bool] = []

            async def work(results: list[bool] = results) -> None:
                for index in range(400):
                    items = empty(names(6), 2 * MIB) if what == "read" else full(names(6, f"{index}"), 2 * MIB)
                    if what == "find":
                        good = await node.find(names(6), soon()) is not None
                    else:
                        outcomes = await (node.read if what == "read" else node.write)(items, soon())
                        assert set(outcomes) <= BROKEN | {Outcome.DONE, Outcome.ABSENT}
                        assert are_right(items, outcomes)
                        good = set(outcomes) == {Outcome.DONE}
                    results.append(good)
                    if not good:
                        return
                    await checkpoint()

            async with anyio.create_task_group() as group:
                group.start_soon(work)
                assert await eventually(lambda results=results: len(results) >= 1)  # type: ignore[misc]
                await anyio.sleep(delay_s)
                mortal.kill()
            assert results[-1] is False
            async with asyncio.timeout(5.0 + SLACK_S):
                assert await node.find(names(6), soon(5.0)) is None
                with pytest.raises(NodeUnreachable):
                    await node.ping(soon(5.0))
            mortal.restart()
            assert await serves(node, "more")
            assert await node.find(names(6), soon()) == [False] * 6


async def test_a_restart_while_nothing_is_asked_goes_unnoticed(mortal: Rig) -> None:
    """Every connection is stale then; that must not cost a call."""
    async with opened(mortal) as (node,):
        await stored(node, names(30), 1000)
        mortal.restart()
        assert await node.find(names(30), soon()) == [False] * 30
        await stored(node, names(30), 1000)


# ---------------------------------------------------------------- ping, close


@pytest.mark.parametrize("is_idle", [True, False])
async def test_it_tells_that_a_connection_took_the_place_of_one_that_was_lost(mortal: Rig, is_idle: bool) -> None:
    """So that whoever counts on what the node has looks again. (An idle one finds out when it is next used.)"""
    async with opened(mortal) as (node,):
        await stored(node, names(3), 5000)
        for _ in range(3):
            assert await node.find(names(3), soon()) == [True] * 3
        assert node.renewals == 0
        mortal.kill()
        if not is_idle:
            assert await node.find(names(3), soon(0.5)) is None  # and tries again a moment later
        mortal.restart()
        assert await serves(node, "again")
        if not isinstance(node, InfiniStoreRdmaNode):
            assert node.renewals >= 1
        before = node.renewals
        assert await serves(node, "once more")
        assert node.renewals <= before + 2, "of other connections at most"


async def test_ping(rig: Rig) -> None:
    async with opened(rig) as (node,):
        assert 0 <= await node.ping(soon()) < 10
        assert 0 <= await node.ping(soon()) < 10


async def test_a_ping_that_fails_says_of_what(mortal: Rig) -> None:
    async with opened(mortal) as (node,):
        await node.ping(soon())
        mortal.freeze()
        with pytest.raises(NodeUnreachable, match=mortal.where):
            await node.ping(soon(0.1))
        mortal.thaw()
        mortal.kill()
        with pytest.raises(NodeUnreachable, match=mortal.where):
            await node.ping(soon())


async def test_calls_that_run_fail_when_it_is_closed(mortal: Rig) -> None:
    async with opened(mortal) as (node,):
        await stored(node, names(3), MIB)
        mortal.freeze()
        read, wrote = empty(names(3), MIB), full(names(3, "new"), MIB)
        calls = [
            asyncio.ensure_future(node.find(names(3), soon())),
            asyncio.ensure_future(node.read(read, soon())),
            asyncio.ensure_future(node.write(wrote, soon())),
            asyncio.ensure_future(node.ping(soon())),
        ]
        await asyncio.wait(calls, timeout=0.1)
        assert not any(call.done() for call in calls)
        async with asyncio.timeout(SLACK_S):
            await node.close()
            found, reads, writes, ping = await asyncio.gather(*calls, return_exceptions=True)
        paint([*read, *wrote])
        assert found is None
        assert reads == writes == [Outcome.FAILED] * 3
        assert isinstance(ping, NodeUnreachable)
        mortal.thaw()
        await anyio.sleep(0.05)  # for whatever might still come
        assert is_painted([*read, *wrote])


async def test_closed_twice_and_never_used(rig: Rig) -> None:
    async with opened(rig, 2) as (node, unused):
        await stored(node, names(1), 100)
        await node.close()
        await node.close()
        await unused.close()
        assert await node.find(names(1), soon()) is None
        assert await node.read(empty(names(1), 100), soon()) == [Outcome.FAILED]
        assert await node.write(full(names(1), 100), soon()) == [Outcome.FAILED]
        await node.settle()
        with pytest.raises(NodeUnreachable):
            await node.ping(soon())


async def test_what_it_is_called(rig: Rig) -> None:
    async with opened(rig) as (node,):
        assert node.name in ("n", "fake")
        assert value_of("a", 10) != value_of("b", 10)  # or the tests above would prove nothing
