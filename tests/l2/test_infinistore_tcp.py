"""The TCP client of InfiniStore: what it leaves on the real server and does to it, and what a server that misbehaves does to it.

What every node must do is in `tests/contracts`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing

import anyio
import pytest
from tests.contracts.rigs import empty, eventually, full, is_painted, open_files, paint, soon, value_of
from tests.infinistore import raw
from tests.infinistore.server import InfiniStoreServer, free_port
from tests.l2.infinistore_liar import answer_of, code, is_value, liar

from kvoffload.envelope import Envelope, Fault
from kvoffload.errors import MisuseError
from kvoffload.l2 import infinistore_wire as wire
from kvoffload.l2.infinistore_tcp import InfiniStoreTcpNode
from kvoffload.l2.node import Item, NodeUnreachable, Outcome, value_name
from kvoffload.l2.values import SlotBuffers, Values, seal
from kvoffload.segment import Segment

pytestmark = pytest.mark.asyncio

MIB = 1 << 20
DONE, ABSENT, FULL, MALFORMED, FAILED, LATE = Outcome.DONE, Outcome.ABSENT, Outcome.FULL, Outcome.MALFORMED, Outcome.FAILED, Outcome.LATE


@asynccontextmanager
async def node_at(port: int, *, connections: int = 1, host: str = "127.0.0.1") -> AsyncIterator[InfiniStoreTcpNode]:
    node = InfiniStoreTcpNode("n", host, port, value_bytes=MIB, connections=connections, connect_timeout_s=0.5)
    try:
        yield node
    finally:
        await node.close()


def lanes() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kvoffload-n-")]


# ---------------------------------------------------------------- what is on the real server


async def test_a_value_is_under_its_nonce_and_a_pointer_under_the_name(infinistore_shared: InfiniStoreServer) -> None:
    async with node_at(infinistore_shared.port) as node:
        assert await node.write(full(["a", "b"], 5000), soon()) == [DONE, DONE]
        assert await node.write(full(["a", "b"], 5000), soon()) == [DONE, DONE]
    assert infinistore_shared.stored() == 4
    with raw.connect(infinistore_shared) as connection:
        for name in ("a", "b"):
            pointer = wire.parse_pointer(raw.value_of(connection, name) or b"")
            assert pointer is not None
            assert pointer.value_bytes == 5000
            assert raw.value_of(connection, wire.value_key(name.encode(), pointer.nonce).decode()) == value_of(name, 5000)


async def test_a_block_whose_value_was_evicted_can_be_written_again(infinistore_shared: InfiniStoreServer) -> None:
    async with node_at(infinistore_shared.port) as node:
        wanted = ["a", "b", "c"]
        assert await node.write(full(wanted, 5000), soon()) == [DONE] * 3
        with raw.connect(infinistore_shared) as connection:
            pointer = wire.parse_pointer(raw.value_of(connection, "b") or b"")
            assert pointer is not None
            connection.sendall(raw.delete([wire.value_key(b"b", pointer.nonce).decode()]))
            assert raw.numbers(connection, 2) == [raw.STORED, 1]
        assert await node.find(wanted, soon()) == [True] * 3
        assert await node.read(empty(wanted, 5000), soon()) == [DONE, ABSENT, DONE]
        assert await node.find(wanted, soon()) == [True, False, True]  # on the same connection, so behind the deletion
        assert await node.write(full(wanted, 5000), soon()) == [DONE] * 3
        items = empty(wanted, 5000)
        assert await node.read(items, soon()) == [DONE] * 3
        assert [bytes(item.buffer) for item in items] == [value_of(name, 5000) for name in wanted]


@pytest.mark.parametrize("size", [4000, 5 * MIB // 2])
async def test_what_came_is_proven_by_the_threads_that_received_it(infinistore_shared: InfiniStoreServer, size: int) -> None:
    slot_bytes = 4096 * (size // 4096 + 1)
    with closing(Segment.create(6 * slot_bytes, slot_bytes)) as segment:
        while segment.populated_slots < 6:
            segment.populate_next()
        envelope, buffers = Envelope(bytes(24), size), SlotBuffers([segment], size)
        keys, slots = [bytes([number]) * 24 for number in range(6)], range(6)
        seal(envelope, buffers, slots, keys)
        segment.slot(2)[3000] ^= 1
        async with node_at(infinistore_shared.port, connections=2) as node:
            await node.write(Values(buffers, "ns", slots, keys, is_writable=False), soon())
            await node.discard([value_name("ns", keys[4], 0)], soon())
            values = Values(buffers, "ns", slots, keys, is_writable=True, envelope=envelope)
            assert await node.read(values, soon()) == [DONE, DONE, DONE, DONE, ABSENT, DONE]
        assert values.proven == bytes([1, 1, 1, 1, 0, 1])
        assert values.faults == {2: Fault.TAG}
        del values


async def test_what_is_discarded_loses_its_pointer(infinistore_shared: InfiniStoreServer) -> None:
    wanted = [str(index) for index in range(600)]
    async with node_at(infinistore_shared.port) as node:
        assert await node.write(full(wanted, 100), soon()) == [DONE] * 600
        await node.discard(wanted[:-1], soon())
        assert infinistore_shared.stored() == 601
        assert await node.find(wanted, soon()) == [False] * 599 + [True]
        assert await node.write(full(wanted, 100), soon()) == [DONE] * 600


async def test_a_server_that_freezes_over_a_discard_outlives_it(infinistore_server: InfiniStoreServer) -> None:
    async with node_at(infinistore_server.port) as node:
        assert await node.write(full(["a", "b"], 100), soon()) == [DONE] * 2
        infinistore_server.stop()
        started = time.monotonic()
        await node.discard(["a"], soon(0.1))
        assert time.monotonic() - started < 1.5
        with anyio.move_on_after(0.05):
            await node.discard(["b"], soon())
        infinistore_server.cont()
        assert await node.find(["a", "b"], soon()) == [False, True]  # the second had not begun


LONG = 4 * MIB + 64
"""Of three parts."""


async def test_a_long_value_is_in_parts(infinistore_shared: InfiniStoreServer) -> None:
    wanted = ["a", "b"]
    async with node_at(infinistore_shared.port) as node:
        assert await node.write(full(wanted, LONG), soon()) == [DONE, DONE]
        items = empty(wanted, LONG)
        assert await node.read(items, soon()) == [DONE, DONE]
        assert [bytes(item.buffer) for item in items] == [value_of(name, LONG) for name in wanted]
        assert await node.read(empty(wanted, LONG - 1), soon()) == [MALFORMED, MALFORMED]
    assert infinistore_shared.stored() == 2 * 4
    with raw.connect(infinistore_shared) as connection:
        for name in wanted:
            pointer = wire.parse_pointer(raw.value_of(connection, name) or b"")
            assert pointer is not None
            parts = [raw.value_of(connection, key.decode()) for key in pointer.keys(name.encode())]
            assert [len(part or b"") for part in parts[:-1]] == [pointer.part_bytes] * 2
            assert b"".join(part or b"" for part in parts) == value_of(name, LONG)


@pytest.mark.parametrize("part", range(3))
async def test_a_value_one_part_of_which_was_evicted_is_absent_and_can_be_written_again(
    infinistore_shared: InfiniStoreServer, part: int
) -> None:
    async with node_at(infinistore_shared.port) as node:
        wanted = ["a", "b", "c"]
        assert await node.write(full(wanted, LONG), soon()) == [DONE] * 3
        with raw.connect(infinistore_shared) as connection:
            pointer = wire.parse_pointer(raw.value_of(connection, "b") or b"")
            assert pointer is not None
            connection.sendall(raw.delete([wire.value_key(b"b", pointer.nonce, part).decode()]))
            assert raw.numbers(connection, 2) == [raw.STORED, 1]
        assert await node.read(empty(wanted, LONG), soon()) == [DONE, ABSENT, DONE]
        assert await node.find(wanted, soon()) == [True, False, True]
        assert await node.write(full(wanted, LONG), soon()) == [DONE] * 3
        items = empty(wanted, LONG)
        assert await node.read(items, soon()) == [DONE] * 3
        assert [bytes(item.buffer) for item in items] == [value_of(name, LONG) for name in wanted]


async def test_parts_of_another_length_than_ours_are_read(infinistore_shared: InfiniStoreServer) -> None:
    (nonce,) = wire.new_nonces(1)
    value, part_bytes = value_of("a", 100_000), 7000
    with raw.connect(infinistore_shared) as connection:
        for part, start in enumerate(range(0, len(value), part_bytes)):
            key = wire.value_key(b"a", nonce, part).decode()
            assert raw.stored(connection, key, value[start : start + part_bytes]) == raw.STORED
        assert raw.stored(connection, "a", wire.pack_pointer(nonce, len(value), part_bytes)) == raw.STORED
    async with node_at(infinistore_shared.port) as node:
        items = empty(["a"], len(value))
        assert await node.read(items, soon()) == [DONE]
        assert bytes(items[0].buffer) == value


@pytest.mark.slow
async def test_long_values_read_by_many_do_not_freeze_the_server(infinistore_server: InfiniStoreServer) -> None:
    """As they do whoever asks for them whole: see the hazards. The fixture asserts that it still answers."""
    size, wanted = 2304 << 10, ["a", "b", "c", "d"]
    async with node_at(infinistore_server.port) as node:
        assert await node.write(full(wanted, size), soon()) == [DONE] * 4

    async def read() -> None:
        async with node_at(infinistore_server.port, connections=2) as node:
            items = empty(wanted, size)
            for _ in range(40):
                assert await node.read(items, soon()) == [DONE] * 4
            assert [bytes(item.buffer) for item in items] == [value_of(name, size) for name in wanted]

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(read)


@pytest.mark.parametrize("junk", [b"x", b"x" * wire.POINTER.size, b"x" * 100_000, wire.pack_pointer(b"0" * 16, 4999)])
async def test_what_is_no_pointer_of_ours_is_malformed(infinistore_shared: InfiniStoreServer, junk: bytes) -> None:
    with raw.connect(infinistore_shared) as connection:
        assert raw.stored(connection, "junk", junk) == raw.STORED
    async with node_at(infinistore_shared.port) as node:
        assert await node.write(full(["a", "b"], 5000), soon()) == [DONE] * 2
        assert await node.read(empty(["a", "junk", "b"], 5000), soon()) == [DONE, MALFORMED, DONE]


async def test_a_value_that_does_not_fit_is_full_and_reads_go_on(infinistore_server: InfiniStoreServer) -> None:
    """What is put in part is never evicted: one such put fills the pool, but for less than a part."""
    async with node_at(infinistore_server.port) as node:
        with raw.connect(infinistore_server) as connection:
            connection.sendall(raw.request(b"L", raw.payload("half", (1 << 30) - MIB, "P")) + b"the value's first bytes")
            assert await eventually_found(node, "half", 10.0)
            assert await node.write(full(["large", "a"], 3 * MIB), soon()) == [FULL, FULL]
            assert await node.find(["large", "a"], soon()) == [False, False]
            assert await node.read(empty(["large"], 3 * MIB), soon()) == [ABSENT]
        infinistore_server.purge()
        assert await node.write(full(["large", "a"], 3 * MIB), soon()) == [DONE, DONE]
        assert await node.read(empty(["large", "a"], 3 * MIB), soon()) == [DONE, DONE]


async def test_a_late_write_gives_its_memory_back_and_is_finished(infinistore_shared: InfiniStoreServer) -> None:
    async with node_at(infinistore_shared.port, connections=2) as node:
        assert await node.find(["a"], soon()) == [False]
        found_late = 0
        for index in range(20):
            name, size = f"late {index}", 24 * MIB
            items = [Item(name, memoryview(bytearray(index.to_bytes(4, "little")) * (size // 4)))]
            outcome = (await node.write(items, soon(0.001 * (1 + index))))[0]
            assert outcome in (DONE, LATE)
            paint(items)
            if outcome is LATE and await eventually_found(node, name, 0.3):
                found_late += 1
                back = empty([name], size)
                assert await node.read(back, soon()) == [DONE]
                assert bytes(back[0].buffer) == index.to_bytes(4, "little") * (size // 4)
            if found_late == 2:
                break
        assert found_late > 0


async def eventually_found(node: InfiniStoreTcpNode, name: str, within_s: float) -> bool:
    with anyio.move_on_after(within_s):
        while await node.find([name], soon()) != [True]:  # noqa: ASYNC110 - another machine's doing sets no event
            await anyio.sleep(0.01)
        return True
    return False


@pytest.mark.parametrize("how", ["late", "cancelled", "closed"])
async def test_a_read_broken_off_does_not_end_the_server(infinistore_server: InfiniStoreServer, how: str) -> None:
    """Values too long for any socket's buffer. The fixture asserts that the server outlives the test."""
    async with node_at(infinistore_server.port, connections=2) as node:
        assert await node.write(full(["a", "b"], 48 * MIB), soon()) == [DONE] * 2
    for index in range(5):
        async with node_at(infinistore_server.port, connections=2) as node:
            assert await node.find(["a"], soon()) == [True]
            items = empty(["a", "b"], 48 * MIB)
            if how == "late":
                await node.read(items, soon(0.003 * (index + 1)))
            elif how == "cancelled":
                with anyio.move_on_after(0.003 * (index + 1)):
                    await node.read(items, soon())
            else:
                reading = asyncio.ensure_future(node.read(items, soon()))
                await anyio.sleep(0.003 * (index + 1))
                await node.close()
                await reading
            paint(items)
        assert await eventually(lambda: not lanes(), 10.0)
        assert is_painted(items)
    async with node_at(infinistore_server.port) as node:
        assert await node.read(empty(["a", "b"], 48 * MIB), soon()) == [DONE] * 2


