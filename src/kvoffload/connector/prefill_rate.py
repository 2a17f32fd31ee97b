"""How fast this engine computes prompts, learnt from its steps: what loading from a slow tier has to beat."""

from __future__ import annotations

from collections import deque
from statistics import median

LEAST_TOKENS = 128
"""A window in which fewer tokens were scheduled says more of decoding than of computing prompts."""
SAMPLES = 9


class PrefillRate:
    """Tokens per second, the median of the last few windows that were mostly prompts. Times in seconds, on one clock.

    A window is as many steps as vLLM plans before the first of them has ended: 1, or 2 with asynchronous scheduling, where the time
    between two plans says nothing of either step.
    """

    __slots__ = ("_recent", "_steps", "_window", "tokens_per_s")

    def __init__(self, window: int = 1) -> None:
        self.tokens_per_s = 0.0
        """0.0 until it is known."""
        self._window = window
        self._steps: deque[tuple[int, float]] = deque(maxlen=window)
        self._recent: deque[float] = deque(maxlen=SAMPLES)

    def planned(self, tokens: int, now: float) -> None:
        """A step of so many tokens is planned; of none: there is nothing to compute, and time passes without meaning."""
        steps = self._steps
        if len(steps) == self._window:
            self._sample(sum(tokens for tokens, _ in steps), now - steps[0][1])
        if tokens:
            steps.append((tokens, now))
        else:
            steps.clear()

    def finished(self, now: float) -> None:
        """A request finished, and so has the oldest step of the window. Of the last step before an engine idles nothing else tells."""
        if self._steps:
            tokens, begun = self._steps[0]
            self._sample(tokens, now - begun)
            self._steps.clear()

    def _sample(self, tokens: int, seconds: float) -> None:
        if tokens >= LEAST_TOKENS and seconds > 0:
            self._recent.append(tokens / seconds)
            self.tokens_per_s = median(self._recent)
