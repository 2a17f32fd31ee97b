"""The two breakers of a node, which say when it is left alone and when it is used again. Pure: the clock is the caller's."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from kvoffload.l2.breaker import Breaker, BreakerSettings, BreakerState
from kvoffload.l2.node import Outcome

SHORT_S = 0.25
"""A doubt that took no longer left no trace: nobody need be told that the node is used again."""


class TellingBreaker(Breaker):
    """Calls ``on_opened`` each time it opens, with the reason and the seconds until the next probe, and ``on_closed`` when the node is
    used again after that, or after a longer doubt."""

    def __init__(self, settings: BreakerSettings | None = None, *, chance: Callable[[], float] = random.random) -> None:
        super().__init__(settings, chance=chance)
        self.on_opened: Callable[[str, float], None] = lambda reason, wait_s: None
        self.on_closed: Callable[[], None] = lambda: None
        self.on_doubt: Callable[[], None] = lambda: None
        """A probe may be made at once."""
        self._left_at: float | None = None  # when it was closed last, if it is not

    def record(self, outcome: Outcome, seconds: float, now: float, values: int = 0) -> None:
        openings, doubts, was = self._openings, self._doubts, self.state
        super().record(outcome, seconds, now, values)
        if self._openings > openings:
            self._left_at = -math.inf
            self.on_opened(self._reason or "", self._probe_at - now)
        elif self._doubts > doubts:
            self._left_at = now
            self.on_doubt()
        elif was is not self.state is BreakerState.CLOSED and self._left_at is not None:
            took_s, self._left_at = now - self._left_at, None
            if took_s > SHORT_S:
                self.on_closed()


class ReadsBreaker(TellingBreaker):
    """For requests that wait: one that waited in vain is enough, and none is ever the probe.

    The probe, a ping in nobody's time, comes at once after a timeout that is the first for a while: a node that is well is used again
    before it is missed, and one that is frozen or dead costs nobody else anything. One that only answers pings is left alone for as
    long as others are.
    """

    def __init__(self, *, chance: Callable[[], float] = random.random) -> None:
        super().__init__(BreakerSettings(timeouts=1, doubts=True), chance=chance)

    def allow(self, now: float) -> bool:
        if self.state is BreakerState.CLOSED:
            return True
        super().allow(-math.inf)  # counts the refusal
        return False

    def allow_probe(self, now: float) -> bool:
        """Whether it is time for a probe; whoever is told True must make and `record` it."""
        return self.state is not BreakerState.CLOSED and super().allow(now)
