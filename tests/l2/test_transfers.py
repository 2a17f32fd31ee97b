"""Slots as values, what became of a block, and whose turn it is."""

from __future__ import annotations

from collections.abc import Iterator

import anyio
import numpy as np
import pytest

from kvoffload.errors import InternalError, MisuseError
from kvoffload.l2.node import Outcome
from kvoffload.l2.transfers import SlotBuffers, Turns, by_block, items_of, names_of, parts_of
from kvoffload.segment import Segment

KEYS = [bytes([index]) * 24 for index in range(4)]


@pytest.fixture
def segments() -> Iterator[list[Segment]]:
    made = [Segment.create(4 * 4096, 4096) for _ in range(2)]
    for segment in made:
        segment.populate_next()
        segment.array[:] = 1
    yield made
    for segment in made:
        segment.close()


def test_a_value_is_header_and_payload_and_not_what_fills_the_slot(segments: list[Segment]) -> None:
    slots = SlotBuffers(segments, 1000)
    assert (slots.ranks, slots.value_bytes, slots.block_bytes) == (2, 1064, 2128)
    slots.array(1, 2)[:] = 7
    assert (segments[1].slot(2)[:1064] == 7).all()
    assert (segments[1].slot(2)[1064:] == 1).all()
    assert (segments[0].array == 1).all()


def test_clearing_takes_the_headers_of_all_ranks_and_nothing_else(segments: list[Segment]) -> None:
    SlotBuffers(segments, 1000).clear([1, 3])
    for segment in segments:
        for slot in range(4):
            assert (segment.slot(slot)[:64] == (0 if slot in (1, 3) else 1)).all()
            assert (segment.slot(slot)[64:] == 1).all()


def test_a_segment_that_is_gone_or_too_small_is_no_buffer(segments: list[Segment]) -> None:
    with pytest.raises(InternalError, match="slot 0 of rank 0"):
        SlotBuffers(segments, 4096).array(0, 0)
    with pytest.raises(MisuseError, match="slot 9"):
        SlotBuffers(segments, 1000).array(0, 9)
    closed = Segment.create(4096, 4096)
    closed.close()
    with pytest.raises(InternalError, match="closed"):
        SlotBuffers([closed], 1000).array(0, 0)


@pytest.mark.anyio
async def test_parts_names_and_items_go_block_by_block(segments: list[Segment]) -> None:
    slots = SlotBuffers(segments, 1000)
    parts = await parts_of(slots, [3, 1], KEYS[:2])
    assert [(part.key, part.rank) for part in parts] == [(KEYS[0], 0), (KEYS[0], 1), (KEYS[1], 0), (KEYS[1], 1)]
    items = items_of("here", parts, writable=True)
    assert [item.name for item in items] == names_of("here", KEYS[:2], 2)
    assert len({item.name for item in items}) == 4
    items[1].buffer[:] = bytes([9]) * 1064
    assert (segments[1].slot(3)[:1064] == 9).all(), "no copy"
    assert all(item.buffer.readonly for item in items_of("here", parts, writable=False))
    with pytest.raises(ValueError, match="argument"):
        await parts_of(slots, [1, 2], KEYS[:1])


@pytest.mark.anyio
async def test_a_long_batch_lets_others_run(segments: list[Segment]) -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await anyio.lowlevel.checkpoint()
            turns += 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(other)
        parts = await parts_of(SlotBuffers(segments, 1000), [0] * 500, KEYS[:1] * 500)
        tasks.cancel_scope.cancel()
    assert len(parts) == 1000
    assert turns >= 3


@pytest.mark.parametrize(
    ("outcomes", "ranks", "blocks"),
    [
        ([], 2, []),
        ([Outcome.DONE, Outcome.ABSENT], 1, [Outcome.DONE, Outcome.ABSENT]),
        ([Outcome.DONE, Outcome.DONE, Outcome.DONE, Outcome.ABSENT], 2, [Outcome.DONE, Outcome.ABSENT]),
        ([Outcome.ABSENT, Outcome.LATE], 2, [Outcome.LATE]),
        ([Outcome.MALFORMED, Outcome.ABSENT], 2, [Outcome.MALFORMED]),
        ([Outcome.UNSETTLED, Outcome.FAILED, Outcome.FAILED, Outcome.UNSETTLED], 2, [Outcome.UNSETTLED, Outcome.UNSETTLED]),
    ],
)
def test_a_block_is_its_gravest_part(outcomes: list[Outcome], ranks: int, blocks: list[Outcome]) -> None:
    assert by_block(outcomes, ranks) == blocks


def test_one_part_that_is_not_done_keeps_its_block_from_being_so() -> None:
    for outcome in Outcome:
        assert (by_block([Outcome.DONE, outcome], 2) == [Outcome.DONE]) is (outcome is Outcome.DONE)


@pytest.mark.anyio
async def test_writes_wait_for_all_reads_and_no_longer_than_their_patience() -> None:
    turns = Turns()
    begun = anyio.current_time()
    assert await turns.wait_to_write(10)
    assert anyio.current_time() == begun

    async def read(seconds: float) -> None:
        with turns.reading():
            await anyio.sleep(seconds)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read, 3)
        tasks.start_soon(read, 5)
        await anyio.wait_all_tasks_blocked()
        assert not await turns.wait_to_write(1)
        assert await turns.wait_to_write(10)
        assert anyio.current_time() - begun == pytest.approx(5)


@pytest.mark.anyio
async def test_a_read_that_fails_is_over() -> None:
    turns = Turns()
    with pytest.raises(ZeroDivisionError), turns.reading():
        raise ZeroDivisionError
    assert await turns.wait_to_write(0)


def test_views_are_of_the_segment_itself(segments: list[Segment]) -> None:
    assert np.shares_memory(SlotBuffers(segments, 1000).array(0, 0), segments[0].array)
