"""When a node is left alone, and when it is tried again: by tables, and against a model."""

from __future__ import annotations

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvoffload.errors import MisuseError
from kvoffload.l2.breaker import Breaker, BreakerSettings, BreakerState, overall
from kvoffload.l2.node import Outcome

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
EXACT = BreakerSettings(jitter=0.0)


class Node:
    """A breaker, and the clock of whoever uses it."""

    def __init__(self, settings: BreakerSettings = EXACT, chance: float = 0.5) -> None:
        self.breaker = Breaker(settings, chance=lambda: chance)
        self.now = 100.0

    def call(self, outcome: Outcome, seconds: float = 0.001, values: int = 1) -> bool:
        """False: it was not allowed."""
        if not self.breaker.allow(self.now):
            return False
        self.now += seconds
        self.breaker.record(outcome, seconds, self.now, values)
        return True

    def calls(self, count: int, outcome: Outcome, seconds: float = 0.001) -> int:
        """How many of them were made."""
        return sum(self.call(outcome, seconds) for _ in range(count))

    def wait_for_probe(self, most_s: float = 1e4) -> float:
        """Until a call would be the probe; how long that took, to 10 ms."""
        begun = self.now
        while not self.breaker.allow(self.now):
            self.now += 0.01
            assert self.now - begun < most_s, "it never tries again"
        return self.now - begun

    def probe(self, outcome: Outcome, seconds: float = 0.001) -> float:
        waited = self.wait_for_probe()
        self.now += seconds
        self.breaker.record(outcome, seconds, self.now, 1)
        return waited

    @property
    def state(self) -> BreakerState:
        return self.breaker.state


@pytest.mark.parametrize(("outcome", "calls"), [(Outcome.FAILED, 5), (Outcome.UNSETTLED, 5), (Outcome.LATE, 3), (Outcome.FULL, 1)])
def test_it_opens_after_so_many_in_a_row(outcome: Outcome, calls: int) -> None:
    node = Node()
    node.calls(9, Outcome.DONE)
    assert node.calls(100, outcome, seconds=0.05) == calls
    assert node.state is OPEN
    assert node.breaker.statistics().refused == 100 - calls


@pytest.mark.parametrize("outcome", [Outcome.DONE, Outcome.ABSENT, Outcome.MALFORMED])
def test_what_a_well_node_answers_never_opens_it(outcome: Outcome) -> None:
    node = Node()
    assert node.calls(1000, outcome) == 1000
    assert node.state is CLOSED


def test_an_answer_ends_a_row_of_errors() -> None:
    node = Node(BreakerSettings(share=1.0, jitter=0.0))
    for _ in range(50):
        assert node.calls(4, Outcome.FAILED) == 4
        assert node.call(Outcome.ABSENT)


def test_errors_that_are_not_in_a_row_open_it_by_their_share() -> None:
    node = Node()
    made = 0
    while node.state is CLOSED and made < 100:
        made += node.call(Outcome.FAILED if made % 2 else Outcome.DONE)
    assert made == 10
    assert node.breaker.statistics().reason == "5 of 10 calls failed"


def test_errors_of_long_ago_do_not_count() -> None:
    node = Node()
    for _ in range(100):
        assert node.calls(2, Outcome.FAILED) == 2
        node.now += EXACT.window_s
        assert node.call(Outcome.DONE)


def test_a_deadline_that_was_too_near_says_nothing() -> None:
    node = Node()
    assert node.calls(100, Outcome.LATE, seconds=0.001) == 100
    node.calls(5, Outcome.FAILED)
    node.probe(Outcome.LATE)
    assert node.state is HALF_OPEN
    assert node.breaker.allow(node.now), "the probe proved nothing, so there is another"


def test_waits_double_up_to_the_most_and_a_success_closes() -> None:
    node = Node()
    node.calls(5, Outcome.FAILED)
    waits = [node.probe(Outcome.FAILED) for _ in range(9)]
    assert waits == pytest.approx([0.5, 1, 2, 4, 8, 16, 30, 30, 30], abs=0.05)
    node.probe(Outcome.DONE)
    assert node.state is CLOSED
    assert node.calls(100, Outcome.DONE) == 100


