"""Bytes under way: never more than allowed, first come first served, nothing lost."""

from __future__ import annotations

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvoffload.l2.budget import ByteBudget, Ticket


def granted(tickets: list[Ticket]) -> list[int]:
    return [index for index, ticket in enumerate(tickets) if ticket.is_granted]


def test_first_come_first_served() -> None:
    budget = ByteBudget(10)
    tickets = [budget.ask(num_bytes) for num_bytes in (6, 4, 8, 1)]
    assert granted(tickets) == [0, 1]
    budget.give_back(tickets[1])
    assert granted(tickets) == [0], "the last would fit, and does not overtake"
    budget.give_back(tickets[0])
    assert granted(tickets) == [2, 3]


def test_more_than_all_is_all() -> None:
    budget = ByteBudget(10)
    big, small = budget.ask(1000), budget.ask(1)
    assert granted([big, small]) == [0]
    budget.give_back(big)
    assert granted([big, small]) == [1]


def test_who_gives_up_lets_the_next_one_in() -> None:
    budget = ByteBudget(10)
    tickets = [budget.ask(5), budget.ask(9), budget.ask(5)]
    assert granted(tickets) == [0]
    budget.give_back(tickets[1])
    assert granted(tickets) == [0, 2]


@pytest.mark.anyio
async def test_waiting_is_bounded() -> None:
    budget = ByteBudget(10)
    first, second = budget.ask(10), budget.ask(1)
    assert await first.wait(0)
    begun = anyio.current_time()
    with second:
        assert not await second.wait(30)
    assert anyio.current_time() - begun == pytest.approx(30)
    third = budget.ask(1)
    budget.give_back(first)
    assert await third.wait(0)


@pytest.mark.anyio
async def test_the_refused_get_nothing_and_the_granted_go_on() -> None:
    budget = ByteBudget(10)
    first, second = budget.ask(10), budget.ask(1)
    budget.refuse_all()
    assert await first.wait(30)
    begun = anyio.current_time()
    assert not await second.wait(30)
    assert anyio.current_time() == begun, "it is told at once"
    budget.give_back(second)
    budget.give_back(first)
    assert await budget.ask(10).wait(0)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=80))
def test_whatever_is_asked_and_given_back(steps: list[tuple[bool, int]]) -> None:
    budget = ByteBudget(20)
    waiting_or_granted: list[Ticket] = []
    for asks, number in steps:
        if asks:
            waiting_or_granted.append(budget.ask(number))
        elif waiting_or_granted:
            ticket = waiting_or_granted.pop(number % len(waiting_or_granted))
            budget.give_back(ticket)
            budget.give_back(ticket)
        out = [ticket.num_bytes for ticket in waiting_or_granted if ticket.is_granted]
        assert sum(out) <= 20
        places = granted(waiting_or_granted)
        assert places == list(range(len(places))), "in the order of asking"
        waiting = [ticket.num_bytes for ticket in waiting_or_granted if not ticket.is_granted]
        assert not waiting or sum(out) + waiting[0] > 20, "nobody waits for nothing"
    for ticket in waiting_or_granted:
        budget.give_back(ticket)
    assert budget.ask(20).is_granted, "nothing was lost"