async def test_many_restarts_leave_nothing_behind(infinistore_server: InfiniStoreServer) -> None:
    files, threads = open_files(), threading.active_count()
    async with node_at(infinistore_server.port, connections=4) as node:
        for _ in range(4):
            assert await node.write(full([f"a{index}" for index in range(8)], 1000), soon()) == [DONE] * 8
            assert len(lanes()) <= 4
            assert open_files() <= files + 4
            infinistore_server.restart()
    assert await eventually(lambda: open_files() == files and threading.active_count() == threads)


async def test_names_of_hosts_are_resolved(infinistore_shared: InfiniStoreServer) -> None:
    async with node_at(infinistore_shared.port, host="localhost") as node:
        assert await node.write(full(["a"], 100), soon()) == [DONE]


# ---------------------------------------------------------------- a server that misbehaves: reads


async def test_small_values_are_read_in_no_time(infinistore_shared: InfiniStoreServer) -> None:
    """Not in the 43 ms of a delayed ack: one each for pointer and value, were it not for quick acks."""
    async with node_at(infinistore_shared.port) as node:
        assert await node.write(full(["a"], 100), soon()) == [DONE]
        best = min([await timed_read(node) for _ in range(30)])
        assert best < 0.02


async def timed_read(node: InfiniStoreTcpNode) -> float:
    started = time.perf_counter()
    assert await node.read(empty(["a"], 100), soon()) == [DONE]
    return time.perf_counter() - started


