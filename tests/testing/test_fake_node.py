"""The handles of the fake node; what it has in common with all nodes is in tests/contracts."""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import pytest

from kvoffload.errors import MisuseError
from kvoffload.l2.node import Item, L2Node, NodeUnreachable, Outcome
from kvoffload.testing.fake_node import FakeNode, FakeStore, InjectedNodeCrash, NodeFault

pytestmark = pytest.mark.anyio

DONE, FAILED, LATE, ABSENT = Outcome.DONE, Outcome.FAILED, Outcome.LATE, Outcome.ABSENT
NAMES = ("a", "b", "c")


def make(**options: object) -> FakeNode:
    return FakeNode("n", clock=anyio.current_time, **options)  # type: ignore[arg-type]


def soon(seconds: float = 1.0) -> float:
    return anyio.current_time() + seconds


def items(fill: bytes | None = None, names: Sequence[str] = NAMES, size: int = 1000) -> list[Item]:
    """Each value is its name over and over, or this byte."""
    return [Item(name, memoryview(bytearray((fill or name.encode()) * size))) for name in names]


def blank() -> list[Item]:
    return items(b"\0")


def texts(read: Sequence[Item]) -> list[bytes]:
    return [bytes(item.buffer) for item in read]


async def test_it_is_a_node() -> None:
    node: L2Node = make()
    assert node.name == "n"
    assert await node.write(items(), soon()) == [DONE] * 3
    read = blank()
    assert await node.read(read, soon()) == [DONE] * 3
    assert texts(read) == texts(items())
    assert await node.find(["a", "x"], soon()) == [True, False]


async def test_latency_and_bandwidth_are_the_clock_s() -> None:
    node = make(latency_s=2.0, bytes_per_s=1000.0)
    started = anyio.current_time()
    await node.write(items(), soon(60))
    assert anyio.current_time() - started == pytest.approx(5.0)
    assert await node.ping(soon(60)) == pytest.approx(2.0)


async def test_what_arrived_before_the_deadline_is_done() -> None:
    node = make(bytes_per_s=1000.0)
    await node.write(items(), soon(60))
    started, read = anyio.current_time(), blank()
    assert await node.read(read, soon(2.5)) == [DONE, DONE, LATE]
    assert anyio.current_time() - started == pytest.approx(2.5)
    assert texts(read)[2] == b"\0" * 1000


async def test_a_seed_gives_the_same_latencies() -> None:
    async def latencies(seed: int) -> list[float]:
        node = make(latency_s=(0.1, 0.2), seed=seed)
        return [round(await node.ping(soon()), 9) for _ in range(5)]

    first = await latencies(1)
    assert first == await latencies(1)
    assert first != await latencies(2)
    assert all(0.1 <= latency <= 0.2 for latency in first)


async def test_held_calls_wait_until_they_are_released() -> None:
    node = make()
    await node.write(items(), soon())
    node.hold("read")
    results: list[list[Outcome]] = []

    async def read() -> None:
        results.append(await node.read(blank(), soon(60)))

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        group.start_soon(read)
        await node.wait_held("read", 2)
        assert await node.find(NAMES, soon()) == [True] * 3
        assert results == []
        node.release()
    assert results == [[DONE] * 3] * 2
    assert node.most_at_once["read"] == 2
    assert (node.count("read"), node.count("write"), node.count("find")) == (2, 1, 1)
    assert node.calls[0].names == NAMES


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        (NodeFault.ERROR, FAILED),
        (NodeFault.REFUSE, FAILED),
        (NodeFault.NEVER, LATE),
        (NodeFault.FULL, Outcome.FULL),
        (NodeFault.ABSENT, ABSENT),
        (NodeFault.MALFORMED, Outcome.MALFORMED),
    ],
)
async def test_faults_that_are_told(fault: NodeFault, outcome: Outcome) -> None:
    node = make(latency_s=0.25)
    await node.write(items(), soon())
    node.fail_next("read", NodeFault.NONE)
    node.fail_next("read", fault)
    read = blank()
    assert await node.read(blank(), soon()) == [DONE] * 3
    started = anyio.current_time()
    assert await node.read(read, soon()) == [outcome] * 3
    assert anyio.current_time() - started == pytest.approx({NodeFault.REFUSE: 0.0, NodeFault.NEVER: 1.0}.get(fault, 0.25))
    assert texts(read) == texts(blank())
    assert await node.read(read, soon()) == [DONE] * 3


