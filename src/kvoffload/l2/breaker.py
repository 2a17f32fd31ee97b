"""When a node is left alone: a breaker for its reads, and another for its writes. Pure: the clock is the caller's."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from kvoffload.errors import MisuseError
from kvoffload.l2.node import Outcome


class BreakerState(Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    """One call, the probe, is under way; all others are refused."""


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    """When a breaker opens, and how long it waits for a probe. Times in seconds.

    It opens at ``errors`` failures in a row, at ``timeouts`` in a row that were LATE, when of at least ``share_of`` calls within
    ``window_s`` the share ``share`` failed, or when calls that succeed become both ``slow_factor`` times slower than they normally
    are and slower than ``slow_s``, per value. The n-th opening in a row waits ``backoff_s * 2 ** (n - 1)``, at most
    ``backoff_most_s``, give or take the share ``jitter``; it is the first again after ``calm_calls`` answers, or ``calm_s`` closed. A
    node that is full waits by ``full_backoff_s`` and ``full_backoff_most_s`` instead: room comes by eviction or by an operator, not by
    a reconnect. A probe that is not reported for ``probe_s`` is taken for lost. A call that was LATE before ``fair_s`` says nothing:
    its deadline was too near. Where ``doubts`` is set, timeouts that would make the first opening in a row wait for nothing but the
    probe, which may be made at once: they may well be ours, or one packet's.
    """

    errors: int = 5
    timeouts: int = 3
    share: float = 0.5
    share_of: int = 10
    window_s: float = 30.0
    slow_factor: float = 10.0
    slow_s: float = 0.1
    fair_s: float = 0.02
    backoff_s: float = 0.5
    backoff_most_s: float = 30.0
    full_backoff_s: float = 10.0
    full_backoff_most_s: float = 120.0
    jitter: float = 0.2
    calm_s: float = 60.0
    calm_calls: int = 10
    probe_s: float = 30.0
    doubts: bool = False

    def __post_init__(self) -> None:
        times = (self.window_s, self.slow_s, self.backoff_s, self.full_backoff_s, self.calm_s, self.probe_s)
        counts = (self.errors, self.timeouts, self.share_of, self.calm_calls)
        if not (min(counts) >= 1 and 0 < self.share <= 1 and 0 <= self.jitter < 1):
            raise MisuseError(f"counts must be at least 1, the share above 0 and at most 1, the jitter from 0 to below 1: {self}")
        if min(times) <= 0 or self.fair_s < 0 or self.slow_factor <= 1:
            raise MisuseError(f"times must be above 0, and the factor above 1: {self}")
        if self.backoff_s > self.backoff_most_s or self.full_backoff_s > self.full_backoff_most_s:
            raise MisuseError(f"the least backoff must be at most the greatest: {self}")


@dataclass(frozen=True, slots=True)
class BreakerStatistics:
    """``reason`` is why it last opened; ``refused`` counts the calls that were not allowed; ``normal_s`` is what a value normally takes.

    ``doubts`` that the first probe did not confirm are no ``openings``.
    """

    state: BreakerState
    openings: int
    refused: int
    reason: str | None
    normal_s: float | None
    doubts: int = 0


_FAILURES = frozenset({Outcome.FAILED, Outcome.LATE, Outcome.UNSETTLED})
_BY_WEIGHT = (Outcome.FAILED, Outcome.UNSETTLED, Outcome.LATE, Outcome.FULL, Outcome.MALFORMED, Outcome.DONE, Outcome.ABSENT)

# Weights of new samples, in the logarithm of the latency: what is usual is learnt slowly, what is now quickly.
_USUAL, _NOW, _FROM_PROBE = 0.02, 0.3, 0.25
_SAMPLES = 20
_LEAST_S = 1e-6
_ROUNDING_S = 1e-6


def overall(outcomes: Iterable[Outcome]) -> Outcome:
    """What a batch says about its node: its gravest outcome; DONE for none.

    But where some values came and others were LATE, the node is at work and the deadline was too near for so many: DONE.
    """
    there = set(outcomes)
    gravest = min(there, key=_BY_WEIGHT.index, default=Outcome.DONE)
    return Outcome.DONE if gravest is Outcome.LATE and Outcome.DONE in there else gravest


class Breaker:
    """Ask `allow` before each call to the node, and `record` each call that was allowed; ``now`` is in seconds and never falls.

    An ABSENT or MALFORMED value is an answer: the node is well. ``chance`` (0 to 1) places each wait within its jitter.
    """

    def __init__(self, settings: BreakerSettings | None = None, *, chance: Callable[[], float] = random.random) -> None:
        self._settings = settings or BreakerSettings()
        self._chance = chance
        self.state = BreakerState.CLOSED
        self._since = -math.inf  # of the state
        self._probe_at = -math.inf  # when OPEN: the next probe; when HALF_OPEN: when it counts as lost
        self._in_a_row = 0
        self._late_in_a_row = 0
        self._recent: deque[tuple[float, bool]] = deque(maxlen=max(64, self._settings.share_of))
        self._failed = 0  # of the recent ones
        self._usual: float | None = None  # logarithms of seconds
        self._now: float | None = None
        self._samples = 0
        self._streak = 0  # openings in a row
        self._has_doubted = False  # before the first of them
        self._answers = 0  # since it closed
        self._openings = 0
        self._doubts = 0
        self._refused = 0
        self._reason: str | None = None

    def allow(self, now: float) -> bool:
        """May a call be made? In HALF_OPEN this is the one probe, so whoever is told True must call and `record`."""
        if self.state is BreakerState.CLOSED:
            return True
        if now < self._probe_at:
            self._refused += 1
            return False
        self._enter(BreakerState.HALF_OPEN, now)
        self._probe_at = now + self._settings.probe_s
        return True

    def record(self, outcome: Outcome, seconds: float, now: float, values: int = 0) -> None:
        """How a call ended (for a batch: `overall`), after ``seconds``.

        ``values`` is how many values it moved; only where that is given is its latency judged, as batches differ in size.
        A call that began before the state changed, as all do that end while it is OPEN, changes nothing: it is no probe, and what
        it says has been dealt with.
        """
        if self.state is BreakerState.OPEN or now - seconds < self._since - _ROUNDING_S:
            return
        if outcome is Outcome.LATE and seconds < self._settings.fair_s:
            self._probe_at = min(self._probe_at, now)  # a probe that proved nothing: another one, now
            return
        latency = math.log(max(seconds / values, _LEAST_S)) if values else None
        was_probe = self.state is BreakerState.HALF_OPEN
        reason = self._judge_probe(outcome, latency) if was_probe else self._judge(outcome, latency, now)
        if reason is not None:
            self._open(reason, outcome, now)
        elif was_probe:
            self._forget()
            self._answers = 0
            self._enter(BreakerState.CLOSED, now)

    def statistics(self) -> BreakerStatistics:
        usual = None if self._usual is None else math.exp(self._usual)
        return BreakerStatistics(self.state, self._openings, self._refused, self._reason, usual, self._doubts)

    def _judge(self, outcome: Outcome, latency: float | None, now: float) -> str | None:
        """Why this call, one of many, opens it."""
        settings = self._settings
        has_failed = outcome in _FAILURES
        self._count(has_failed, now)
        if outcome is Outcome.FULL:
            return "the node is full"
        if not has_failed:
            self._answers += 1
            self._in_a_row = self._late_in_a_row = 0
            return self._judge_latency(latency) if latency is not None else None
        self._in_a_row += 1
        self._late_in_a_row = self._late_in_a_row + 1 if outcome is Outcome.LATE else 0
        if self._late_in_a_row >= settings.timeouts:
            return f"{self._late_in_a_row} timeouts in a row"
        if self._in_a_row >= settings.errors:
            return f"{self._in_a_row} errors in a row"
        if len(self._recent) >= settings.share_of and self._failed >= settings.share * len(self._recent):
            return f"{self._failed} of {len(self._recent)} calls failed"
        return None

    def _judge_probe(self, outcome: Outcome, latency: float | None) -> str | None:
        """Why the probe opens it again."""
        if outcome is Outcome.FULL:
            return "the node is full"
        if outcome in _FAILURES:
            return f"the probe failed ({outcome.name})"
        if self._usual is not None and latency is not None and self._is_slow(latency):
            # What stays slow becomes usual after a few probes, or a node whose network got worse for good would never come back.
            self._usual += _FROM_PROBE * (latency - self._usual)
            return f"the probe took {math.exp(latency):.3g} s"
        return None

    def _judge_latency(self, latency: float) -> str | None:
        self._samples += 1
        if self._usual is None or self._now is None:
            self._usual = self._now = latency
            return None
        self._now += _NOW * (latency - self._now)
        # At first the plain average: one sample is not the usual.
        self._usual += max(_USUAL, 1 / self._samples) * (latency - self._usual)
        if self._samples >= _SAMPLES and self._is_slow(self._now):
            return f"a value takes {math.exp(self._now):.3g} s, usually {math.exp(self._usual):.3g} s"
        return None

    def _is_slow(self, latency: float) -> bool:
        assert self._usual is not None
        return latency > math.log(self._settings.slow_s) and latency > self._usual + math.log(self._settings.slow_factor)

    def _count(self, has_failed: bool, now: float) -> None:
        recent = self._recent
        while recent and (len(recent) == recent.maxlen or recent[0][0] < now - self._settings.window_s):
            self._failed -= recent.popleft()[1]
        recent.append((now, has_failed))
        self._failed += has_failed

    def _open(self, reason: str, outcome: Outcome, now: float) -> None:
        settings = self._settings
        if self.state is BreakerState.CLOSED and (self._answers >= settings.calm_calls or now - self._since >= settings.calm_s):
            self._streak = 0
            self._has_doubted = False
        if settings.doubts and outcome is Outcome.LATE and self.state is BreakerState.CLOSED and not (self._streak or self._has_doubted):
            self._has_doubted = True
            self._doubts += 1
            wait_s = 0.0
        else:
            wait_s = self._backoff_s(outcome is Outcome.FULL)
            self._streak += 1
            self._openings += 1
            self._reason = reason
        self._enter(BreakerState.OPEN, now)
        self._probe_at = now + wait_s
        self._forget()

    def _backoff_s(self, is_full: bool) -> float:
        settings = self._settings
        least, most = (settings.full_backoff_s, settings.full_backoff_most_s) if is_full else (settings.backoff_s, settings.backoff_most_s)
        # 2.0 ** 1024 overflows; long before, the most is reached.
        return min(most, least * 2.0 ** min(self._streak, 64)) * (1 + settings.jitter * (2 * self._chance() - 1))

    def _enter(self, state: BreakerState, now: float) -> None:
        self.state = state
        self._since = now

    def _forget(self) -> None:
        """What was counted before it opened or closed is not counted again; what is usual is kept."""
        self._in_a_row = self._late_in_a_row = self._failed = 0
        self._recent.clear()
        self._now = self._usual
