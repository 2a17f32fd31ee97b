"""What an actor leaves unsettled is reported once, when its node touches it no more, and cleared before that where it was fetched into."""

from __future__ import annotations

import anyio
import pytest

from kvoffload.l2.node import Item, Outcome
from kvoffload.l2.remains import Remains, Reports
from kvoffload.messages import BlocksFound, FetchFinished, FromL2, TransfersSettled, WriteFinished
from kvoffload.testing.fake_node import FakeNode, NodeFault


class Rig:
    def __init__(self) -> None:
        self.node = FakeNode("n", clock=anyio.current_time)
        self.seen: list[FromL2 | tuple[int, ...]] = []
        """Reports, and slots that were cleared."""
        self.remains = Remains(self.node, "n", self.seen.append, self.seen.append)

    async def unsettle(self) -> None:
        """The node has a buffer that it may touch."""
        self.node.fail_next("read", NodeFault.UNSETTLED)
        assert await self.node.read([Item("x", memoryview(bytearray(8)))], anyio.current_time() + 1) == [Outcome.UNSETTLED]


def test_what_an_actor_left_is_what_it_called_unsettled_and_did_not_settle() -> None:
    forwarded: list[FromL2] = []
    reports = Reports(forwarded.append)
    messages: list[FromL2] = [
        BlocksFound(1, "n", (True,)),
        FetchFinished(2, "n", (1,), (), ()),
        FetchFinished(3, "n", (), (), (2,), unsettled=(3, 4)),
        WriteFinished(4, "n", (5,), (), unsettled=(6,)),
        FetchFinished(5, "n", (), (), (), unsettled=(7, 8)),
        TransfersSettled(4, "n", (6,)),
        TransfersSettled(5, "n", (8,)),
    ]
    for message in messages:
        reports(message)
    assert forwarded == messages
    assert reports.left() == {3: (3, 4), 5: (7,)}
    assert reports.left() == {}, "nobody reports it twice"


@pytest.mark.anyio
async def test_it_is_reported_once_the_node_has_settled() -> None:
    rig = Rig()
    await rig.unsettle()
    rig.remains.add({3: (1, 2)}, of_fetches=True)
    rig.remains.add({4: (5,)}, of_fetches=False)
    assert len(rig.remains) == 3
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.remains.settle)
        await anyio.sleep(3600)
        assert not rig.seen
        rig.remains.add({5: (6,)}, of_fetches=False)  # after it had asked: the node may still touch that one
        rig.node.settle_now()
    assert rig.seen == [(1, 2), TransfersSettled(3, "n", (1, 2)), TransfersSettled(4, "n", (5,))]
    assert len(rig.remains) == 1
    rig.remains.closed()
    assert rig.seen[3:] == [TransfersSettled(5, "n", (6,))]
    rig.remains.closed()
    assert len(rig.seen) == 4


@pytest.mark.anyio
async def test_what_the_close_settled_is_not_reported_again() -> None:
    rig = Rig()
    await rig.unsettle()
    rig.remains.add({3: (1,)}, of_fetches=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.remains.settle)
        await anyio.sleep(1)
        rig.remains.closed()
        assert len(rig.seen) == 2
        rig.node.settle_now()
    assert len(rig.seen) == 2
