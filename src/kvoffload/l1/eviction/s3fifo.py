"""S3-FIFO (Yang et al., SOSP 2023): a small queue that most blocks do not survive, a main queue, and ghosts."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from kvoffload.errors import InternalError
from kvoffload.l1.eviction.ghosts import Ghosts
from kvoffload.l1.eviction.policy import Many, one_by_one
from kvoffload.l1.slots import NONE
from kvoffload.messages import BlockKey

HOTTEST = 3
"""A slot's uses are counted up to this."""

MANY = 32
"""From so many slots on numpy is faster than a loop."""

CHANCES = 500
"""How many used slots get another round in one reservation; behind that slots go in their order, used or not. The paper's loop has no
bound, and at a million slots, all of them hot, it would stop the actor for a third of a second."""

# A slot's row in ``_heat``: its uses, plus the queue it is in. Rows of slots that are in none mean nothing.
_SMALL, _MAIN, _USES = 4, 8, 3


class S3FIFO:
    """A slot enters the small queue, or the main one if its key is a ghost. A used slot goes on from small to main, unused, or
    round in main, less one use; an unused one is evicted, from small leaving its key as a ghost.

    The small queue is named from while it has its share (``small_ratio`` of the slots) or main is empty. ``keys[slot]`` is read
    on admission and eviction. Small is a ring through its head's row; main is a ring with a hand, since there most slots only go
    round, which then is one step of the hand.
    """

    _after: array[int]
    _before: array[int]
    _heat: bytearray
    _small: int
    _main: int
    _hand: int

    def __init__(self, capacity: int, keys: Sequence[BlockKey], small_ratio: float = 0.1) -> None:
        self._keys = keys
        self._small_ratio = small_ratio
        self._head = capacity
        self.ghosts = Ghosts(capacity)
        self._small_share = 1
        self._chances = CHANCES
        self.many = MANY
        self.clear()

    def __len__(self) -> int:
        return self._small + self._main

    def resize(self, capacity: int) -> None:
        """Shares and the ghosts' bound follow the number of slots."""
        self._small_share = max(1, int(self._small_ratio * capacity))
        self.ghosts.bound = max(0, capacity - self._small_share)

    def admit(self, slots: Many) -> None:
        if len(slots) >= self.many and self._admit_all(slots):
            return
        after, before, heat, keys = self._after, self._before, self._heat, self._keys
        ghosts = self.ghosts
        table, mask, has_any = ghosts.table, ghosts.mask, ghosts.has_any
        head = self._head
        last = before[head]
        count = 0
        for slot in one_by_one(slots):
            if has_any:  # a look at the table is a cache miss, or its page's first use
                digest = hash(keys[slot])
                if table[digest & mask] == digest >> 32 and ghosts.pop(digest):
                    self._into_main(slot)
                    continue
            after[last] = slot
            before[slot] = last
            last = slot
            heat[slot] = _SMALL
            count += 1
        after[last] = head
        before[head] = last
        self._small += count

    def _admit_all(self, slots: Many) -> bool:
        """The usual case: none of them is a ghost. False, and nothing changed, where some may be."""
        at, ghosts, head = np.asarray(slots, dtype=np.intp), self.ghosts, self._head
        if ghosts.has_any and ghosts.may_have(map(self._keys.__getitem__, one_by_one(slots)), len(slots)):
            return False
        after, before = np.frombuffer(self._after, dtype=np.int32), np.frombuffer(self._before, dtype=np.int32)
        first, last, end = int(slots[0]), int(slots[-1]), self._before[head]
        after[at[:-1]] = at[1:]
        before[at[1:]] = at[:-1]
        self._after[end], self._before[first] = first, end
        self._after[last], self._before[head] = head, last
        np.frombuffer(self._heat, dtype=np.uint8)[at] = _SMALL
        self._small += len(slots)
        return True

    def touch(self, slots: Many) -> None:
        heat = self._heat
        if len(slots) >= self.many:
            column, at = np.frombuffer(heat, dtype=np.uint8), np.asarray(slots, dtype=np.intp)
            warmths = column[at]
            column[at] = warmths + (warmths & _USES != HOTTEST)
            return
        for slot in one_by_one(slots):
            warmth = heat[slot]
            if warmth & _USES != HOTTEST:
                heat[slot] = warmth + 1

    def begin(self) -> None:
        self._chances = CHANCES

    def names(self, limit: int) -> list[int]:
        after, heat = self._after, self._heat
        while self._small and (self._small >= self._small_share or not self._main):
            slot = after[self._head]
            if heat[slot] == _SMALL or not self._chances:
                # Behind so many more, small is below its share.
                return self._run(slot, _SMALL, min(limit, self._small - self._small_share + 1 if self._main else self._small))
            self._promote(slot)
        if not self._main:
            return []
        slot = self._hand
        chances = self._chances
        while chances and (warmth := heat[slot]) != _MAIN:
            chances -= 1
            heat[slot] = warmth - 1
            slot = after[slot]
        self._chances = chances
        self._hand = slot
        return self._run(slot, _MAIN, min(limit, self._main))

    def peek(self, limit: int) -> list[int]:
        """The unused ones among the first of small, then among the next of main: of each queue ``limit`` slots are looked at."""
        after, heat = self._after, self._heat
        found: list[int] = []
        for slot, length, unused in ((after[self._head], self._small, _SMALL), (self._hand, self._main, _MAIN)):
            for _ in range(min(limit, length)):
                if heat[slot] == unused:
                    found.append(slot)
                slot = after[slot]
        return found[:limit]

    def send_back(self, slot: int) -> None:
        """To the end of its own queue: having children is no merit."""
        warmth = self._heat[slot]
        if warmth >= _MAIN:
            self._hand = self._after[slot]
            return
        self._out_of_small(slot)
        head, after, before = self._head, self._after, self._before
        last = before[head]
        after[last] = before[head] = slot
        before[slot], after[slot] = last, head
        self._small += 1

    def keep(self, slot: int) -> None:
        """To the end of main: a slot in use has been used. (Were it sent round in small, small would be named from for ever.)"""
        if self._heat[slot] >= _MAIN:
            self._hand = self._after[slot]
        else:
            self._out_of_small(slot)
            self._into_main(slot)

    def evict(self, slots: Sequence[int], keys: Sequence[BlockKey]) -> None:
        after, before = self._after, self._before
        first, following = slots[0], after[slots[-1]]
        previous = before[first]
        after[previous] = following
        before[following] = previous
        if self._heat[first] < _MAIN:
            self._small -= len(slots)
            self.ghosts.add(keys)
        else:
            self._main -= len(slots)
            self._hand = following if self._main else NONE

    def take_out(self, slot: int, key: BlockKey) -> None:
        if self._heat[slot] < _MAIN:
            self.ghosts.add((key,))
        self.discard(slot)

    def discard(self, slot: int) -> None:
        if self._heat[slot] < _MAIN:
            self._out_of_small(slot)
        else:
            self._out_of_main(slot)

    def clear(self) -> None:
        head = self._head
        self._after = array("i", [NONE]) * (head + 1)
        self._before = array("i", [NONE]) * (head + 1)
        self._after[head] = self._before[head] = head
        self._hand = NONE
        self._heat = bytearray(head)
        self._small = self._main = 0
        self.ghosts.clear()

    def order(self) -> list[int]:
        return self._queue(self._after[self._head], self._head) + self._queue(self._hand, NONE)

    def check(self) -> None:
        small, main = self._queue(self._after[self._head], self._head), self._queue(self._hand, NONE)
        for found, length, queue in ((small, self._small, _SMALL), (main, self._main, _MAIN)):
            if len(found) != length or len(set(found)) != length:
                raise InternalError(f"S3FIFO: {len(found)} slots are linked, {length} were admitted")
            if any(self._heat[slot] & ~_USES != queue for slot in found):
                raise InternalError("S3FIFO: a slot is in the wrong queue")
        for ring in ([self._head, *small, self._head], [*main, *main[:1]]):
            if any(self._before[slot] != previous for previous, slot in pairwise(ring)):
                raise InternalError("S3FIFO: the two directions of a ring differ")
        self.ghosts.check()

    def _run(self, slot: int, unused: int, limit: int) -> list[int]:
        """This slot and those right behind it in its queue that would be named next, up to ``limit``."""
        after, heat, any_will_do = self._after, self._heat, not self._chances
        found = [slot]
        for _ in range(limit - 1):
            slot = after[slot]
            if heat[slot] != unused and not any_will_do:
                break
            found.append(slot)
        return found

    def _promote(self, first: int) -> None:
        """Move the first slot of small, and the used ones behind it, to the end of main, while small is to be named from."""
        after, before, heat, hand = self._after, self._before, self._heat, self._hand
        most = min(self._chances, max(1, self._small - self._small_share + 1))
        count, last, slot = 0, first, first
        while count < most and heat[slot] != _SMALL:
            heat[slot] = _MAIN
            last, slot = slot, after[slot]
            count += 1
        after[self._head] = slot
        before[slot] = self._head
        if hand < 0:
            self._hand = after[last] = first
            before[first] = last
        else:
            end = before[hand]
            after[end] = first
            before[first] = end
            after[last] = hand
            before[hand] = last
        self._small -= count
        self._main += count
        self._chances -= count

    def _out_of_small(self, slot: int) -> None:
        after, before = self._after, self._before
        previous, following = before[slot], after[slot]
        after[previous] = following
        before[following] = previous
        self._small -= 1

    def _out_of_main(self, slot: int) -> None:
        after, before = self._after, self._before
        previous, following = before[slot], after[slot]
        after[previous] = following
        before[following] = previous
        if self._hand == slot:
            self._hand = following if following != slot else NONE
        self._main -= 1

    def _into_main(self, slot: int) -> None:
        """To the end of main, unused: right before the hand."""
        after, before, hand = self._after, self._before, self._hand
        if hand < 0:
            self._hand = after[slot] = before[slot] = slot
        else:
            last = before[hand]
            after[last] = before[hand] = slot
            before[slot] = last
            after[slot] = hand
        self._heat[slot] = _MAIN
        self._main += 1

    def _queue(self, slot: int, end: int) -> list[int]:
        """The slots from this one to ``end``, or all around where there is none."""
        found: list[int] = []
        while slot not in (end, NONE) and not (found and slot == found[0]):
            if len(found) > self._head:
                raise InternalError("S3FIFO: a ring does not close")
            found.append(slot)
            slot = self._after[slot]
        return found
