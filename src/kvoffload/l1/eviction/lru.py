"""Least recently used."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import pairwise

from kvoffload.errors import InternalError
from kvoffload.l1.eviction.policy import Many, one_by_one
from kvoffload.l1.slots import NONE
from kvoffload.messages import BlockKey


class LRU:
    """One ring through two arrays, oldest first; the row behind the last slot is its head. Rows of slots not in it mean nothing."""

    _after: array[int]
    _before: array[int]
    _length: int

    def __init__(self, capacity: int) -> None:
        self._head = capacity
        self.clear()

    def __len__(self) -> int:
        return self._length

    def resize(self, capacity: int) -> None:
        """Of no account to LRU."""

    def admit(self, slots: Many) -> None:
        after, before, head = self._after, self._before, self._head
        last = before[head]
        count = 0
        for slot in one_by_one(slots):
            after[last] = slot
            before[slot] = last
            last = slot
            count += 1
        after[last] = head
        before[head] = last
        self._length += count

    def touch(self, slots: Many) -> None:
        after, before, head = self._after, self._before, self._head
        for slot in one_by_one(slots):
            previous, following = before[slot], after[slot]
            after[previous] = following
            before[following] = previous
            last = before[head]
            after[last] = slot
            before[slot] = last
            after[slot] = head
            before[head] = slot

    def begin(self) -> None:
        """Nothing to bound."""

    def names(self, limit: int) -> list[int]:
        after = self._after
        found: list[int] = []
        slot = self._head
        for _ in range(min(limit, self._length)):
            slot = after[slot]
            found.append(slot)
        return found

    def peek(self, limit: int) -> list[int]:
        return self.names(limit)

    def send_back(self, slot: int) -> None:
        self.touch((slot,))

    def keep(self, slot: int) -> None:
        self.touch((slot,))

    def evict(self, slots: Sequence[int], keys: Sequence[BlockKey]) -> None:
        following = self._after[slots[-1]]
        self._after[self._head] = following
        self._before[following] = self._head
        self._length -= len(slots)

    def take_out(self, slot: int, key: BlockKey) -> None:
        self.discard(slot)

    def discard(self, slot: int) -> None:
        previous, following = self._before[slot], self._after[slot]
        self._after[previous] = following
        self._before[following] = previous
        self._length -= 1

    def clear(self) -> None:
        head = self._head
        self._after = array("i", [NONE]) * (head + 1)
        self._before = array("i", [NONE]) * (head + 1)
        self._after[head] = self._before[head] = head
        self._length = 0

    def order(self) -> list[int]:
        return self.names(self._length)

    def check(self) -> None:
        found = self.order()
        ring = [self._head, *found, self._head]
        if len(set(found)) != self._length or self._head in found:
            raise InternalError(f"LRU: the ring is not the {self._length} slots that were admitted")
        if any(self._after[slot] != following or self._before[following] != slot for slot, following in pairwise(ring)):
            raise InternalError("LRU: the ring is broken")
