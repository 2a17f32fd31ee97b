"""What became of a block, and whose turn it is."""

from __future__ import annotations

import anyio
import pytest

from kvoffload.l2.node import Outcome
from kvoffload.l2.transfers import Turns, by_block


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
