"""The table of transitions itself."""

from __future__ import annotations

from kvoffload.l1 import TRANSITIONS, State


def test_every_state_is_in_the_table_and_none_follows_itself() -> None:
    assert set(TRANSITIONS) == set(State)
    assert all(state not in following for state, following in TRANSITIONS.items())


def test_every_slot_can_be_used_and_freed_again() -> None:
    for start in State:
        reached = {start}
        for _ in State:
            reached |= {after for state in reached for after in TRANSITIONS[state]}
        assert reached == set(State), f"from {start!r} not every state can be reached"


def test_ready_is_reached_by_filling_alone() -> None:
    assert {state for state, after in TRANSITIONS.items() if State.READY in after} == {State.FILLING, State.FILLED}


def test_a_slot_that_may_still_be_written_is_not_freed_directly() -> None:
    assert State.FREE not in TRANSITIONS[State.FILLING]
    assert State.FILLING not in TRANSITIONS[State.DOOMED] | TRANSITIONS[State.QUARANTINED] | TRANSITIONS[State.CONDEMNED]
