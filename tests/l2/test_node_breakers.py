"""Reads of a node, simulated: how many are refused where a few are late, and what a node costs that is frozen, or only answers pings."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from itertools import count, pairwise

import pytest

from kvoffload.l2.breaker import BreakerState
from kvoffload.l2.node import Outcome
from kvoffload.l2.node_breakers import ReadsBreaker, TellingBreaker

DEADLINE_S, READ_S, PING_MOST_S, LOOK_S = 0.05, 0.002, 2.0, 0.25


class Reads:
    """A node that is read ``rate`` times a second until ``until_s``; of those reads the share ``late`` comes too late.

    From ``frozen_at`` on it does not answer at all; ``answers_reads`` False: only pings. ``stalls_s``: the caller's own loop stands
    still for so long every second, and then sees all deadlines pass before it sees any answer.
    """

    def __init__(
        self,
        rate: float,
        *,
        late: float = 0.0,
        until_s: float = 600.0,
        frozen_at: float = math.inf,
        answers_reads: bool = True,
        stalls_s: float = 0.0,
    ) -> None:
        self.breaker = ReadsBreaker(chance=lambda: 0.5)
        self.breaker.on_doubt = lambda: self.at(self.now, self.probe)
        self.breaker.on_closed = lambda: self.back.append(self.now)
        self.rate, self.late, self.frozen_at, self.answers_reads, self.stalls_s = rate, late, frozen_at, answers_reads, stalls_s
        self.random = random.Random(1)
        self.now = 0.0
        self.reads = self.refused = 0
        self.waited_in_vain: list[float] = []
        self.back: list[float] = []
        self._order = count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self.at(0.0, self.read)
        self.at(0.0, self.look)
        while self._events[0][0] < until_s:
            self.now, _, event = heapq.heappop(self._events)
            event()

    def at(self, when: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), event))

    def ends_at(self, takes_s: float, most_s: float) -> tuple[Outcome, float]:
        """How a call that begins now ends, and when that is seen."""
        outcome, end = (Outcome.DONE, self.now + takes_s) if takes_s < most_s else (Outcome.LATE, self.now + most_s)
        if self.stalls_s and end % 1.0 < self.stalls_s:
            end = math.floor(end) + self.stalls_s
            outcome = Outcome.LATE if end > self.now + most_s else outcome
        return outcome, end

    def read(self) -> None:
        self.at(self.now + self.random.expovariate(self.rate), self.read)
        self.reads += 1
        if not self.breaker.allow(self.now):
            self.refused += 1
            return
        is_late = self.now + READ_S > self.frozen_at or not self.answers_reads or self.random.random() < self.late
        outcome, end = self.ends_at(math.inf if is_late else READ_S, DEADLINE_S)
        self.at(end, lambda begun=self.now: self.read_ended(begun, outcome))  # type: ignore[misc]

    def read_ended(self, begun: float, outcome: Outcome) -> None:
        if outcome is Outcome.LATE:
            self.waited_in_vain.append(begun)
        self.breaker.record(outcome, self.now - begun, self.now, values=32)

    def look(self) -> None:
        self.at(self.now + LOOK_S, self.look)
        self.probe()

    def probe(self) -> None:
        if self.breaker.allow_probe(self.now):
            outcome, end = self.ends_at(math.inf if self.now + READ_S > self.frozen_at else READ_S, PING_MOST_S)
            outcome = Outcome.FAILED if outcome is Outcome.LATE else outcome
            self.at(end, lambda begun=self.now: self.breaker.record(outcome, self.now - begun, self.now))  # type: ignore[misc]


@pytest.mark.parametrize("rate", [20, 50, 100])
def test_a_node_of_which_one_read_in_a_thousand_is_late_is_read(rate: float) -> None:
    reads = Reads(rate, late=1e-3, until_s=40_000 / rate)
    doubts = reads.breaker.statistics().doubts
    assert doubts > 20
    assert reads.refused < 0.003 * reads.reads
    assert len(reads.back) <= 0.1 * doubts, "hardly ever need anybody look for what the node lacks"


@pytest.mark.parametrize("rate", [20, 100])
def test_one_that_freezes_costs_a_deadline_once(rate: float) -> None:
    reads = Reads(rate, until_s=300, frozen_at=100)
    assert reads.waited_in_vain
    assert reads.waited_in_vain[-1] < 100 + DEADLINE_S + 1 / rate + READ_S, "those that came before the first deadline had passed"
    assert reads.breaker.state is not BreakerState.CLOSED
    assert reads.refused > 190 * rate


def test_one_that_only_answers_pings_is_left_alone_for_longer_each_time() -> None:
    reads = Reads(100, until_s=600, answers_reads=False)
    starts = reads.waited_in_vain
    waits = [later - before for before, later in pairwise(starts) if later - before > 0.2]
    assert waits[:4] == pytest.approx([0.5, 1, 2, 4], abs=0.4)
    assert waits[-1] == pytest.approx(30, abs=0.5)
    assert reads.refused > 0.85 * reads.reads


@pytest.mark.parametrize("stalls_s", [0.06, 0.3])
def test_a_loop_that_stands_still_says_nothing_of_the_node(stalls_s: float) -> None:
    """Every second: what is under way then is late, however well the node is."""
    reads = Reads(100, until_s=300, stalls_s=stalls_s)
    assert len(reads.waited_in_vain) > 100
    assert reads.refused < 0.01 * reads.reads
    assert reads.breaker.statistics().openings == 0


def test_no_request_is_a_probe() -> None:
    breaker = ReadsBreaker()
    breaker.record(Outcome.LATE, 0.3, 0.3)
    assert breaker.state is BreakerState.OPEN
    assert not any(breaker.allow(now) for now in (0.4, 10.0, 1000.0))
    assert breaker.statistics().refused == 3
    assert breaker.allow_probe(1000.0)
    assert not breaker.allow(1000.1)
    breaker.record(Outcome.DONE, 0.001, 1000.2)
    assert breaker.allow(1000.3)


def test_others_that_were_late_as_well_are_not_taken_for_the_probe_nor_counted_after_it() -> None:
    breaker = ReadsBreaker()
    breaker.record(Outcome.LATE, 0.05, 1.0)
    assert breaker.allow_probe(1.0)
    breaker.record(Outcome.LATE, 0.05, 1.001)
    assert breaker.statistics().state is BreakerState.HALF_OPEN
    breaker.record(Outcome.DONE, 0.002, 1.002)
    breaker.record(Outcome.LATE, 0.05, 1.003)
    assert breaker.state is BreakerState.CLOSED
    assert breaker.statistics().openings == 0


def test_a_doubt_that_the_probe_confirms_is_an_opening() -> None:
    told: list[str] = []
    breaker = ReadsBreaker(chance=lambda: 0.5)
    breaker.on_opened = lambda reason, wait_s: told.append(f"{reason}: {wait_s:.3g} s")
    breaker.on_closed = lambda: told.append("closed")
    breaker.record(Outcome.LATE, 0.05, 1.0)
    assert breaker.allow_probe(1.0)
    assert not told
    breaker.record(Outcome.FAILED, 0.01, 1.01)
    assert len(told) == 1
    assert not breaker.allow_probe(1.5)
    assert breaker.allow_probe(1.6)
    breaker.record(Outcome.FAILED, 0.01, 1.61)
    assert breaker.allow_probe(3.0)
    breaker.record(Outcome.DONE, 0.01, 3.1)
    assert told == ["the probe failed (FAILED): 0.5 s", "the probe failed (FAILED): 1 s", "closed"]
    assert breaker.statistics().openings == 2


def test_after_a_doubt_of_some_length_it_is_told_that_the_node_is_used_again() -> None:
    told: list[float] = []
    breaker = ReadsBreaker()
    breaker.on_closed = lambda: told.append(1)
    breaker.record(Outcome.LATE, 0.05, 1.0)
    assert breaker.allow_probe(1.0)
    breaker.record(Outcome.DONE, 1.5, 2.5)
    assert told, "frozen for so long, it may have been restarted"


def test_writes_are_told_of_as_well() -> None:
    told: list[str] = []
    breaker = TellingBreaker(chance=lambda: 0.5)
    breaker.on_opened = lambda reason, wait_s: told.append(f"{reason}: {wait_s:.3g} s")
    breaker.on_closed = lambda: told.append("closed")
    breaker.record(Outcome.DONE, 0.01, 1.0)
    breaker.record(Outcome.FULL, 0.01, 2.0)
    assert breaker.allow(1000.0)
    breaker.record(Outcome.DONE, 0.01, 1000.1)
    assert told == ["the node is full: 10 s", "closed"]