def test_one_that_closes_and_opens_again_soon_goes_on_where_it_was() -> None:
    node = Node()
    node.calls(5, Outcome.FAILED)
    for wait in (0.5, 1, 2):
        assert node.probe(Outcome.DONE) == pytest.approx(wait, abs=0.05)
        node.calls(5, Outcome.FAILED)
    node.probe(Outcome.DONE)
    node.now += EXACT.calm_s
    node.calls(5, Outcome.FAILED)
    assert node.probe(Outcome.DONE) == pytest.approx(0.5, abs=0.05), "it was calm in between"


def test_one_that_answered_some_calls_is_well_again() -> None:
    """One error in a thousand, and it opens at the first: the waits stay short."""
    node = Node(BreakerSettings(errors=1, jitter=0.0))
    for answers, wait in ((EXACT.calm_calls, 0.5), (EXACT.calm_calls, 0.5), (EXACT.calm_calls - 1, 1), (0, 2), (EXACT.calm_calls, 0.5)):
        assert node.calls(answers, Outcome.DONE) == answers
        node.call(Outcome.FAILED)
        assert node.probe(Outcome.DONE) == pytest.approx(wait, abs=0.05)


def test_a_call_of_before_is_neither_the_probe_nor_counted_after_it() -> None:
    """Some were under way when it opened, and end one by one, by their own deadlines."""
    node = Node(BreakerSettings(errors=1, jitter=0.0))
    node.call(Outcome.FAILED)
    node.wait_for_probe()
    node.breaker.record(Outcome.LATE, 5.0, node.now + 0.1)
    node.breaker.record(Outcome.DONE, 5.0, node.now + 0.2)
    assert node.state is HALF_OPEN
    node.breaker.record(Outcome.DONE, 0.1, node.now + 0.3)
    assert node.state is CLOSED
    node.breaker.record(Outcome.FAILED, 5.0, node.now + 0.4)
    assert node.state is CLOSED
    node.breaker.record(Outcome.FAILED, 0.05, node.now + 0.5)
    assert node.state is OPEN


def test_where_it_may_doubt_the_first_timeouts_bring_a_probe_at_once() -> None:
    node = Node(BreakerSettings(timeouts=2, doubts=True, jitter=0.0))
    waits = []
    for _ in range(4):
        node.calls(2, Outcome.LATE, seconds=0.05)
        waits.append(node.probe(Outcome.DONE))
    assert waits == pytest.approx([0, 0.5, 1, 2], abs=0.02)
    assert (node.breaker.statistics().doubts, node.breaker.statistics().openings) == (1, 3)
    node.calls(EXACT.calm_calls, Outcome.DONE)
    node.calls(2, Outcome.LATE, seconds=0.05)
    assert [node.probe(Outcome.FAILED) for _ in range(3)] == pytest.approx([0, 0.5, 1], abs=0.02)
    node.probe(Outcome.DONE)
    node.calls(EXACT.calm_calls, Outcome.DONE)
    node.calls(5, Outcome.FAILED)
    assert node.probe(Outcome.DONE) == pytest.approx(0.5, abs=0.02), "an error is no doubt"


@pytest.mark.parametrize(("chance", "wait"), [(0.0, 0.4), (0.5, 0.5), (1.0, 0.6)])
def test_waits_are_jittered(chance: float, wait: float) -> None:
    node = Node(BreakerSettings(), chance)
    node.calls(5, Outcome.FAILED)
    assert node.probe(Outcome.DONE) == pytest.approx(wait, abs=0.02)


def test_a_full_node_is_left_alone_for_longer() -> None:
    node = Node()
    node.call(Outcome.FULL)
    assert node.breaker.statistics().reason == "the node is full"
    assert [node.probe(Outcome.FULL) for _ in range(6)] == pytest.approx([10, 20, 40, 80, 120, 120], abs=0.05)
    node.probe(Outcome.DONE)
    assert node.state is CLOSED


def test_there_is_one_probe_at_a_time() -> None:
    node = Node()
    node.calls(5, Outcome.FAILED)
    node.wait_for_probe()
    assert node.state is HALF_OPEN
    assert not any(node.breaker.allow(node.now) for _ in range(10))


def test_a_probe_that_nobody_reports_is_lost_and_another_may_come() -> None:
    node = Node()
    node.calls(5, Outcome.FAILED)
    node.wait_for_probe()
    assert node.wait_for_probe() == pytest.approx(EXACT.probe_s, abs=0.05)