Parts = Callable[[bytes], list[bytes]]
CASES: dict[str, tuple[list[Outcome], Parts]] = {
    "truncated": ([FAILED, FAILED], lambda value: [answer_of(value)[:-1]]),
    "nothing at all": ([FAILED, FAILED], lambda value: []),
    "half a code": ([FAILED, FAILED], lambda value: [b"\xc8\0"]),
    "another code": ([FAILED, FAILED], lambda value: [code(500)]),
    "a miss with a tail": ([FAILED, FAILED], lambda value: [code(404) + bytes(8)]),
    "a negative length": ([FAILED, FAILED], lambda value: [struct.pack("<ii", 200, -5)]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("of", ["pointer", "value"])
async def test_answers_that_make_no_sense(case: str, of: str) -> None:
    expected, parts = CASES[case]
    async with liar() as server, node_at(server.port) as node:
        assert await node.write(full(["a", "b"], 3000), soon()) == [DONE] * 2

        async def lie(key: bytes, answer: bytes, writer: asyncio.StreamWriter) -> bool:
            if is_value(key) != (of == "value"):
                return await server.tell(key, answer, writer)
            for part in parts(answer[8:]):
                writer.write(part)
            return False

        server.on_get = lie
        assert await node.read(empty(["a", "b"], 3000), soon()) == expected
        server.on_get = server.tell
        await reads_again(node, ["a", "b"])


async def reads_again(node: InfiniStoreTcpNode, wanted: list[str], size: int = 3000) -> None:
    items = empty(wanted, size)
    with anyio.fail_after(10):
        while (outcomes := await node.read(items, soon())) != [DONE] * len(wanted):
            assert set(outcomes) <= {FAILED, LATE}
            await anyio.sleep(0.01)
    assert [bytes(item.buffer) for item in items] == [value_of(name, size) for name in wanted]


@pytest.mark.parametrize("change", [-1, 1, 70_000])
async def test_a_value_of_another_length_is_read_to_its_end(change: int) -> None:
    async with liar() as server, node_at(server.port) as node:
        assert await node.write(full(["a", "b"], 3000), soon()) == [DONE] * 2

        async def lie(key: bytes, answer: bytes, writer: asyncio.StreamWriter) -> bool:
            value = answer[8:]
            changed = key.startswith(b"a:")
            return await server.tell(key, answer_of((value * 30)[: len(value) + change]) if changed else answer, writer)

        server.on_get = lie
        assert await node.read(empty(["a", "b"], 3000), soon()) == [MALFORMED, DONE]
        assert server.connections == 1


async def test_more_than_was_asked_for_is_not_taken_for_the_next_answer() -> None:
    async with liar() as server, node_at(server.port) as node:
        assert await node.write(full(["a", "b"], 3000), soon()) == [DONE] * 2

        async def lie(key: bytes, answer: bytes, writer: asyncio.StreamWriter) -> bool:
            return await server.tell(key, answer * 2 if key.startswith(b"a:") else answer, writer)

        server.on_get = lie
        items = empty(["a", "b"], 3000)
        outcomes = await node.read(items, soon())
        assert outcomes in ([DONE, FAILED], [DONE, DONE])  # or the second half came too late to be seen, and is seen before the next call
        assert bytes(items[0].buffer) == value_of("a", 3000)
        server.on_get = server.tell
        await reads_again(node, ["b", "a"])


async def test_who_never_answers_costs_the_deadline_and_keeps_its_connection() -> None:
    async with liar() as server, node_at(server.port) as node:
        assert await node.write(full(["a"], 3000), soon()) == [DONE]
        late = asyncio.Event()

        async def wait(key: bytes, answer: bytes, writer: asyncio.StreamWriter) -> bool:
            await late.wait()
            return await server.tell(key, answer, writer)

        server.on_get = wait
        items = empty(["a"], 3000)
        started = time.monotonic()
        assert await node.read(items, soon(0.1)) == [LATE]
        assert time.monotonic() - started < 1
        paint(items)
        assert await node.read(items, soon(0.05)) == [LATE]  # its turn never comes
        assert await node.find(["a"], soon(0.05)) is None
        with pytest.raises(NodeUnreachable, match="no answer in time"):
            await node.ping(soon(0.05))
        assert (server.connections, server.hung_up) == (1, 0)
        late.set()
        assert await node.find(["a"], soon()) == [True]
        assert is_painted(items)
        await reads_again(node, ["a"])
        assert (server.connections, server.hung_up) == (1, 0)


async def test_a_trickle_costs_the_deadline() -> None:
    async with liar() as server, node_at(server.port, connections=2) as node:
        assert await node.write(full(["a", "b"], 3000), soon()) == [DONE] * 2
        slow = asyncio.Event()

        async def trickle(key: bytes, answer: bytes, writer: asyncio.StreamWriter) -> bool:
            for place in range(0, len(answer) if key.startswith(b"a:") else 0, 100):
                writer.write(answer[place : place + 100])
                with anyio.move_on_after(0.05):
                    await slow.wait()
            return True if key.startswith(b"a:") else await server.tell(key, answer, writer)

        server.on_get = trickle
        items = empty(["a", "b"], 3000)
        started = time.monotonic()
        assert await node.read(items, soon(0.3)) == [LATE, DONE]
        assert time.monotonic() - started < 1.2
        paint(items)
        slow.set()
        server.on_get = server.tell
        await reads_again(node, ["a", "b"])
        assert is_painted(items)


async def test_find_believes_only_what_makes_sense() -> None:
    async with liar() as server, node_at(server.port) as node:

        async def lie(key: bytes, answer: bytes, writer: asyncio.StreamWriter) -> bool:
            return await server.tell(key, struct.pack("<ii", 200, 7 if key == b"17" else 1), writer)

        server.on_exist = lie
        assert await node.find([str(index) for index in range(40)], soon()) is None
        server.on_exist = server.tell
        with anyio.fail_after(10):
            while await node.find(["17"], soon()) != [False]:  # noqa: ASYNC110 - backing off sets no event
                await anyio.sleep(0.01)


# ---------------------------------------------------------------- a server that misbehaves: writes


async def test_no_room_for_a_pointer() -> None:
    async with liar() as server, node_at(server.port) as node:

        async def refuse(key: bytes, answer: bytes, writer: asyncio.StreamWriter) -> bool:
            if key != b"b":
                return await server.tell(key, answer, writer)
            await server.tell(key, code(wire.Code.FULL), writer)
            return False

        server.on_put = refuse
        assert await node.write(full(["a", "b", "c"], 3000), soon()) == [DONE, FULL, FULL]
        server.on_put = server.tell
        await reads_again(node, ["a"])


@pytest.mark.parametrize("said", [code(500), b"", b"\xc8\0"])
async def test_a_put_that_is_not_acknowledged_has_no_pointer(said: bytes) -> None:
    async with liar() as server, node_at(server.port) as node:

        async def lie(key: bytes, answer: bytes, writer: asyncio.StreamWriter) -> bool:
            if not key.startswith(b"b:"):
                return await server.tell(key, answer, writer)
            writer.write(said)
            return False

        server.on_put = lie
        assert await node.write(full(["a", "b", "c"], 3000), soon()) == [DONE, FAILED, FAILED]
        assert b"b" not in server.store
        server.on_put = server.tell
        await reads_again(node, ["a"])


async def test_a_pointer_follows_the_acknowledgement_and_comes_in_one_piece() -> None:
    """Watched from between client and server: no pointer before its value's acknowledgement, and none that is cut."""
    async with liar() as server:
        seen: list[bytes] = []

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            upstream, downstream = await asyncio.open_connection("127.0.0.1", server.port)

            async def back() -> None:
                while part := await upstream.read(1 << 16):
                    seen.append(b"<" + part)
                    writer.write(part)

            backwards = asyncio.ensure_future(back())
            while part := await reader.read(1 << 16):  # as much as the server reads at a time
                seen.append(b">" + part)
                downstream.write(part)
            downstream.close()
            await backwards
            writer.close()

        between = await asyncio.start_server(relay, "127.0.0.1", 0)
        wanted = [f"name{index}" for index in range(30)]
        async with node_at(between.sockets[0].getsockname()[1]) as node:
            assert await node.write(full(wanted, 150_000), soon()) == [DONE] * 30
        between.close()
    for name in wanted:
        request = wire.payload_template(wire.PUT, len(name), wire.POINTER.size).fill(name.encode())
        (place,) = [index for index, part in enumerate(seen) if request in part]
        start = seen[place].index(request)
        assert start == 1  # nothing before it: it begins a segment
        assert wire.parse_pointer(seen[place][start + len(request) :][: wire.POINTER.size]) is not None
        assert seen[place - 1][:1] == b"<"


async def test_a_late_write_sends_what_it_had_and_not_what_is_in_the_buffer_now() -> None:
    async with liar() as server, node_at(server.port) as node:
        assert await node.find(["a"], soon()) == [False]
        size = 32 * MIB
        items = full(["a", "b"], size)
        server.may_read.clear()
        assert await node.write(items, soon(0.3)) == [LATE, LATE]  # not even the question has been read
        paint(items)
        server.may_read.set()
        assert await node.find(["a", "b"], soon()) == [False, False]  # so nothing of it was begun

        items = full(["c", "d"], size)
        expected = [bytes(item.buffer) for item in items]

        async def stop(key: bytes, answer: bytes, writer: asyncio.StreamWriter) -> bool:
            server.may_read.clear()
            return await server.tell(key, answer, writer)

        server.on_exist = stop
        assert await node.write(items, soon(0.3)) == [LATE, LATE]
        paint(items)
        server.on_exist = server.tell
        server.may_read.set()
        assert await node.find(["c", "d"], soon()) == [True, False]  # what was begun was finished, and nothing more was begun
        assert is_painted(items)
        back = empty(["c"], size)
        assert await node.read(back, soon()) == [DONE]
        assert bytes(back[0].buffer) == expected[0]


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize("size", [wire.MOST_PART_BYTES, wire.MOST_PART_BYTES + 1, 9 * MIB + 1])
async def test_nothing_longer_than_a_part_is_put_or_got(size: int) -> None:
    async with liar() as server, node_at(server.port) as node:
        assert await node.write(full(["a", "b"], size), soon()) == [DONE] * 2
        assert await node.read(empty(["a", "b"], size), soon()) == [DONE] * 2
        count = -(-size // wire.MOST_PART_BYTES)
        assert [key for key in server.puts if not is_value(key)] == [b"a", b"b"]
        assert len(server.puts) == len(server.gets) == 2 * (count + 1)
        assert sum(map(len, server.store.values())) == 2 * (size + wire.POINTER.size)
        assert max(map(len, server.store.values())) <= wire.MOST_PART_BYTES


@pytest.mark.parametrize("part_bytes", [0, wire.MOST_PART_BYTES + 1, 1 << 40, 1 << 63])
async def test_a_pointer_to_longer_parts_is_not_followed(part_bytes: int) -> None:
    async with liar() as server, node_at(server.port) as node:
        assert await node.write(full(["b"], 3000), soon()) == [DONE]
        checked = struct.pack("<8sQ16sQ", wire.POINTER_MAGIC, 9 * MIB, b"0" * wire.NONCE_BYTES, part_bytes)
        server.store[b"a"] = checked + zlib.crc32(checked).to_bytes(8, "little")
        assert await node.read(empty(["a"], 9 * MIB), soon()) == [MALFORMED]
        assert server.gets == [b"a"]
        await reads_again(node, ["b"])


@pytest.mark.parametrize("change", [-1, 1, 70_000])
async def test_a_part_of_another_length_is_read_to_its_end(change: int) -> None:
    async with liar() as server, node_at(server.port) as node:
        assert await node.write(full(["a", "b"], LONG), soon()) == [DONE] * 2

        async def lie(key: bytes, answer: bytes, writer: asyncio.StreamWriter) -> bool:
            value = answer[8:]
            changed = key.startswith(b"a:") and key.endswith(b"0001")
            return await server.tell(key, answer_of((value * 2)[: len(value) + change]) if changed else answer, writer)

        server.on_get = lie
        assert await node.read(empty(["a", "b"], LONG), soon()) == [MALFORMED, DONE]
        assert server.connections == 1


@pytest.mark.parametrize("part", range(3))
async def test_a_read_late_at_any_part_is_drained_and_goes_no_further(part: int) -> None:
    async with liar() as server, node_at(server.port) as node:
        assert await node.write(full(["a"], LONG), soon()) == [DONE]
        late = asyncio.Event()

        async def wait(key: bytes, answer: bytes, writer: asyncio.StreamWriter) -> bool:
            if key.endswith(b"%04x" % part):
                writer.write(answer[:1000])
                await late.wait()
                answer = answer[1000:]
            return await server.tell(key, answer, writer)

        server.on_get = wait
        items = empty(["a"], LONG)
        assert await node.read(items, soon(0.3)) == [LATE]
        paint(items)
        late.set()
        assert await node.find(["a"], soon()) == [True]
        assert is_painted(items)
        assert len(server.gets) == 1 + part + 1
        await reads_again(node, ["a"], LONG)
        assert (server.connections, server.hung_up) == (1, 0)


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("where", ["in it", "behind it"])
async def test_a_write_late_at_any_part_is_finished_with_what_it_had(part: int, where: str) -> None:
    async with liar() as server, node_at(server.port) as node:
        size = 3 * wire.MOST_PART_BYTES
        items = full(["a", "b"], size)
        expected = bytes(items[0].buffer)
        go_on = asyncio.Event()

        async def wait(key: bytes, answer: bytes, writer: asyncio.StreamWriter) -> bool:
            if where == "behind it" and key.endswith(b"%04x" % part):
                await go_on.wait()
            elif where == "in it" and key.endswith(b"%04x" % (part - 1)):
                server.may_read.clear()
            return await server.tell(key, answer, writer)

        async def stop(key: bytes, answer: bytes, writer: asyncio.StreamWriter) -> bool:
            if where == "in it" and part == 0 and key == b"b":
                server.may_read.clear()
            return await server.tell(key, answer, writer)

        server.on_put, server.on_exist = wait, stop
        assert await node.write(items, soon(0.5)) == [LATE, LATE]
        assert b"a" not in server.store
        paint(items)
        server.on_put = server.on_exist = server.tell
        go_on.set()
        server.may_read.set()
        assert await node.find(["a", "b"], soon()) == [True, False]
        assert is_painted(items)
        back = empty(["a"], size)
        assert await node.read(back, soon()) == [DONE]
        assert bytes(back[0].buffer) == expected


@pytest.mark.parametrize("part", range(3))
async def test_a_value_one_part_of_which_was_refused_has_no_pointer(part: int) -> None:
    async with liar() as server, node_at(server.port) as node:

        async def refuse(key: bytes, answer: bytes, writer: asyncio.StreamWriter) -> bool:
            if not (key.startswith(b"b:") and key.endswith(b"%04x" % part)):
                return await server.tell(key, answer, writer)
            await server.tell(key, code(wire.Code.FULL), writer)
            return False

        server.on_put = refuse
        assert await node.write(full(["a", "b", "c"], LONG), soon()) == [DONE, FULL, FULL]
        assert b"a" in server.store
        assert b"b" not in server.store
        server.on_put = server.tell
        await reads_again(node, ["a"], LONG)


# ---------------------------------------------------------------- connecting


async def test_while_it_backs_off_calls_fail_at_once() -> None:
    async with node_at(free_port(), connections=2) as node:
        assert await node.read(empty(["a"], 100), soon()) == [FAILED]
        for _ in range(4):  # the pause doubles from 50 ms
            with pytest.raises(NodeUnreachable, match="refused"):
                await node.ping(soon())
            await anyio.sleep(0.06)
        started = time.monotonic()
        for _ in range(20):
            assert await node.find(["a"], soon()) is None
            assert await node.read(empty(["a", "b"], 100), soon()) == [FAILED] * 2
            assert await node.write(full(["a", "b"], 100), soon()) == [FAILED] * 2
        assert time.monotonic() - started < 5
        assert len(lanes()) <= 2


async def test_what_ping_says() -> None:
    async with node_at(free_port()) as node:
        with pytest.raises(NodeUnreachable, match=r"node n, 127\.0\.0\.1:\d+: cannot connect: refused"):
            await node.ping(soon())

    async def ssh(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        await reader.read()
        writer.close()

    async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    for hello in (ssh, http):
        async with await asyncio.start_server(hello, "127.0.0.1", 0) as server, node_at(server.sockets[0].getsockname()[1]) as node:
            with pytest.raises(NodeUnreachable, match="data port of an InfiniStore server"):
                await node.ping(soon())
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        async with node_at(silent.getsockname()[1]) as node:
            with pytest.raises(NodeUnreachable, match="no answer in time"):
                await node.ping(soon(0.1))
    async with node_at(1, host="no-such-host.invalid") as node:
        with pytest.raises(NodeUnreachable, match="cannot connect"):
            await node.ping(soon())


async def test_misuse_is_told() -> None:
    with pytest.raises(MisuseError):
        InfiniStoreTcpNode("n", "h", 1, value_bytes=1 << 31)
    async with node_at(1) as node:
        for call in (
            node.read([Item("a", memoryview(b"read-only"))], soon()),
            node.read([Item("a", memoryview(bytearray(0)))], soon()),
            node.read([Item("", memoryview(bytearray(8)))], soon()),
            node.write([Item("a", memoryview(bytearray(8))[::2])], soon()),
        ):
            with pytest.raises(MisuseError):
                await call
