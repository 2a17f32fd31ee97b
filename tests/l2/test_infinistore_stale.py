"""Nothing of a call that ended badly is done later, in a buffer that is somebody else's by then."""

from __future__ import annotations

import asyncio
import time

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
