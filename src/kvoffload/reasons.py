"""Why something came out as it did: what messages, and statistics, say of it in one word."""

from __future__ import annotations

from enum import Enum, IntEnum


class HitReason(IntEnum):
    """Why a `PrefixHit` is as long, or as short, as it is."""

    HIT = 0
    MISS = 1
    NO_ROOM = 2
    BUSY = 3
    OFF = 4


class LoadOutcome(IntEnum):
    """How a promised load ended on one rank."""

    LOADED = 0
    FAILED = 1
    WITHDRAWN = 2


class DropReason(Enum):
    """Why blocks that could have been saved were not; the value is the name in statistics."""

    POST_REFUSED = "post_refused"
    NO_SLOT = "no_slot"
    PARENT_MISSING = "parent_missing"
    PARENT_FAILED = "parent_failed"
    OVERWRITTEN = "overwritten"
    UNPAIRED = "unpaired"
    COPY_FAILED = "copy_failed"
    RESET = "reset"
    OFF = "off"
    FETCH_FAILED = "fetch_failed"  # it was to be fetched, not saved: a node said that it had it, and it did not come, or was not right
