"""What an engine said, and whether two engines said the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TOLERANCE = 2e-4
"""Of a log probability. In float32 the size of a batch moves one by up to 2e-5 here, one block of wrong KV by 0.05 and more."""


@dataclass(frozen=True, slots=True)
class Output:
    """Of one request: the tokens said, log probabilities of the likeliest ones at each, and how many prompt tokens were not computed."""

    tokens: tuple[int, ...]
    logprobs: tuple[dict[int, float], ...]
    cached: int
    finish: str | None


def difference(expected: Output, found: Output, tolerance: float = TOLERANCE) -> str | None:
    """How ``found`` differs from ``expected``, or None.

    Tokens are compared up to the first one that the model itself could not decide within the tolerance.
    """
    if (len(expected.tokens), expected.finish) != (len(found.tokens), found.finish):
        return f"{len(found.tokens)} tokens, ended by {found.finish}, instead of {len(expected.tokens)} and {expected.finish}"
    for place, (token, other) in enumerate(zip(expected.tokens, found.tokens, strict=True)):
        here, there = expected.logprobs[place], found.logprobs[place]
        common = here.keys() & there.keys()
        worst = max((abs(here[one] - there[one]) for one in common), default=float("inf"))
        if worst > tolerance:
            return f"at token {place} a log probability is off by {worst:.2e}"
        if token != other:
            gap = here[token] - here.get(other, float("-inf"))
            return None if gap <= tolerance else f"token {place} is {other} instead of {token} ({gap:.2e} likelier)"
    return None


def assert_same(expected: Sequence[Output], found: Sequence[Output], tolerance: float = TOLERANCE) -> None:
    """The two said the same to the same prompts; what was cached may differ."""
    assert len(expected) == len(found)
    differences = {index: difference(*pair, tolerance) for index, pair in enumerate(zip(expected, found, strict=True))}
    wrong = {index: text for index, text in differences.items() if text is not None}
    assert not wrong, f"{len(wrong)} of {len(found)} outputs differ: {wrong}"
