"""The states of a slot, and which may follow which."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType


class State(IntEnum):
    """What a slot is doing. FILLING, FILLED and READY slots are in the index, the others are not."""

    FREE = 0
    """Holds nothing, and nobody reads or writes it."""
    FILLING = 1
    """Granted: a copy may be writing it on some rank."""
    FILLED = 2
    """Every rank has filled it; it waits for its parent to be READY."""
    READY = 3
    """Holds its block on every rank, as do all its ancestors."""
    DOOMED = 4
    """Will not be READY, but a copy may still be writing it: freed when every rank has reported."""
    CONDEMNED = 5
    """Was READY and is invalid now, but it or a descendant of it is pinned, or it is being written to a node: freed with the last pin and
    child, children first, and not before that write has ended."""
    QUARANTINED = 6
    """Something may be writing it and will not report as it should: freed when that is known to have stopped, or its process to be gone."""
    STAGING = 7
    """As FILLING, where L1 keeps nothing: for a node alone, so it is not in the index."""


TRANSITIONS: Mapping[State, frozenset[State]] = MappingProxyType(
    {
        # granted
        State.FREE: frozenset({State.FILLING, State.STAGING}),
        # filled by all (READY when its parent is, else FILLED); failed, fallen with its parent, or reset; its rank was lost
        State.FILLING: frozenset({State.FILLED, State.READY, State.DOOMED}),
        # its parent became READY; its parent fell, or reset
        State.FILLED: frozenset({State.READY, State.FREE}),
        # filled by all, no node takes it; is being written; reset, or failed; its rank was lost
        State.STAGING: frozenset({State.FREE, State.CONDEMNED, State.DOOMED}),
        # evicted, failed to load or reset; the same under a pin or a write
        State.READY: frozenset({State.FREE, State.CONDEMNED}),
        # all that may write it have reported; a rank that has not was lost, or a fetch is not known to have stopped
        State.DOOMED: frozenset({State.FREE, State.QUARANTINED}),
        # the last pin and child are gone, and no write reads it
        State.CONDEMNED: frozenset({State.FREE}),
        # the lost rank's process is gone, or it did report; the fetch is settled
        State.QUARANTINED: frozenset({State.FREE}),
    }
)
"""Every transition there is. A slot that fails on the last rank passes through DOOMED within one message."""

INDEXED = frozenset({State.FILLING, State.FILLED, State.READY})
"""The states whose slots are found by their key."""