def test_what_comes_in_while_it_is_open_changes_nothing() -> None:
    node = Node()
    node.calls(5, Outcome.FAILED)
    for outcome in Outcome:
        node.breaker.record(outcome, 1.0, node.now)
    assert node.state is OPEN
    assert node.breaker.statistics().openings == 1
    assert node.wait_for_probe() == pytest.approx(0.5, abs=0.05)


def test_a_node_that_gets_much_slower_is_left_alone() -> None:
    node = Node()
    node.calls(100, Outcome.DONE, seconds=0.002)
    made = node.calls(100, Outcome.DONE, seconds=0.5)
    assert made < 10
    reason = node.breaker.statistics().reason
    assert reason is not None
    assert "a value takes" in reason
    node.probe(Outcome.DONE, seconds=0.002)
    assert node.state is CLOSED
    assert node.calls(100, Outcome.DONE, seconds=0.002) == 100


def test_a_node_that_stays_slow_is_used_again_after_some_probes() -> None:
    """A network that got worse for good: whether loading pays then is decided elsewhere."""
    node = Node()
    node.calls(100, Outcome.DONE, seconds=0.002)
    node.calls(10, Outcome.DONE, seconds=0.5)
    probes = 0
    while node.state is not CLOSED:
        node.probe(Outcome.DONE, seconds=0.5)
        probes += 1
        assert probes < 10
    assert probes > 1
    assert node.calls(1000, Outcome.DONE, seconds=0.5) > 990


@pytest.mark.parametrize(
    ("usual", "now"),
    [(0.002, 0.015), (0.0001, 0.09), (0.5, 4.0)],
    ids=["not ten times", "ten times, but quick all the same", "slow, and always was"],
)
def test_slower_is_not_much_slower(usual: float, now: float) -> None:
    node = Node()
    node.calls(100, Outcome.DONE, seconds=usual)
    assert node.calls(1000, Outcome.DONE, seconds=now) == 1000


def test_one_slow_call_is_no_reason() -> None:
    node = Node()
    for _ in range(50):
        assert node.calls(20, Outcome.DONE, seconds=0.002) == 20
        assert node.call(Outcome.DONE, seconds=1.0)


def test_latency_is_that_of_a_value_and_not_judged_where_their_number_is_not_told() -> None:
    node = Node()
    node.calls(100, Outcome.DONE, seconds=0.002)
    for _ in range(100):
        assert node.call(Outcome.DONE, seconds=1.0, values=500)
        assert node.call(Outcome.DONE, seconds=10.0, values=0)
    assert node.breaker.statistics().normal_s == pytest.approx(0.002, rel=0.1)


def test_a_clock_that_stands_still_does_no_harm() -> None:
    node = Node()
    assert node.calls(1000, Outcome.DONE, seconds=0.0) == 1000
    assert node.calls(100, Outcome.FAILED, seconds=0.0) == 5


@pytest.mark.parametrize(
    ("outcomes", "whole"),
    [
        ((), Outcome.DONE),
        ((Outcome.DONE, Outcome.ABSENT), Outcome.DONE),
        ((Outcome.ABSENT,), Outcome.ABSENT),
        ((Outcome.ABSENT, Outcome.MALFORMED), Outcome.MALFORMED),
        ((Outcome.DONE, Outcome.FULL), Outcome.FULL),
        ((Outcome.LATE, Outcome.FULL), Outcome.LATE),
        ((Outcome.LATE, Outcome.ABSENT), Outcome.LATE),
        ((Outcome.DONE, Outcome.LATE), Outcome.DONE),
        ((Outcome.DONE, Outcome.LATE, Outcome.UNSETTLED), Outcome.UNSETTLED),
        ((Outcome.DONE, Outcome.FAILED), Outcome.FAILED),
    ],
)
def test_what_a_batch_says(outcomes: tuple[Outcome, ...], whole: Outcome) -> None:
    assert overall(outcomes) is whole
    assert overall(outcomes[::-1]) is whole


