"""What an eviction policy is: an order of the READY slots. It sees slots and touches, never I/O and never the family tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvoffload.messages import BlockKey

Many = Sequence[int] | NDArray[np.intp]


def one_by_one(slots: Many) -> Sequence[int]:
    """As plain numbers."""
    return slots.tolist() if isinstance(slots, np.ndarray) else slots


class EvictionPolicy(Protocol):
    """Orders READY slots by how soon they should go. Batches come leaf first, root last.

    Whether a slot it names can go is the evictor's to know: one with children or pins is sent back or kept instead, or stays where
    it is while another goes in its place.
    """

    def __len__(self) -> int:
        """How many slots it orders."""

    def resize(self, capacity: int) -> None:
        """There are ``capacity`` slots now."""

    def admit(self, slots: Many) -> None:
        """These became READY; none of them is in the order."""

    def touch(self, slots: Many) -> None:
        """These were used again; all of them are in the order."""

    def begin(self) -> None:
        """A new reservation: what the policy may do to find who goes is bounded per reservation."""

    def names(self, limit: int) -> list[int]:
        """The slots to evict next, each if those before it are: up to ``limit``, at least one unless there is none.

        They stay in the order, and the first is named again if nothing else happens.
        """

    def peek(self, limit: int) -> list[int]:
        """About the slots that will be named next, up to ``limit``; changes nothing."""

    def send_back(self, slot: int) -> None:
        """The slot named first still has children: name it again later, when they may be gone."""

    def keep(self, slot: int) -> None:
        """The slot named first is in use: name it again later. It was used, so this may also raise it."""

    def evict(self, slots: Sequence[int], keys: Sequence[BlockKey]) -> None:
        """These, the first ones that were just named, at least one, leave; their keys may be remembered."""

    def take_out(self, slot: int, key: BlockKey) -> None:
        """This slot leaves, evicted in place of the one that was named."""

    def discard(self, slot: int) -> None:
        """This slot leaves for another reason: what it held is invalid."""

    def clear(self) -> None:
        """All slots leave, invalid. What is remembered of evicted keys goes too."""

    def order(self) -> list[int]:
        """All slots, queue by queue, next to go first: for tests, checks and reports."""

    def check(self) -> None:
        """Verify every invariant; raises InternalError."""
