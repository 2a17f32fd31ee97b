"""Whether blocks are worth fetching: what a node was seen to take, against how fast the engine computes. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from kvoffload.errors import MisuseError
from kvoffload.messages import Node


@dataclass(frozen=True, slots=True)
class LoadOrComputeSettings:
    """``copy_bytes_per_s``: of the copy from L1 into the engine, which a load pays as well.

    Loads are judged too slow when they are expected to take longer than computing, and worth it again when they are expected to take
    less than ``1 - hysteresis`` of that. While they are too slow, one in ``explore_every`` is done all the same. A fetch counts with
    the weight ``weight`` (0 to 1), the first ones with more, and one that is out of the ordinary as if it were ``clip`` times the
    usual deviation away from what was expected.
    """

    copy_bytes_per_s: float = 8e9
    hysteresis: float = 0.2
    explore_every: int = 16
    weight: float = 0.1
    clip: float = 4.0

    def __post_init__(self) -> None:
        if not (self.copy_bytes_per_s > 0 and 0 <= self.hysteresis < 1 and 0 < self.weight <= 1 and self.clip > 0):
            raise MisuseError(f"rates and the clip must be above 0, the hysteresis from 0 to below 1, the weight above 0 to 1: {self}")
        if self.explore_every < 1:
            raise MisuseError(f"explore_every must be at least 1, not {self.explore_every}")


@dataclass(frozen=True, slots=True)
class NodeRate:
    """What is expected of a fetch: ``latency_s + bytes / bytes_per_s`` seconds."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: int) -> float:
        return self.latency_s + num_bytes / self.bytes_per_s


class LoadOrCompute:
    """One per engine. `observe_fetch` learns; `should_load` decides, and is to be asked once for each load: it counts."""

    def __init__(self, settings: LoadOrComputeSettings | None = None) -> None:
        self._settings = settings or LoadOrComputeSettings()
        self._nodes: dict[Node, _Line] = {}
        self._is_worth_it = True
        self._refused_in_a_row = 0
        self.refused = 0
        """Loads that were not worth it."""
        self.explored = 0
        """Loads that were done all the same."""

    @property
    def is_worth_it(self) -> bool:
        """How the last load was judged, exploring aside."""
        return self._is_worth_it

    def observe_fetch(self, node: Node, blocks: int, num_bytes: int, seconds: float) -> None:
        """A fetch of ``num_bytes`` that came, ``blocks`` of them, took the node ``seconds``. None of either says nothing."""
        if blocks > 0 and num_bytes > 0 and seconds > 0 and math.isfinite(seconds):
            self._nodes.setdefault(node, _Line()).add(float(num_bytes), seconds, self._settings)

    def forget(self, node: Node) -> None:
        """The node has left."""
        self._nodes.pop(node, None)

    def rates(self) -> dict[Node, NodeRate]:
        """What is known of each node."""
        return {node: line.rate() for node, line in self._nodes.items()}

    def expected_s(self, blocks_by_node: Mapping[Node, int], block_bytes: int) -> float | None:
        """Seconds until such a load is in the engine: nodes work side by side, then all is copied. None where a node is not known yet."""
        asked = {node: blocks for node, blocks in blocks_by_node.items() if blocks > 0}
        if not asked:
            return 0.0
        if not asked.keys() <= self._nodes.keys():
            return None
        slowest = max(self._nodes[node].rate().seconds(blocks * block_bytes) for node, blocks in asked.items())
        return slowest + sum(asked.values()) * block_bytes / self._settings.copy_bytes_per_s

    def should_load(self, tokens: int, tokens_per_s: float, blocks_by_node: Mapping[Node, int], block_bytes: int) -> bool:
        """Load these blocks, ``tokens`` in all, rather than compute them? True where either speed is not known (``tokens_per_s`` 0.0)."""
        expected = self.expected_s(blocks_by_node, block_bytes)
        if expected is None or not tokens_per_s > 0:
            return True
        computing = max(0, tokens) / tokens_per_s
        self._is_worth_it = expected <= computing * (1.0 if self._is_worth_it else 1.0 - self._settings.hysteresis)
        if self._is_worth_it:
            self._refused_in_a_row = 0
            return True
        self._refused_in_a_row += 1
        if self._refused_in_a_row >= self._settings.explore_every:
            self._refused_in_a_row = 0
            self.explored += 1
            return True
        self.refused += 1
        return False


_SHRINKAGE = 0.05
"""How much sizes must vary (square of the relative deviation) before their slope counts as much as proportion does."""
_LEAST_DEVIATION = 0.1
"""Of what is expected; nothing is out of the ordinary below that."""


class _Line:
    """Seconds over bytes: a straight line, least squares with weights that fade, outliers clipped.

    Where all fetches have about the same size, a slope cannot be told from a latency: then time is in proportion to bytes.
    """

    __slots__ = ("_bytes", "_count", "_covariance", "_deviation", "_seconds", "_variance")

    def __init__(self) -> None:
        self._count = 0
        self._bytes = self._seconds = self._variance = self._covariance = self._deviation = 0.0

    def add(self, num_bytes: float, seconds: float, settings: LoadOrComputeSettings) -> None:
        self._count += 1
        # At first the plain average of all.
        weight = max(settings.weight, 1 / self._count)
        if self._count > 1:
            expected = self.rate().seconds(int(num_bytes))
            off = seconds - expected
            usual = max(self._deviation, _LEAST_DEVIATION * expected)
            most = settings.clip * usual
            # The deviation grows with what is clipped: what was an outlier at first is what there is if it stays.
            self._deviation += weight * (min(abs(off), 2 * most) - self._deviation)
            seconds = expected + min(max(off, -most), most)
        away, late = num_bytes - self._bytes, seconds - self._seconds
        self._bytes += weight * away
        self._seconds += weight * late
        self._variance = (1 - weight) * (self._variance + weight * away * away)
        self._covariance = (1 - weight) * (self._covariance + weight * away * late)

    def rate(self) -> NodeRate:
        mean_bytes, mean_seconds = self._bytes, max(self._seconds, 1e-9)
        in_proportion = mean_seconds / mean_bytes
        prior = _SHRINKAGE * mean_bytes * mean_bytes
        slope = (self._covariance + prior * in_proportion) / (self._variance + prior)
        # Neither a latency below zero nor bytes for nothing.
        slope = min(max(slope, _SHRINKAGE * in_proportion), in_proportion)
        return NodeRate(latency_s=max(0.0, mean_seconds - slope * mean_bytes), bytes_per_s=1 / slope)