@pytest.mark.parametrize(
    "wrong",
    [
        {"errors": 0},
        {"timeouts": 0},
        {"calm_calls": 0},
        {"share": 0.0},
        {"share": 1.1},
        {"jitter": 1.0},
        {"window_s": 0.0},
        {"slow_factor": 1.0},
        {"backoff_s": 31.0},
        {"full_backoff_s": 121.0},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(MisuseError):
        BreakerSettings(**wrong)  # type: ignore[arg-type]


class BreakerMachine(RuleBasedStateMachine):
    """Any calls at any times, some of them never reported. The model knows when calls must be refused, and when they must not."""

    @initialize(jitter=st.sampled_from([0.0, 0.3]), chance=st.floats(0, 1))
    def build(self, jitter: float, chance: float) -> None:
        self.settings = BreakerSettings(jitter=jitter)
        self.breaker = Breaker(self.settings, chance=lambda: chance)
        self.now = 0.0
        self.failures = 0  # in a row, of any kind
        self.has_failed = False
        self.opened_at = -math.inf
        self.probed_at = -math.inf
        self.changed_at = -math.inf

    def longest(self) -> float:
        return self.settings.full_backoff_most_s * (1 + self.settings.jitter)

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.1, 1.0, 10.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(
        outcome=st.sampled_from(Outcome) | st.sampled_from([Outcome.DONE, Outcome.FAILED]),
        seconds=st.sampled_from([0.0, 0.001, 0.05, 0.5]),
        values=st.integers(0, 3),
        is_reported=st.sampled_from([True, True, True, False]),
    )
    def call(self, outcome: Outcome, seconds: float, values: int, is_reported: bool) -> None:
        before = self.breaker.state
        allowed = self.breaker.allow(self.now)
        if before is CLOSED:
            assert allowed, "a closed breaker refuses nothing"
        elif before is OPEN and allowed:
            least = self.settings.backoff_s * (1 - self.settings.jitter)
            assert self.now - self.opened_at >= least * 0.999, "it was left alone for no time"
        elif before is OPEN:
            assert self.now - self.opened_at < self.longest() * 1.001, "it is never tried again"
        elif not allowed:
            assert self.now - self.probed_at < self.settings.probe_s, "the probe is lost, and nobody tries again"
        if allowed and before is not CLOSED:
            assert self.breaker.state is HALF_OPEN
            self.probed_at = self.changed_at = self.now
        if allowed and is_reported:
            self.now += seconds
            self.report(outcome, seconds, values)

    @rule(outcome=st.sampled_from(Outcome), seconds=st.sampled_from([0.001, 0.5]))
    def a_call_of_before_comes_in(self, outcome: Outcome, seconds: float) -> None:
        self.report(outcome, seconds, 1)

    def report(self, outcome: Outcome, seconds: float, values: int) -> None:
        before = self.breaker.state
        self.breaker.record(outcome, seconds, self.now, values)
        says_nothing = outcome is Outcome.LATE and seconds < self.settings.fair_s
        if before is OPEN or says_nothing or self.now - seconds < self.changed_at - 1e-4:
            assert self.breaker.state is before
            return
        is_failure = outcome in (Outcome.FAILED, Outcome.LATE, Outcome.UNSETTLED)
        self.has_failed |= is_failure
        self.failures = self.failures + 1 if is_failure else 0
        is_open = self.breaker.state is OPEN
        if outcome is Outcome.FULL or (before is HALF_OPEN and is_failure) or self.failures >= self.settings.errors:
            assert is_open
        if before is HALF_OPEN and not is_open:
            assert self.breaker.state is CLOSED
        if is_open:
            self.opened_at = self.now
        if self.breaker.state is not before:
            self.failures = 0
            self.changed_at = self.now

    @precondition(lambda self: self.breaker.state is not CLOSED)
    @rule()
    def it_comes_back(self) -> None:
        """From wherever it is, a node that is well again is soon used again."""
        for _ in range(20):
            if self.breaker.allow(self.now):
                self.probed_at = self.changed_at = self.now
                self.now += 0.001
                self.report(Outcome.DONE, 0.001, 1)
            if self.breaker.state is CLOSED:
                return
            self.now += self.longest()
        raise AssertionError("it does not close")

    @invariant()
    def counts_are_sound(self) -> None:
        if not hasattr(self, "breaker"):
            return
        counted = self.breaker.statistics()
        assert counted.state is self.breaker.state
        assert (counted.openings == 0) == (counted.reason is None)
        assert counted.state is CLOSED or counted.openings > 0


BreakerMachine.TestCase.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)
TestBreakerMachine = BreakerMachine.TestCase
