"""How many tokens a request is told that L1 has, and when."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.connector.ports import BLOCK_SIZE, Clock, FakeHub, hit_for, make_record

from kvoffload.connector.matcher import Matcher, MatchSettings
from kvoffload.connector.record import Phase, RequestRecord
from kvoffload.messages import ForgetRequest, HitReason, MatchPrefix, PrefixHit, ReleaseHit


class Bench:
    """A matcher on a hub that answers when told to."""

    def __init__(self, **settings: float) -> None:
        self.clock = Clock()
        self.hub = FakeHub(self.clock)
        self.records: dict[str, RequestRecord] = {}
        self.matcher = Matcher(self.hub, MatchSettings(**settings), self.pump, self.clock)  # type: ignore[arg-type]

    def pump(self) -> None:
        for message in self.hub.take():
            assert isinstance(message, PrefixHit)
            self.matcher.on_hit(message, self.records.get(message.request))

    def record(self, name: str = "r", tokens: int = 21) -> RequestRecord:
        record = self.records[name] = make_record(name, tokens)
        return record

    def ask(self, record: RequestRecord, computed: int = 0, *, idle: bool = False) -> int | None:
        """In a step of its own."""
        self.matcher.has_waited_in_vain = False
        return self.matcher.answer(record, computed, engine_is_idle=idle)

    def answer_in_wait(self, make: Callable[[], PrefixHit]) -> None:
        self.hub.on_wait = lambda timeout_s: self.hub.inbox.append(make())

    def held(self, slots: int = 4, **changes: float) -> RequestRecord:
        """A record that was answered with a hit of this many blocks."""
        record = self.record()
        self.answer_in_wait(lambda: hit_for(record, slots, **changes))  # type: ignore[arg-type]
        assert self.ask(record, idle=True) == slots * BLOCK_SIZE
        self.hub.on_wait = lambda timeout_s: None
        return record


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (13, 3)])
def test_it_asks_for_all_blocks_but_leaves_a_token_to_compute(tokens: int, blocks: int) -> None:
    bench = Bench()
    record = bench.record(tokens=tokens)
    answer = bench.ask(record)
    asked = bench.hub.of(MatchPrefix)
    assert [len(message.keys) for message in asked] == ([blocks] if blocks else [])
    assert answer == (None if blocks else 0)


def test_an_answer_within_the_idle_wait_is_used_at_once() -> None:
    bench = Bench()
    assert bench.held().phase is Phase.HELD
    assert bench.hub.waits == [pytest.approx(0.002)]


@pytest.mark.parametrize(("computed", "told"), [(0, 16), (4, 12), (12, 4), (16, 0), (20, 0)])
def test_it_is_told_what_lies_beyond_the_engines_own(computed: int, told: int) -> None:
    bench = Bench()
    record = bench.held(4)
    assert bench.ask(record, computed) == told


def test_a_busy_engine_is_held_up_once_per_request() -> None:
    bench = Bench()
    record = bench.record()
    assert [bench.ask(record) for _ in range(4)] == [None] * 4
    assert bench.hub.waits == [pytest.approx(0.0005)]
    assert len(bench.hub.of(MatchPrefix)) == 1


def test_an_idle_engine_waits_each_time_until_the_deadline() -> None:
    bench = Bench(deadline_s=0.05)
    record = bench.record()
    begun = bench.clock.now
    answers: list[int | None] = []
    while not answers or answers[-1] is None:
        answers.append(bench.ask(record, idle=True))
        assert bench.clock.now - begun < 0.06
    assert answers[-1] == 0
    assert max(bench.hub.waits) <= 0.002 + 1e-9
    assert bench.matcher.zero_reasons == {"late": 1}


def test_one_wait_in_vain_per_step_is_enough() -> None:
    bench = Bench()
    records = [bench.record(f"r{number}") for number in range(5)]
    assert [bench.matcher.answer(record, 0, engine_is_idle=True) for record in records] == [None] * 5
    assert len(bench.hub.waits) == 1
    bench.matcher.has_waited_in_vain = False
    assert bench.matcher.answer(records[4], 0, engine_is_idle=True) is None
    assert len(bench.hub.waits) == 2


def test_after_the_deadline_it_is_0_for_good_and_the_late_hit_is_given_back() -> None:
    bench = Bench(deadline_s=0.05)
    record = bench.record()
    assert bench.ask(record) is None
    bench.clock.now += 0.051
    assert bench.ask(record) == 0
    bench.hub.inbox.append(hit_for(record, 3))
    bench.pump()
    assert bench.hub.of(ReleaseHit) == [ReleaseHit("r", 1)]
    assert bench.ask(record) == 0
    assert len(bench.hub.of(MatchPrefix)) == 1


def test_the_deadline_is_told_to_the_hub() -> None:
    bench = Bench(deadline_s=0.05)
    begun = bench.clock.now
    bench.ask(bench.record())
    assert bench.hub.of(MatchPrefix)[0].deadline == pytest.approx(begun + 0.05)


def test_a_refused_question_is_asked_again_until_the_deadline() -> None:
    bench = Bench(deadline_s=0.05)
    record = bench.record()
    bench.hub.refuses = True
    assert bench.ask(record) is None
    bench.clock.now += 0.04
    assert bench.ask(record) is None
    bench.hub.refuses = False
    assert bench.ask(record) is None
    assert len(bench.hub.of(MatchPrefix)) == 1
    other = bench.record("other")
    bench.hub.refuses = True
    assert bench.ask(other) is None
    bench.clock.now += 0.06
    assert bench.ask(other) == 0
    assert bench.matcher.zero_reasons == {"busy": 1}


def test_a_hub_that_is_not_live_is_not_asked_and_not_waited_for() -> None:
    bench = Bench()
    bench.hub.is_live = False
    assert bench.ask(bench.record(), idle=True) == 0
    assert not bench.hub.posted
    assert not bench.hub.waits


def test_no_new_promise_of_a_remembered_hit_when_the_hub_is_not_live() -> None:
    bench = Bench()
    record = bench.held()
    bench.hub.is_live = False
    assert bench.ask(record) == 0


@pytest.mark.parametrize("reason", [HitReason.MISS, HitReason.NO_ROOM, HitReason.OFF])
def test_a_miss_is_0_for_good(reason: HitReason) -> None:
    bench = Bench()
    record = bench.record()
    bench.answer_in_wait(lambda: hit_for(record, 0, reason=reason))
    assert bench.ask(record, idle=True) == 0
    assert bench.ask(record) == 0
    assert len(bench.hub.of(MatchPrefix)) == 1
    assert bench.matcher.zero_reasons == ({} if reason is HitReason.MISS else {reason.name.lower(): 1})


def test_an_expired_hit_is_given_back_and_asked_for_again() -> None:
    bench = Bench()
    record = bench.held(4, expires=200.0)
    bench.clock.now = 200.0
    assert bench.ask(record) is None
    assert bench.hub.of(ReleaseHit) == [ReleaseHit("r", 1)]
    assert [message.sequence for message in bench.hub.of(MatchPrefix)] == [1, 2]
    assert bench.matcher.credits == MatchSettings().max_loads
    bench.hub.inbox.append(hit_for(record, 2))
    assert bench.ask(record) == 2 * BLOCK_SIZE


def test_a_remembered_hit_costs_nothing() -> None:
    bench = Bench()
    record = bench.held()
    bench.hub.posted.clear()
    bench.hub.waits.clear()
    for _ in range(1000):
        assert bench.ask(record) == 4 * BLOCK_SIZE
    assert not bench.hub.posted
    assert not bench.hub.waits


# ---------------------------------------------------------------- credits


def test_a_promise_takes_one_credit_however_often_it_is_made() -> None:
    bench = Bench(max_loads=3)
    record = bench.held()
    bench.ask(record)
    assert bench.matcher.credits == 2
    assert record.has_credit


def test_0_tokens_take_no_credit() -> None:
    bench = Bench(max_loads=1)
    record = bench.record()
    bench.answer_in_wait(lambda: hit_for(record, 4))
    assert bench.ask(record, 16, idle=True) == 0
    assert bench.matcher.credits == 1


def test_without_a_credit_it_waits_until_the_deadline_and_then_gives_the_hit_back() -> None:
    bench = Bench(max_loads=1, deadline_s=0.05)
    bench.held()
    second = bench.record("second")
    bench.answer_in_wait(lambda: hit_for(second, 2))
    assert bench.ask(second, idle=True) is None
    assert second.phase is Phase.HELD
    bench.clock.now += 0.051
    assert bench.ask(second) == 0
    assert bench.hub.of(ReleaseHit) == [ReleaseHit("second", second.sequence)]
    assert bench.matcher.zero_reasons == {"busy": 1}
    assert bench.matcher.credits == 0


def test_a_credit_that_comes_back_is_used() -> None:
    bench = Bench(max_loads=1)
    first = bench.held()
    second = bench.record("second")
    bench.answer_in_wait(lambda: hit_for(second, 2))
    assert bench.ask(second, idle=True) is None
    bench.matcher.return_credit(first)
    assert bench.ask(second) == 2 * BLOCK_SIZE


def test_a_credit_is_returned_once() -> None:
    bench = Bench(max_loads=2)
    record = bench.held()
    bench.matcher.return_credit(record)
    bench.matcher.return_credit(record)
    assert bench.matcher.credits == 2


# ---------------------------------------------------------------- ends


def test_taking_the_hit_uses_it_up() -> None:
    bench = Bench()
    record = bench.held()
    hit = bench.matcher.take_hit(record)
    assert hit is not None
    assert len(hit.slots) == 4
    assert record.phase is Phase.USED
    assert bench.ask(record) == 0


def test_admitted_before_the_answer_came() -> None:
    bench = Bench()
    record = bench.record()
    bench.ask(record)
    assert bench.matcher.take_hit(record) is None
    bench.hub.inbox.append(hit_for(record, 3))
    bench.pump()
    assert bench.hub.of(ReleaseHit) == [ReleaseHit("r", 1)]
    assert bench.ask(record) == 0


def test_preemption_asks_again() -> None:
    bench = Bench()
    record = bench.held()
    bench.matcher.take_hit(record)
    bench.matcher.return_credit(record)
    bench.matcher.restart(record)
    assert record.phase is Phase.NEW
    assert bench.ask(record) is None
    assert [message.sequence for message in bench.hub.of(MatchPrefix)] == [1, 2]
    # It may wait once more, and has a deadline of its own.
    assert len(bench.hub.waits) == 2


def test_preemption_after_0_for_good_asks_again() -> None:
    bench = Bench(deadline_s=0.05)
    record = bench.record()
    bench.ask(record)
    bench.clock.now += 0.06
    assert bench.ask(record) == 0
    bench.matcher.restart(record)
    assert bench.ask(record) is None


def test_after_a_failed_load_there_is_no_other() -> None:
    bench = Bench()
    record = bench.held()
    bench.matcher.take_hit(record)
    record.load_failed = True
    bench.matcher.restart(record)
    assert bench.ask(record) == 0
    assert len(bench.hub.of(MatchPrefix)) == 1


def test_an_answer_to_an_older_question_does_not_count() -> None:
    bench = Bench()
    record = bench.record()
    bench.ask(record)
    bench.matcher.restart(record)
    bench.ask(record)
    bench.hub.inbox.append(hit_for(record, 4, sequence=1))
    bench.pump()
    # L1 has ended that lease itself, when it was asked again.
    assert record.phase is Phase.ASKED
    bench.hub.inbox.append(hit_for(record, 2))
    assert bench.ask(record) == 2 * BLOCK_SIZE


@pytest.mark.parametrize("answered", [False, True])
def test_the_end_of_a_request_gives_everything_back(answered: bool) -> None:
    bench = Bench(max_loads=2)
    record = bench.held() if answered else bench.record()
    bench.ask(record)
    del bench.records["r"]
    bench.matcher.forget(record)
    assert bench.hub.of(ForgetRequest) == [ForgetRequest("r")]
    assert bench.matcher.credits == 2
    bench.hub.inbox.append(hit_for(record, 4))
    bench.pump()
    # `ForgetRequest` has ended its lease: it came after the question.
    assert not bench.hub.of(ReleaseHit)


def test_the_end_of_a_request_that_never_asked_is_not_told() -> None:
    bench = Bench()
    bench.matcher.forget(bench.record())
    assert not bench.hub.posted


@pytest.mark.parametrize("answered", [False, True])
def test_a_reset_forgets_answers_and_questions(answered: bool) -> None:
    bench = Bench(max_loads=2)
    record = bench.held() if answered else bench.record()
    bench.ask(record)
    bench.matcher.generation = 1
    bench.matcher.reset(record)
    assert bench.matcher.credits == 2
    assert not bench.hub.of(ReleaseHit)
    bench.hub.inbox.append(hit_for(record, 4, generation=0))
    bench.pump()
    assert record.hit is None
    assert bench.ask(record) is None
    assert bench.hub.of(MatchPrefix)[-1].sequence == 2
    bench.hub.inbox.append(hit_for(record, 1, generation=1))
    assert bench.ask(record) == BLOCK_SIZE


def test_a_reset_leaves_a_load_under_way_alone() -> None:
    bench = Bench(max_loads=2)
    record = bench.held()
    bench.matcher.take_hit(record)
    bench.matcher.reset(record)
    assert record.phase is Phase.USED
    assert bench.matcher.credits == 1


def test_alignment() -> None:
    bench = Bench(alignment_tokens=3 * BLOCK_SIZE)
    record = bench.record()
    bench.answer_in_wait(lambda: hit_for(record, 5))
    assert bench.ask(record, idle=True) == 3 * BLOCK_SIZE