async def test_faults_of_finds_and_pings() -> None:
    node = make()
    await node.write(items(), soon())
    for fault in (NodeFault.ERROR, NodeFault.REFUSE, NodeFault.NEVER):
        node.fail_next("find", fault)
        node.fail_next("ping", fault)
        assert await node.find(NAMES, soon()) is None
        with pytest.raises(NodeUnreachable):
            await node.ping(soon())
    node.fail_always("find", NodeFault.ABSENT)
    assert await node.find(NAMES, soon()) == [False] * 3
    node.fail_always("find", NodeFault.NONE)
    assert await node.find(NAMES, soon()) == [True] * 3


async def test_lies_of_reads() -> None:
    node = make(seed=3)
    await node.write(items(), soon())
    for fault in (NodeFault.OTHER_KEY, NodeFault.TRUNCATED, NodeFault.FLIPPED):
        node.fail_name("read", "b", fault)
        read = blank()
        assert await node.read(read, soon()) == [DONE] * 3
        first, lie, last = texts(read)
        assert (first, last) == (b"a" * 1000, b"c" * 1000)
        match fault:
            case NodeFault.OTHER_KEY:
                assert lie in (first, last)
            case NodeFault.TRUNCATED:
                assert lie == b"b" * 500 + b"\0" * 500
            case _:
                wrong = int.from_bytes(lie) ^ int.from_bytes(b"b" * 1000)
                assert wrong.bit_count() == 1
    node.fail_name("read", "b", NodeFault.NONE)
    read = blank()
    await node.read(read, soon())
    assert texts(read) == texts(items())


async def test_lies_of_writes() -> None:
    node = make()
    node.fail_name("write", "a", NodeFault.HALF_WRITTEN)
    node.fail_name("write", "b", NodeFault.LOST)
    assert await node.write(items(), soon()) == [FAILED, DONE, DONE]
    read = blank()
    assert await node.read(read, soon()) == [DONE, ABSENT, DONE]
    assert texts(read)[0] == b"a" * 500 + b"\0" * 500


async def test_a_store_has_room_for_so_much() -> None:
    node = make(store=FakeStore(capacity_bytes=2500))
    assert await node.write(items(), soon()) == [DONE, DONE, Outcome.FULL]
    assert await node.write(items(), soon()) == [DONE, DONE, Outcome.FULL]
    assert node.store.used_bytes == 2000


async def test_a_crash_is_an_exception() -> None:
    node = make()
    node.fail_next("read", NodeFault.RAISE)
    with pytest.raises(InjectedNodeCrash):
        await node.read(blank(), soon())


@pytest.mark.parametrize("kind", ["read", "write"])
async def test_unsettled_buffers_are_touched_until_they_are_settled(kind: str) -> None:
    node = make()
    await node.write(items(), soon())
    node.fail_next("read", NodeFault.UNSETTLED)
    read = blank()
    assert await node.read(read, soon()) == [Outcome.UNSETTLED] * 3
    assert node.unsettled == 3
    assert texts(read) == texts(blank())
    node.scribble()
    scribbled = texts(read)
    assert all(text != b"\0" * 1000 for text in scribbled)
    async with anyio.create_task_group() as group:
        group.start_soon(node.settle)
        await anyio.sleep(100)
        assert node.unsettled == 3
        if kind == "read":
            node.settle_now()
        else:
            await node.close()
    assert (texts(read) != scribbled) == (kind == "read")
    settled = texts(read)
    node.scribble()
    assert texts(read) == settled


async def test_it_settles_by_itself_where_that_was_asked_for() -> None:
    node = make(settle_s=30.0)
    node.fail_next("write", NodeFault.UNSETTLED)
    await node.write(items(), soon())
    started = anyio.current_time()
    await node.settle()
    assert anyio.current_time() - started == pytest.approx(30.0)
    assert node.unsettled == 0
    await node.settle()


async def test_a_frozen_store_answers_when_it_thaws() -> None:
    node = make(latency_s=1.0)
    node.store.freeze()
    assert await node.find(NAMES, soon(5.0)) is None
    async with anyio.create_task_group() as group:

        async def thaw() -> None:
            await anyio.sleep(10)
            node.store.thaw()

        group.start_soon(thaw)
        assert await node.ping(soon(60)) == pytest.approx(11.0)


async def test_no_call_outlives_its_store() -> None:
    node = make(latency_s=10.0)
    async with anyio.create_task_group() as group:

        async def restart() -> None:
            await anyio.sleep(1)
            node.store.restart()

        group.start_soon(restart)
        started = anyio.current_time()
        assert await node.write(items(), soon(60)) == [FAILED] * 3
        assert anyio.current_time() - started == pytest.approx(1.0)
    assert await node.write(items(), soon(60)) == [DONE] * 3


async def test_misuse() -> None:
    with pytest.raises(MisuseError, match="whole call"):
        make().fail_name("read", "a", NodeFault.NEVER)
