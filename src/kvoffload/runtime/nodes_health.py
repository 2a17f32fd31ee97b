"""The second tier's trouble at one moment, in numbers: for whoever shows it to an operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvoffload.actors.membership import MembershipStatistics
from kvoffload.envelope import Fault
from kvoffload.l2.breaker import BreakerState

if TYPE_CHECKING:
    from kvoffload.runtime.node_actors import NodeActors


@dataclass(frozen=True, slots=True)
class NodesHealth:
    """How many nodes are not read (``left_alone``), not written (``unwritten``), or have not all that serves them (``out``: no client
    could be made, or an actor crashed too often), and why values that came were refused since the start, by fault: of nodes of now."""

    left_alone: int
    unwritten: int
    out: int
    faults: Mapping[Fault, int]
    membership: MembershipStatistics


def health_of(nodes: Iterable[NodeActors], unmade: int, membership: MembershipStatistics) -> NodesHealth:
    """``unmade``: nodes that have no actors. Of live objects, from any thread."""
    left_alone = unwritten = 0
    out = unmade
    faults: Counter[Fault] = Counter()
    for node in nodes:
        state = node.state
        left_alone += state.reading.state is not BreakerState.CLOSED
        unwritten += state.writing.state is not BreakerState.CLOSED
        out += node.is_out
        if state.reads.faults:
            faults.update(dict(state.reads.faults))  # at once: it may grow meanwhile
    return NodesHealth(left_alone, unwritten, out, faults, membership)
