"""What L1 counts, and the snapshot of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvoffload.l1.states import State
from kvoffload.messages import DropReason, HitReason


@dataclass(slots=True)
class Counts:
    """Running totals since the start, in blocks unless named otherwise."""

    matches: Counter[HitReason] = field(default_factory=Counter)
    asked: int = 0
    hit: int = 0
    offered: int = 0
    shared: int = 0
    committed: int = 0
    invalidated: int = 0
    drops: Counter[DropReason] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class L1Statistics:
    """L1 at one moment, and its totals since the start.

    Blocks ``offered`` are ``shared`` (in the index already), dropped, or granted; those granted are ``committed``, dropped later,
    or in flight. ``invalidated`` ones were READY and were emptied by a failed load or a reset.
    """

    slots: Mapping[State, int]
    usable: int
    protected: int
    leases: int
    saves: int
    loads: int
    matches: Mapping[HitReason, int]
    asked: int
    hit: int
    offered: int
    shared: int
    committed: int
    evictions: int
    invalidated: int
    drops: Mapping[DropReason, int]
