"""A slot that a node may still touch is nobody else's: the late writer and the late reader, through whole engines whose L1 is so small
that every slot is wanted."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from tests.pipeline.engines import Engine, engine
from tests.pipeline.sites import FakeSite

from kvoffload.l1.states import State
from kvoffload.l2.node import Item, Outcome
from kvoffload.testing.fake_node import FakeNode, NodeFault

pytestmark = pytest.mark.asyncio

SLOTS, COUNT = 16, 8
"""Of L1, and of a prompt: half of L1 is what may be fetched at once."""
OLD = 1


class LyingNode(FakeNode):
    """Says FAILED of reads whose buffers it goes on writing to."""

    async def read(self, items: Sequence[Item], deadline: float) -> list[Outcome]:
        outcomes = await super().read(items, deadline)
        return [Outcome.FAILED if outcome is Outcome.UNSETTLED else outcome for outcome in outcomes]


class WatchingNode(FakeNode):
    """Remembers what it was given to write and has not settled."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.given: list[tuple[Item, bytes]] = []

    async def write(self, items: Sequence[Item], deadline: float) -> list[Outcome]:
        outcomes = await super().write(items, deadline)
        unsettled = [item for item, outcome in zip(items, outcomes, strict=True) if outcome is Outcome.UNSETTLED]
        self.given += [(item, bytes(item.buffer)) for item in unsettled]
        return outcomes

    @property
    def changed(self) -> list[str]:
        return [item.name for item, value in self.given if bytes(item.buffer) != value]


async def reads_unsettled(site: FakeSite, reader: Engine) -> None:
    async with engine(site) as writer:
        assert await writer.write(OLD, COUNT) == COUNT
    site.fail("read", NodeFault.UNSETTLED)
    assert await reader.load(OLD, COUNT) == 0
    site.fail("read", NodeFault.NONE)


async def fill_and_compare(site: FakeSite, engine: Engine, prompts: range) -> int:
    """Want all of L1 again and again, the late writer at work all the time; the most blocks that L1 had at once."""
    most = 0
    for prompt in prompts:
        await engine.save(prompt, COUNT)
        site.each(lambda node: node.scribble())
        for earlier in range(prompts.start, prompt + 1):
            await engine.load(earlier, COUNT)
        site.each(lambda node: node.scribble())
        await engine.load(prompt, COUNT)
        most = max(most, engine.statistics.slots[State.READY])
    return most


async def test_a_late_writer() -> None:
    """It writes long after the deadline, and again and again, into slots that no other block gets until it is known to have stopped."""
    site = FakeSite()
    async with engine(site, slots=SLOTS) as reader:
        await reads_unsettled(site, reader)
        await reader.until(lambda: reader.statistics.slots[State.QUARANTINED] == COUNT, "they are out of use")
        assert reader.remote.unsettled == COUNT
        assert sum(site.each(lambda node: node.unsettled)) == COUNT
        assert await fill_and_compare(site, reader, range(10, 20)) <= SLOTS - COUNT
        assert reader.statistics.slots[State.QUARANTINED] == COUNT
        site.each(lambda node: node.settle_now())
        await reader.until(lambda: reader.remote.unsettled == 0, "they are of use again")
        assert await fill_and_compare(site, reader, range(20, 30)) == SLOTS
        await reader.check()


async def test_a_writer_that_nobody_knows_of_would_be_seen() -> None:
    """So the test above can fail: of a client that says it has stopped when it has not, other blocks show the bytes."""
    site = FakeSite()
    site.kind = LyingNode
    async with engine(site, slots=SLOTS) as reader:
        await reads_unsettled(site, reader)
        await reader.until(lambda: reader.statistics.slots[State.FREE] == SLOTS, "they are of use again, wrongly")
        with pytest.raises(AssertionError, match="is wrong"):
            await fill_and_compare(site, reader, range(10, 20))


async def test_a_late_writer_when_the_engine_ends() -> None:
    """Bounded, and what is not settled stays out of use."""
    site = FakeSite()
    async with engine(site, slots=SLOTS) as reader:
        await reads_unsettled(site, reader)


async def test_a_late_reader() -> None:
    """What a node may still send is not overwritten, however much L1 wants the slots: a value would be stored that never was."""
    site = FakeSite()
    site.kind = WatchingNode
    async with engine(site, slots=SLOTS) as writer:
        site.fail("write", NodeFault.UNSETTLED)
        await writer.save(OLD, COUNT)
        await writer.until(lambda: writer.remote.unsettled == COUNT, "they are not settled")
        site.fail("write", NodeFault.NONE)
        for prompt in range(10, 20):
            await writer.save(prompt, COUNT)
            await writer.load(prompt, COUNT)
            await writer.load(OLD, COUNT)
            assert site.each(lambda node: node.changed) == [[]]  # type: ignore[attr-defined]
        site.each(lambda node: node.settle_now())
        await writer.check()
        for prompt in range(20, 24):
            assert (await writer.save(prompt, COUNT)).stored_tokens
        assert site.each(lambda node: node.changed) != [[]], "nobody wanted those slots"  # type: ignore[attr-defined]
