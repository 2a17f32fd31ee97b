"""Nothing of a call that ended badly is done later, in a buffer that is somebody else's by then."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from tests.l2.infinistore_liar import liar

from kvoffload.l2.infinistore_lane import Lane
from kvoffload.l2.infinistore_tcp import InfiniStoreTcpNode
from kvoffload.l2.node import Item, Outcome

VALUE = 3000


class Broken(InfiniStoreTcpNode):
    """Has a bug where it looks for a connection, until it is mended."""

    is_broken = True

    def _lane(self, is_probe: bool) -> Lane | None:
        if self.is_broken:
            raise ZeroDivisionError("a bug")
        return super()._lane(is_probe)


@pytest.mark.asyncio
@pytest.mark.real_clock
async def test_a_read_that_raised_is_not_done_by_a_later_call() -> None:
    async with liar() as server:
        writer = InfiniStoreTcpNode("n", "127.0.0.1", server.port, value_bytes=VALUE, connections=1)
        assert await writer.write([Item("a", memoryview(b"x" * VALUE))], time.monotonic() + 5) == [Outcome.DONE]
        await writer.close()
        node = Broken("n", "127.0.0.1", server.port, value_bytes=VALUE, connections=1)
        slot = bytearray(VALUE)
        with pytest.raises(ZeroDivisionError):
            await node.read([Item("a", memoryview(slot))], time.monotonic() + 5)
        await node.settle()
        node.is_broken = False
        slot[:] = b"B" * VALUE  # it is another block's now
        assert await node.find(["a"], time.monotonic() + 5) == [True]
        await asyncio.sleep(0.1)
        assert slot == b"B" * VALUE
        await node.close()


@contextmanager
def nobody_accepts(port: int) -> Iterator[None]:
    """Whoever connects there waits: as with a host that is gone."""
    with socket.socket() as listener, ExitStack() as stack:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(0)
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", port))
        yield


@pytest.mark.asyncio
@pytest.mark.real_clock
@pytest.mark.parametrize("what", ["find", "read", "write"])
@pytest.mark.parametrize("how", ["late", "cancelled", "closed"])
async def test_who_asks_over_a_connection_that_went_stale_does_not_wait_for_the_next_one(what: str, how: str) -> None:
    async with liar() as server:
        node = InfiniStoreTcpNode("n", "127.0.0.1", server.port, value_bytes=VALUE, connections=1, connect_timeout_s=3.0)
        slots = [bytearray(VALUE), bytearray(VALUE)]
        assert await node.write([Item("a", memoryview(slots[0]))], time.monotonic() + 5) == [Outcome.DONE]
        port = server.port
    with nobody_accepts(port):
        items = [Item("a", memoryview(slots[0])), Item("b", memoryview(slots[1]))]
        deadline = time.monotonic() + (0.2 if how == "late" else 20)
        calls: dict[str, Callable[[], Coroutine[None, None, object]]] = {
            "find": lambda: node.find(["a"], deadline),
            "read": lambda: node.read(items, deadline),
            "write": lambda: node.write(items, deadline),
        }
        begun = time.monotonic()
        asking = asyncio.create_task(calls[what]())
        await asyncio.sleep(0.1)
        assert not asking.done()
        if how == "cancelled":
            asking.cancel()
        elif how == "closed":
            await node.close()
        await asyncio.wait([asking])
        assert time.monotonic() - begun < 1.5
        if how == "cancelled":
            assert asking.cancelled()
        else:
            expected = Outcome.LATE if how == "late" else Outcome.FAILED
            assert asking.result() == (None if what == "find" else [expected] * 2)
        await node.close()
    for slot in slots:
        assert slot == bytes(VALUE)


@pytest.mark.asyncio
@pytest.mark.real_clock
async def test_what_was_withdrawn_while_its_lane_connected_is_not_done_when_it_has() -> None:
    async with liar() as server:
        node = InfiniStoreTcpNode("n", "127.0.0.1", server.port, value_bytes=VALUE, connections=1, connect_timeout_s=10.0)
        assert await node.write([Item("a", memoryview(b"x" * VALUE))], time.monotonic() + 5) == [Outcome.DONE]
        port = server.port
    slot = bytearray(VALUE)
    with nobody_accepts(port):
        assert await node.read([Item("a", memoryview(slot)), Item("b", memoryview(bytearray(VALUE)))], time.monotonic() + 0.2) == [
            Outcome.LATE,
            Outcome.LATE,
        ]
    slot[:] = b"B" * VALUE  # it is another block's now
    async with liar(port) as server:
        server.store[b"a"] = b"x"
        async with asyncio.timeout(10):
            while await node.find(["a"], time.monotonic() + 5) != [True]:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert server.gets == []
    assert slot == b"B" * VALUE
    await node.close()
