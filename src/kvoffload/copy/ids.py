"""The numbers that a copy is asked for: taken once, and refused with a reason."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvoffload.copy.engine import Ids
from kvoffload.errors import CopyError

OK, BLOCK_RANGE, SLOT_RANGE, DUPLICATE = range(4)
"""What the native check of ids answers; anything but OK means that nothing was touched."""


def own_ids(values: ArrayLike | Sequence[int]) -> NDArray[np.int64]:
    """A copy of its own, contiguous: what is checked is what is used, whatever the caller does meanwhile."""
    try:
        ids = np.array(values, dtype=np.int64, order="C")
    except (OverflowError, TypeError, ValueError) as error:
        raise CopyError(f"these are not ids: {error}") from error
    if ids.ndim != 1:
        raise CopyError(f"ids must be one-dimensional, these have shape {ids.shape}")
    return ids


def own_save(blocks: Ids, slots: Ids, epochs: Ids) -> tuple[Ids, Ids, NDArray[np.uint64]]:
    """Own copies of what a save names. Raises CopyError when they are of different lengths."""
    source, target = own_ids(blocks), own_ids(slots)
    planned = own_ids(epochs).view(np.uint64)
    if not len(source) == len(target) == len(planned):
        raise CopyError(f"a save of {len(source)} blocks into {len(target)} slots with {len(planned)} epochs")
    return source, target, planned


def own_load(slots: Ids, blocks: Ids) -> tuple[Ids, Ids]:
    """Own copies of what a load names. Raises CopyError when they are of different lengths."""
    source, target = own_ids(slots), own_ids(blocks)
    if len(source) != len(target):
        raise CopyError(f"a load of {len(source)} slots into {len(target)} blocks")
    return source, target


def refusal(what: str, outcome: int, blocks: Ids, slots: Ids, num_blocks: int, num_slots: int) -> CopyError:
    """Why the check answered ``outcome`` for a ``what``, "save" or "load"."""
    if outcome == DUPLICATE:
        return CopyError(f"a {what} of {len(blocks)} blocks names a destination twice; nothing was copied")
    limit = num_blocks if outcome == BLOCK_RANGE else num_slots
    ids, noun = (blocks, "block") if outcome == BLOCK_RANGE else (slots, "slot")
    wrong = ids[(ids < 0) | (ids >= limit)]
    return CopyError(f"a {what} names {noun} {wrong[0]}, there are {limit}; nothing was copied")
