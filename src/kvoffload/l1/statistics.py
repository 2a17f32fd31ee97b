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


@dataclass(slots=True)
class RemoteCounts:
    """Running totals of the second tier's use since the start, in blocks unless named otherwise."""

    lookups: int = 0
    """Matches that nodes were asked for."""
    asked: int = 0
    found: int = 0
    skipped: int = 0
    """Found, and not fetched because computing them is faster."""
    fetched: int = 0
    absent: int = 0
    failed: int = 0
    """Did not come, or were not what they should be; unsettled ones too."""
    late: int = 0
    """Matches that were answered at their deadline."""
    hits: int = 0
    """Answers that are longer for what came while they waited; ``hit_blocks`` and ``hit_tokens`` are by how much."""
    hit_blocks: int = 0
    hit_tokens: int = 0
    offered: int = 0
    """To the nodes' writers: written, failed, or on their way."""
    written: int = 0
    write_failed: int = 0
    write_dropped: int = 0
    """Not offered, as too many were on their way, or no node is theirs."""
    checked: int = 0
    """Blocks of L1 that a node was asked about, as it might not have them (any more)."""
    lacking: int = 0
    """Of these, those that it had not."""
    offered_again: int = 0
    """Of the offered ones, those that were for that reason."""
    evicted_unwritten: int = 0
    """Left L1 before a node had them; counted where blocks are to be written before they leave."""
    resets: int = 0


@dataclass(frozen=True, slots=True)
class RemoteStatistics:
    """The second tier's use at one moment: matches that wait; slots fetched into, or written from, ``unsettled`` ones among them."""

    totals: RemoteCounts
    waiting: int
    fetching: int
    writing: int
    unsettled: int
    off_reason: str | None
    """Why nodes are not read or written any more, though L1 goes on."""
    catching_up: int = 0
    """Nodes of which it is to be found out what they lack, or to which that is being written."""


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
    remote: RemoteStatistics | None = None

    @property
    def remote_off_reason(self) -> str | None:
        """Why nodes are not read or written any more, though L1 goes on."""
        return self.remote.off_reason if self.remote is not None else None
