"""What the engine's steps say of how fast it computes prompts."""

from __future__ import annotations

from kvoffload.connector.prefill_rate import SAMPLES, PrefillRate


def test_it_is_unknown_at_first_and_decoding_does_not_tell() -> None:
    rate = PrefillRate()
    for step in range(10):
        rate.planned(8, step * 0.1)
    assert rate.tokens_per_s == 0.0


def test_a_prompt_s_step_ends_with_the_next_plan() -> None:
    rate = PrefillRate()
    rate.planned(1000, 5.0)
    rate.planned(1, 5.5)
    assert rate.tokens_per_s == 2000


def test_the_last_step_before_idling_ends_with_its_request() -> None:
    rate = PrefillRate()
    rate.planned(1000, 5.0)
    rate.finished(5.5)
    rate.planned(1000, 100.0)  # the engine had nothing to do in between
    rate.finished(100.5)
    assert rate.tokens_per_s == 2000


def test_time_in_which_nothing_is_computed_does_not_count() -> None:
    rate = PrefillRate()
    rate.planned(1000, 1.0)
    rate.planned(0, 1.5)  # waiting for a load
    rate.planned(0, 9.0)
    rate.planned(1000, 10.0)
    rate.planned(1, 10.5)
    assert rate.tokens_per_s == 2000


def test_with_steps_planned_ahead_two_of_them_are_the_window() -> None:
    rate = PrefillRate(window=2)
    rate.planned(1000, 0.0)
    rate.planned(1000, 0.001)  # planned while the first one runs
    rate.planned(1000, 1.0)  # the first one ended
    assert rate.tokens_per_s == 2000
    rate.planned(1000, 2.0)
    assert rate.tokens_per_s == (2000 + 2000 / 1.999) / 2


def test_one_step_that_took_long_changes_little() -> None:
    rate = PrefillRate()
    for step in range(SAMPLES):
        rate.planned(1000, step * 1.0)
    rate.planned(1000, SAMPLES + 60.0)
    assert rate.tokens_per_s == 1000
