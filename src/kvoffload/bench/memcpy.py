"""How fast this machine copies memory: what a load is compared with."""

from __future__ import annotations

import statistics
import time

import numpy as np

PLACES = 5
"""Copies are from and to so many places in turn, so that none is in a cache from the last time."""


def cold_memcpy_s(size: int) -> float:
    """Seconds for ``size`` bytes, the median of ten copies, on memory that is populated and not cached."""
    source = np.ones((PLACES, size), np.uint8)
    target = np.zeros((PLACES, size), np.uint8)
    target[:] = 1
    seconds = []
    for index in range(2 * PLACES):
        place = index % PLACES
        begun = time.perf_counter()
        np.copyto(target[place], source[place])
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)
