"""Short transfers, which the event loop's thread does by itself: when it does, and what it leaves to the lane's thread, and where."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import numpy as np
import pytest
from numpy.typing import NDArray
from tests.contracts.rigs import empty, eventually, full, is_painted, paint, soon, value_of
from tests.infinistore import raw
from tests.infinistore.server import InfiniStoreServer
from tests.l2.infinistore_liar import Liar, answer_of, code, liar

from kvoffload.errors import MisuseError
from kvoffload.l2 import infinistore_wire as wire
from kvoffload.l2.infinistore_lane import Lane, Report
from kvoffload.l2.infinistore_tcp import InfiniStoreTcpNode, _cut, _cut_equal
from kvoffload.l2.infinistore_transfers import MOST_ASKED, Transfer
from kvoffload.l2.infinistore_values import SHORT_BYTES
from kvoffload.l2.node import Item, Outcome
from kvoffload.l2.values import SlotBuffers, Values

pytestmark = pytest.mark.asyncio

SIZE = 3000
DONE, ABSENT, MALFORMED, FAILED, LATE = Outcome.DONE, Outcome.ABSENT, Outcome.MALFORMED, Outcome.FAILED, Outcome.LATE


class Watched(InfiniStoreTcpNode):
    """Counts what the loop's thread begins, and what a lane's thread ends."""

    driven = 0
    by_thread = 0

    def _drive(self, loop: asyncio.AbstractEventLoop, lane: Lane, transfer: Transfer) -> None:
        self.driven += 1
        super()._drive(loop, lane, transfer)

    def _hear(self, report: Report) -> None:
        self.by_thread += report.released is not None
        super()._hear(report)

    @property
    def counts(self) -> tuple[int, int]:
        """Since this was last asked for."""
        counts = self.driven, self.by_thread
        self.driven = self.by_thread = 0
        return counts


@asynccontextmanager
async def node_at(port: int, *, connections: int = 1) -> AsyncIterator[Watched]:
    node = Watched("n", "127.0.0.1", port, value_bytes=1 << 20, connections=connections, connect_timeout_s=0.5)
    try:
        yield node
    finally:
        await node.close()


@asynccontextmanager
async def lying(wanted: Sequence[str] = ("a",), size: int = SIZE) -> AsyncIterator[tuple[Liar, Watched]]:
    """A liar that has these, and a node with one connection to it, which is open."""
    async with liar() as server, node_at(server.port) as node:
        assert await node.write(full(wanted, size), soon()) == [DONE] * len(wanted)
        assert node.counts[0] == 0
        yield server, node


async def reads_again(node: Watched, name: str = "a", size: int = SIZE) -> None:
    items = empty([name], size)
    with anyio.fail_after(10):
        while (outcomes := await node.read(items, soon())) != [DONE]:
            assert set(outcomes) <= {FAILED, LATE}
            await anyio.sleep(0.01)
    assert bytes(items[0].buffer) == value_of(name, size)


# ---------------------------------------------------------------- when


async def test_what_is_short_needs_no_thread(infinistore_shared: InfiniStoreServer) -> None:
    async with node_at(infinistore_shared.port) as node:
        assert await node.find(["a"], soon()) == [False]
        assert node.counts == (0, 1), "nobody else may wait for a connection"
        assert await node.write(full(["a"], SHORT_BYTES), soon()) == [DONE]
        assert node.counts == (0, 1)
        items = empty(["a"], SHORT_BYTES)
        assert await node.read(items, soon()) == [DONE]
        assert bytes(items[0].buffer) == value_of("a", SHORT_BYTES)
        assert node.counts == (1, 0)
        assert await node.read(empty(["b"], SHORT_BYTES), soon()) == [ABSENT]
        assert await node.find(["a", "b", "c"], soon()) == [True, False, False]
        assert await node.find(["a"] * MOST_ASKED, soon()) == [True] * MOST_ASKED
        assert 0 < await node.ping(soon()) < 1
        assert node.counts == (4, 0)


async def test_what_is_not_short_does(infinistore_shared: InfiniStoreServer) -> None:
    async with node_at(infinistore_shared.port) as node:
        assert await node.write(full(["a"], SHORT_BYTES + 1), soon()) == [DONE]
        assert await node.read(empty(["a"], SHORT_BYTES + 1), soon()) == [DONE]
        assert await node.read(empty(["a", "b"], 100), soon()) == [MALFORMED, ABSENT]
        assert await node.find(["a"] * (MOST_ASKED + 1), soon()) == [True] * (MOST_ASKED + 1)
        assert node.counts == (0, 4)


async def test_many_at_once_over_few_connections(infinistore_shared: InfiniStoreServer) -> None:
    wanted = [str(index) for index in range(40)]
    async with node_at(infinistore_shared.port, connections=2) as node:
        assert await node.write(full(wanted[::2], SIZE), soon()) == [DONE] * 20
        assert node.counts[0] == 0

        async def look(index: int) -> None:
            for _ in range(5):
                is_there = index % 2 == 0
                assert await node.find(wanted[index:], soon()) == [(index + place) % 2 == 0 for place in range(40 - index)]
                items = empty([wanted[index]], SIZE)
                assert await node.read(items, soon()) == [DONE if is_there else ABSENT]
                assert not is_there or bytes(items[0].buffer) == value_of(wanted[index], SIZE)

        async with anyio.create_task_group() as group:
            for index in range(40):
                group.start_soon(look, index)
        driven, by_thread = node.counts
        assert driven + by_thread == 400
        assert by_thread <= 1, "but for the second connection, which had to be made"


async def test_calls_that_are_done_at_once_let_others_run(infinistore_shared: InfiniStoreServer) -> None:
    async with node_at(infinistore_shared.port) as node:
        turns = 0

        async def take_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        others = asyncio.ensure_future(take_turns())
        for _ in range(300):
            assert await node.find(["a"], soon()) == [False]
        others.cancel()
        assert turns > 10


@pytest.mark.parametrize("count", [0, 1, 3, 250, 1000])
@pytest.mark.parametrize("size", [1, 4096, 1 << 20, 5 << 20, 1 << 30])
@pytest.mark.parametrize("connections", [1, 2, 4])
async def test_values_of_one_size_are_dealt_as_others_are(count: int, size: int, connections: int) -> None:
    shares = _cut_equal(count, size, connections)
    assert shares == _cut([size] * count, connections)
    assert sorted(place for share in shares for place in share) == list(range(count))
    assert all(len(share) == 1 or (len(share) - 1) * size <= 32 << 20 for share in shares)


async def test_values_are_made_by_threads(infinistore_shared: InfiniStoreServer) -> None:
    """A microsecond and more for each that the loop does not spend."""
    seen: list[int] = []

    class Slot:
        def slot(self, index: int) -> NDArray[np.uint8]:
            seen.append(threading.get_ident())
            return memory[index : index + 1].reshape(-1)

    memory = np.random.default_rng(1).integers(0, 256, (100, 1064), np.uint8)
    expected, keys, buffers = memory.copy(), [secrets.token_bytes(24) for _ in range(100)], SlotBuffers([Slot()], 1000)
    async with node_at(infinistore_shared.port, connections=3) as node:
        for is_writable in (False, True):
            values = Values(buffers, "here", range(100), keys, is_writable=is_writable)
            at_first = len(seen)
            call = node.read if is_writable else node.write
            assert await call(values, soon()) == [DONE] * 100
            assert threading.get_ident() not in seen[at_first:]
            assert len(seen) - at_first == 100
            assert (memory == expected).all()
            memory[:] = 0
        memory[:] = 0
        assert await node.read(Values(buffers, "here", range(100), keys, is_writable=True)[10:21:5], soon()) == [DONE] * 3
        assert [index for index in range(100) if (memory[index] == expected[index]).all()] == [10, 15, 20]
        with pytest.raises(MisuseError, match="cannot be written"):
            await node.read(Values(buffers, "here", [0], keys[:1], is_writable=False), soon())
        assert await node.read(Values(buffers, "here", [], [], is_writable=True), soon()) == []


async def test_a_loop_that_cannot_watch_a_connection_leaves_it_to_the_thread() -> None:
    class Blind(asyncio.SelectorEventLoop):
        def add_reader(self, fd: Any, callback: Any, *args: Any) -> None:  # type: ignore[override]
            raise OSError(28, "No space left on device")

    async def main() -> None:
        async with lying() as (_, node):
            await reads_again(node)
            assert await node.find(["a", "b"], soon()) == [True, False]
            driven, by_thread = node.counts
            assert driven == by_thread == 2

    def run() -> None:
        with asyncio.Runner(loop_factory=Blind) as runner:
            runner.run(main())

    await asyncio.to_thread(run)


# ---------------------------------------------------------------- late, cancelled, closed: where it is


def held(go_on: asyncio.Event, place: str) -> Callable[[Liar], None]:
    """Of which answer how many bytes come before ``go_on``."""
    of, _, cut = place.partition(" ")

    def install(server: Liar) -> None:
        async def hold(key: bytes, answer: bytes, writer: asyncio.StreamWriter) -> bool:
            if (of == "value") == (b":" in key):
                writer.write(answer[: int(cut)])
                await go_on.wait()
                answer = answer[int(cut) :]
            return await server.tell(key, answer, writer)

        if of == "exist":
            server.on_exist = hold
        else:
            server.on_get = hold

    return install


PLACES = ["pointer 0", "pointer 3", "pointer 8", "pointer 30", "value 0", "value 6", "value 8", "value 1000", "exist 0", "exist 5"]


@pytest.mark.parametrize("how", ["late", "cancelled", "closed"])
@pytest.mark.parametrize("place", PLACES)
async def test_an_answer_that_does_not_come_is_waited_for_by_the_thread(place: str, how: str) -> None:
    """The call ends in time and its memory is its own again; the connection is kept until the answer has come, and no byte more is sent."""
    async with lying() as (server, node):
        go_on = asyncio.Event()
        held(go_on, place)(server)
        items = empty(["a"], SIZE)
        asked_to_find = place.startswith("exist")
        started = time.monotonic()
        call: Awaitable[object] = (
            (node.find(["a", "b"], soon(0.2)) if asked_to_find else node.read(items, soon(0.2)))
            if how == "late"
            else (node.find(["a", "b"], soon()) if asked_to_find else node.read(items, soon()))
        )
        running = asyncio.ensure_future(call)
        if how == "late":
            assert await running == (None if asked_to_find else [LATE])
            assert time.monotonic() - started < 1.5
        else:
            await anyio.sleep(0.05)
            assert not running.done()
            if how == "cancelled":
                running.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await running
            else:
                await node.close()
                assert await running == (None if asked_to_find else [FAILED])
            assert time.monotonic() - started < 1.5
        paint(items)
        gets, counts = len(server.gets), node.counts
        assert counts == (1, 1)
        await anyio.sleep(0.05)
        assert (server.connections, server.hung_up, len(server.gets)) == (1, 0, gets)
        server.on_get = server.on_exist = server.tell
        go_on.set()
        if how == "closed":
            assert await eventually(lambda: server.hung_up == 1)
            assert len(server.gets) == gets
        else:
            assert await node.find(["a"], soon()) == [True]
            await reads_again(node)
            assert (server.connections, server.hung_up) == (1, 0)
        assert is_painted(items)


@pytest.mark.parametrize("does_go_on", [True, False])
async def test_a_question_that_cannot_be_sent(does_go_on: bool) -> None:
    """Longer than all buffers on the way: the loop waits for room, and at the deadline the thread does."""
    wanted = ["a", *(f"{index:03}" + "x" * 40_000 for index in range(MOST_ASKED - 1))]
    async with lying() as (server, node):
        answers: list[bytes] = []

        async def keep(key: bytes, answer: bytes, writer: asyncio.StreamWriter) -> bool:
            """No answer makes the loop look again: only that there is room does."""
            answers.append(answer)
            return len(answers) < MOST_ASKED or await server.tell(key, b"".join(answers), writer)

        server.on_exist = keep
        server.may_read.clear()
        finding = asyncio.ensure_future(node.find(wanted, soon(5 if does_go_on else 0.3)))
        await anyio.sleep(0.05)
        assert not finding.done()
        if not does_go_on:
            assert await finding is None
            assert node.counts == (1, 1)
        server.may_read.set()
        if does_go_on:
            assert await finding == [True] + [False] * (MOST_ASKED - 1)
            assert node.counts == (1, 0)
        assert await eventually(lambda: len(answers) == MOST_ASKED)
        server.on_exist = server.tell
        assert await node.find(["a", "b"], soon()) == [True, False]
        assert (server.connections, server.hung_up) == (1, 0)


async def test_the_loop_goes_on_while_a_server_is_frozen(infinistore_server: InfiniStoreServer) -> None:
    async with node_at(infinistore_server.port, connections=2) as node:
        assert await node.write(full(["a"], SIZE), soon()) == [DONE]
        assert await node.find(["a"], soon()) == [True]
        infinistore_server.stop()
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.005)
                ticks += 1

        ticking = asyncio.ensure_future(tick())
        items = empty(["a"], SIZE)
        outcomes, found = await asyncio.gather(node.read(items, soon(0.4)), node.find(["a"], soon(0.4)))
        assert (outcomes, found) == ([LATE], None)
        ticking.cancel()
        assert ticks > 20
        paint(items)
        infinistore_server.cont()
        assert await node.find(["a"], soon()) == [True]
        await reads_again(node)
        assert is_painted(items)
        assert node.driven > 0


@pytest.mark.parametrize("how", ["late", "cancelled", "closed"])
async def test_a_server_frozen_in_the_middle_outlives_whoever_left(infinistore_server: InfiniStoreServer, how: str) -> None:
    """The fixture asserts that it does."""
    async with node_at(infinistore_server.port) as node:
        assert await node.write(full(["a"], SIZE), soon()) == [DONE]
    for index in range(6):
        async with node_at(infinistore_server.port, connections=1) as node:
            assert await node.find(["a"], soon()) == [True]
            infinistore_server.stop()
            items = empty(["a"], SIZE)
            reading = asyncio.ensure_future(node.read(items, soon(0.05 if how == "late" else 20)))
            await anyio.sleep(0.02)
            if how == "cancelled":
                reading.cancel()
                with suppress(asyncio.CancelledError):
                    await reading
            elif how == "closed":
                await node.close()
                assert await reading == [FAILED]
            else:
                assert await reading == [LATE]
            paint(items)
            assert node.driven == 1
            infinistore_server.cont()
            if index % 2:
                await anyio.sleep(0.01)
        assert is_painted(items)
    async with node_at(infinistore_server.port) as node:
        await reads_again(node)


async def test_short_reads_broken_off_anywhere_do_not_end_the_server(infinistore_server: InfiniStoreServer) -> None:
    async with node_at(infinistore_server.port, connections=2) as node:
        assert await node.write(full(["a"], SHORT_BYTES), soon()) == [DONE]
        assert await node.find(["a"], soon()) == [True]
        right = value_of("a", SHORT_BYTES)
        taken = set()
        for index in range(200):
            items = empty(["a"], SHORT_BYTES)
            if index % 2:
                (outcome,) = await node.read(items, soon(1e-6 * index))
                taken.add(outcome)
                assert outcome in (DONE, LATE)
                assert outcome is LATE or bytes(items[0].buffer) == right
            else:
                reading = asyncio.ensure_future(node.read(items, soon()))
                for _ in range(index // 20):
                    await asyncio.sleep(0)
                reading.cancel()
                with suppress(asyncio.CancelledError):
                    await reading
            paint(items)
            assert await node.find(["a", "b"], soon()) == [True, False]
            assert is_painted(items)
        assert LATE in taken
        await reads_again(node, size=SHORT_BYTES)


# ---------------------------------------------------------------- servers that misbehave


@pytest.mark.parametrize("place", PLACES)
async def test_a_server_that_hangs_up_in_the_middle(place: str) -> None:
    of, _, cut = place.partition(" ")
    async with lying() as (server, node):

        async def hang_up(key: bytes, answer: bytes, writer: asyncio.StreamWriter) -> bool:
            if (of == "value") != (b":" in key):
                return await server.tell(key, answer, writer)
            writer.write(answer[: int(cut)])
            return False

        server.on_get = server.on_exist = hang_up
        if of == "exist":
            assert await node.find(["a", "b"], soon()) is None
        else:
            assert await node.read(empty(["a"], SIZE), soon()) == [FAILED]
        assert node.counts == (1, 1)
        server.on_get = server.on_exist = server.tell
        await reads_again(node)
        assert server.connections == 2


@pytest.mark.parametrize("by", ["hanging up", "speaking first"])
async def test_a_connection_that_went_stale_is_made_again(by: str) -> None:
    async with lying() as (server, node):
        for _ in range(2):
            if by == "hanging up":
                await server.close()
            else:
                for writer in list(server._open):
                    writer.write(b"hello")
                    await writer.drain()
            await anyio.sleep(0.01)
            items = empty(["a"], SIZE)
            assert await node.read(items, soon()) == [DONE]
            assert bytes(items[0].buffer) == value_of("a", SIZE)
            assert node.counts == (1, 1)
        assert server.connections == 3


Parts = Callable[[bytes], bytes]
NONSENSE: dict[str, Parts] = {
    "truncated": lambda value: answer_of(value)[:-1],
    "nothing at all": lambda value: b"",
    "half a code": lambda value: b"\xc8\0",
    "another code": lambda value: code(500) + bytes(4),
    "a miss with a tail": lambda value: code(404) + bytes(8),
    "a negative length": lambda value: code(200) + code(-5),
}


@pytest.mark.parametrize("case", NONSENSE)
@pytest.mark.parametrize("of", ["pointer", "value"])
async def test_an_answer_that_makes_no_sense(case: str, of: str) -> None:
    async with lying() as (server, node):

        async def lie(key: bytes, answer: bytes, writer: asyncio.StreamWriter) -> bool:
            if (of == "value") != (b":" in key):
                return await server.tell(key, answer, writer)
            writer.write(NONSENSE[case](answer[8:]))
            return False

        server.on_get = lie
        assert await node.read(empty(["a"], SIZE), soon()) == [FAILED]
        assert node.counts == (1, 1)
        server.on_get = server.tell
        await reads_again(node)


async def test_a_find_whose_answer_makes_no_sense_is_not_asked_again() -> None:
    async with lying() as (server, node):
        asked = 0

        async def lie(key: bytes, answer: bytes, writer: asyncio.StreamWriter) -> bool:
            nonlocal asked
            asked += 1
            return await server.tell(key, code(200) + code(7), writer)

        server.on_exist = lie
        assert await node.find(["a"], soon()) is None
        assert (asked, node.counts) == (1, (1, 1))
        server.on_exist = server.tell
        await reads_again(node)
        assert server.connections == 2


@pytest.mark.parametrize("change", [-1, 1, 70_000, 20 << 20])
@pytest.mark.parametrize("of", ["pointer", "value"])
async def test_an_answer_of_another_length_is_read_to_its_end_by_the_thread(change: int, of: str) -> None:
    async with lying() as (server, node):

        async def lie(key: bytes, answer: bytes, writer: asyncio.StreamWriter) -> bool:
            if (of == "value") != (b":" in key):
                return await server.tell(key, answer, writer)
            value = answer[8:]
            return await server.tell(key, answer_of((value + bytes(max(0, change)))[: len(value) + change]), writer)

        server.on_get = lie
        assert await node.read(empty(["a"], SIZE), soon()) == [MALFORMED]
        assert node.counts == (1, 1)
        server.on_get = server.tell
        await reads_again(node)
        assert server.connections == 1


async def test_a_value_that_was_evicted_can_be_written_again(infinistore_shared: InfiniStoreServer) -> None:
    async with node_at(infinistore_shared.port) as node:
        assert await node.write(full(["a"], SIZE), soon()) == [DONE]
        with raw.connect(infinistore_shared) as connection:
            pointer = wire.parse_pointer(raw.value_of(connection, "a") or b"")
            assert pointer is not None
            connection.sendall(raw.delete([wire.value_key(b"a", pointer.nonce).decode()]))
            assert raw.numbers(connection, 2) == [raw.STORED, 1]
        assert node.counts == (0, 1)
        assert await node.read(empty(["a"], SIZE), soon()) == [ABSENT]
        assert node.counts == (1, 1)
        assert await node.find(["a"], soon()) == [False]  # on the same connection, so behind the deletion
        assert await node.write(full(["a"], SIZE), soon()) == [DONE]
        await reads_again(node)


async def test_a_value_in_parts_is_read_by_the_thread(infinistore_shared: InfiniStoreServer) -> None:
    (nonce,) = wire.new_nonces(1)
    value, part_bytes = value_of("a", 30_000), 7000
    with raw.connect(infinistore_shared) as connection:
        for part, start in enumerate(range(0, len(value), part_bytes)):
            assert raw.stored(connection, wire.value_key(b"a", nonce, part).decode(), value[start : start + part_bytes]) == raw.STORED
        assert raw.stored(connection, "a", wire.pack_pointer(nonce, len(value), part_bytes)) == raw.STORED
    async with node_at(infinistore_shared.port) as node:
        assert await node.find(["a"], soon()) == [True]
        assert node.counts == (0, 1)
        items = empty(["a"], len(value))
        assert await node.read(items, soon()) == [DONE]
        assert bytes(items[0].buffer) == value
        assert node.counts == (1, 1)


# ---------------------------------------------------------------- bugs, and the end of the loop


@pytest.mark.parametrize("is_open", [True, False])
async def test_what_cannot_be_sent_is_raised_and_costs_nothing(is_open: bool) -> None:
    async with liar() as server, node_at(server.port) as node:
        if is_open:
            assert await node.find(["a"], soon()) == [False]
        with pytest.raises(UnicodeEncodeError):
            await node.find(["\ud800"], soon())
        with pytest.raises(UnicodeEncodeError):
            await node.read([Item("\ud800", memoryview(bytearray(8)))], soon())
        assert await node.find(["a"], soon()) == [False]
        assert not is_open or server.connections == 1


async def test_a_loop_that_ends_in_the_middle_leaves_the_rest_to_the_thread() -> None:
    async with liar() as server:
        go_on = asyncio.Event()
        items = empty(["a"], SIZE)
        node = Watched("n", "127.0.0.1", server.port, value_bytes=SIZE, connections=1)

        async def main() -> None:
            assert await node.write(full(["a"], SIZE), soon()) == [DONE]
            started.set()
            await node.read(items, soon())

        started = asyncio.Event()

        def run() -> None:
            with asyncio.Runner() as runner, suppress(TimeoutError):
                runner.run(asyncio.wait_for(main(), 0.3))

        held(go_on, "value 100")(server)
        await asyncio.to_thread(run)
        paint(items)
        assert node.counts[0] == 1
        assert (server.connections, server.hung_up) == (1, 0)
        go_on.set()
        server.on_get = server.tell
        await reads_again(node)
        assert (server.connections, server.hung_up) == (1, 0)
        assert is_painted(items)
        await node.close()
