"""Prompts, quantiles and intervals that the figures share."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence

from kvoffload.errors import MisuseError


def unique_prompts(count: int, lengths: Sequence[int], *, seed: int, vocab_size: int = 2048) -> list[list[int]]:
    """``count`` prompts of random ordinary tokens, of these lengths in turn; no two share a block."""
    chooser = random.Random(seed)
    return [chooser.choices(range(4, vocab_size), k=lengths[index % len(lengths)]) for index in range(count)]


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed."""
    if not values:
        raise MisuseError("no values to take a quantile of")
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def cluster_interval(groups: Sequence[Sequence[float]], *, resamples: int = 5000, seed: int = 1) -> tuple[float, float]:
    """The 95 % percentile interval of the median of all values, where those of one group have more in common than chance.

    Groups are resampled, and values within each: what the groups differ by widens it, however many values each of them has.
    """
    chooser = random.Random(seed)
    medians = []
    for _ in range(resamples):
        drawn = chooser.choices(groups, k=len(groups))
        medians.append(statistics.median([value for group in drawn for value in chooser.choices(group, k=len(group))]))
    medians.sort()
    edge = 0.025
    return medians[int(edge * resamples)], medians[min(resamples - 1, int((1 - edge) * resamples))]
