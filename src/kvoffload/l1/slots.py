"""The slots themselves: one row per slot, in arrays, with the family tree and the pins.

Arrays and not lists of ints: a million-entry list costs the cyclic garbage collector some 20 ms in every full collection and keeps
an int object alive per entry; arrays are invisible to it, and so is numpy's array of objects, which holds the keys.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvoffload.errors import InternalError
from kvoffload.l1.states import State

NONE = -1
"""No slot: the parent of a prompt's first block, the child of a leaf."""

Slots = NDArray[np.intp]
"""Numbers of slots, where they are many: what is done to all of them is done at once."""

_FREE, _CONDEMNED = int(State.FREE), int(State.CONDEMNED)


class SlotTable:
    """Rows of ``capacity`` slots, of which the first ``usable`` may be handed out.

    The columns are public to the package: hot loops bind them to local names. A FREE row has no child, sibling or pin; its parent
    and key mean nothing.
    """

    __slots__ = (
        "abandoned",
        "capacity",
        "counts",
        "first_child",
        "first_children",
        "free",
        "fresh",
        "guard",
        "guards",
        "held",
        "keys",
        "next_sibling",
        "parent",
        "parents",
        "previous_sibling",
        "protected",
        "state",
        "usable",
    )

    def __init__(self, capacity: int, *, keeps: bool = True) -> None:
        self.capacity = capacity
        # Where nothing is kept: READY slots that may have lost what kept them; None where everything is kept.
        self.abandoned: list[int] | None = None if keeps else []
        self.usable = 0
        self.fresh = 0  # slots from here to ``usable`` were never used: growing costs nothing per slot
        self.free: array[int] = array("i")  # used before, and FREE: a stack
        self.state = bytearray(capacity)
        self.keys: NDArray[Any] = np.full(capacity, None, dtype=object)
        self.parent = _links(capacity)
        self.first_child = _links(capacity)
        self.next_sibling = _links(capacity)
        # Of the first of several children: the last one, so that a child is appended in one step. NONE for an only child.
        self.previous_sibling = _links(capacity)
        # Pins on this slot, plus its children whose own guard is above 0; above 0 means that it must not be evicted.
        self.guard: array[int] = array("i", bytes(4 * capacity))
        # Slots that something reads, other than a load: they must not be evicted either. No guard, as it is nobody's who waits, and
        # protects no ancestors (those are no leaves anyway).
        self.held: set[int] = set()
        self.counts = [0] * len(State)  # by state, FREE ones among the usable
        self.protected = 0  # slots whose guard is above 0
        # The same memory, for many at once; for one of them an array is faster.
        self.guards = np.frombuffer(self.guard, dtype=np.int32)
        self.parents = np.frombuffer(self.parent, dtype=np.int32)
        self.first_children = np.frombuffer(self.first_child, dtype=np.int32)

    @property
    def states(self) -> NDArray[np.uint8]:
        """The states' memory, for many at once."""
        return np.frombuffer(self.state, dtype=np.uint8)

    def grow(self, usable: int) -> None:
        """Let the first ``usable`` slots be handed out; never fewer than before."""
        if usable > self.capacity:
            raise InternalError(f"{usable} slots are populated of a segment of {self.capacity}")
        if usable > self.usable:
            self.counts[_FREE] += usable - self.usable
            self.usable = usable

    def take(self, count: int) -> list[int]:
        """Up to ``count`` FREE slots, no longer in the free list; the caller sets their state and the counts."""
        taken: list[int] = []
        free = self.free
        if free and count:
            taken = free[-count:].tolist()
            del free[-count:]
            taken.reverse()
        more = min(count - len(taken), self.usable - self.fresh)
        if more > 0:
            taken.extend(range(self.fresh, self.fresh + more))
            self.fresh += more
        return taken

    def put_back(self, slots: list[int]) -> None:
        """Undo `take`, for slots that were not needed."""
        slots.reverse()
        self.free.extend(slots)

    def release(self, slot: int) -> None:
        """Make a slot FREE that has no child, sibling or pin any more, whatever its state was."""
        self.counts[self.state[slot]] -= 1
        self.counts[_FREE] += 1
        self.state[slot] = _FREE
        self.keys[slot] = None
        self.free.append(slot)

    def move(self, slot: int, state: State) -> None:
        """Change a slot's state and nothing else."""
        self.counts[self.state[slot]] -= 1
        self.counts[state] += 1
        self.state[slot] = state

    def attach(self, slot: int, parent: int) -> None:
        """Make a slot without family the last child of ``parent``, or parentless."""
        self.parent[slot] = parent
        if parent < 0:
            return
        first = self.first_child[parent]
        if first < 0:
            self.first_child[parent] = slot
            return
        previous = self.previous_sibling
        last = previous[first]
        if last < 0:
            last = first
        self.next_sibling[last] = slot
        previous[slot] = last
        previous[first] = slot

    def detach(self, slot: int) -> None:
        """Take a slot from among its parent's children; it keeps its own children, and remembers its parent's number."""
        parent = self.parent[slot]
        if parent < 0:
            return
        following, previous = self.next_sibling, self.previous_sibling
        first, after, before = self.first_child[parent], following[slot], previous[slot]
        if first == slot:
            self.first_child[parent] = after
            if after >= 0:
                previous[after] = NONE if before == after else before
        else:
            following[before] = after
            if after >= 0:
                previous[after] = before
            else:
                previous[first] = NONE if before == first else before
        following[slot] = previous[slot] = NONE

    def children(self, slot: int) -> list[int]:
        """The children of a slot, oldest first."""
        found = []
        child = self.first_child[slot]
        while child >= 0:
            found.append(child)
            child = self.next_sibling[child]
        return found

    def ancestor(self, slot: int, steps: int) -> int:
        """The slot ``steps`` above this one."""
        parent = self.parent
        for _ in range(steps):
            slot = parent[slot]
        return slot

    def chain(self, slot: int) -> list[int]:
        """The slots from the prompt's first block down to this one."""
        parent = self.parent
        found = []
        while slot >= 0:
            found.append(slot)
            slot = parent[slot]
        found.reverse()
        return found

    def let_go(self, slot: int) -> None:
        """A slot is `held` no more: free it if it is CONDEMNED and was kept by that alone."""
        self.held.remove(slot)
        if self.state[slot] == _CONDEMNED and not self.guard[slot]:
            self.release(slot)

    def let_go_all(self, slots: Sequence[int]) -> None:
        """`let_go` each."""
        self.held.difference_update(slots)
        if self.counts[_CONDEMNED]:
            for slot in slots:
                if self.state[slot] == _CONDEMNED and not self.guard[slot]:
                    self.release(slot)

    def pin(self, slot: int) -> int:
        """Protect a slot and all above it from eviction until `unpin`; says how many were not protected before."""
        guard, parent = self.guard, self.parent
        newly = 0
        while slot >= 0:
            guards = guard[slot]
            guard[slot] = guards + 1
            if guards:
                break
            newly += 1
            slot = parent[slot]
        self.protected += newly
        return newly

    def pin_chain(self, chain: Slots) -> int:
        """`pin` of a chain's last slot, for the whole `chain`: faster where it is long."""
        # What is protected protects all above it.
        before = int(np.count_nonzero(self.guards[chain]))
        self.guards[chain[before:]] = 1
        if before:
            self.guard[chain[before - 1]] += 1
        newly = len(chain) - before
        self.protected += newly
        return newly

    def unpin_chain(self, chain: Slots) -> None:
        """`unpin` of a chain's last slot, for the whole `chain`, as it was when it was pinned: a slot that is pinned keeps its parent."""
        guards = self.guards[chain]
        others = np.flatnonzero(guards != 1)
        keeps = int(others[-1]) + 1 if len(others) else 0
        going = chain[keeps:]
        if self.abandoned is not None or (self.counts[_CONDEMNED] and (self.states[going] == _CONDEMNED).any()):
            self.unpin(int(chain[-1]))
            return
        if keeps:
            if guards[keeps - 1] < 1:
                raise InternalError(f"slot {chain[keeps - 1]} was unpinned more often than pinned")
            self.guard[chain[keeps - 1]] -= 1
        self.guards[going] = 0
        self.protected -= len(going)

    def unpin(self, slot: int) -> None:
        """Undo one `pin` of this slot, and free what is CONDEMNED and was kept by it alone, children before parents."""
        guard, parent, state = self.guard, self.parent, self.state
        no_longer = 0
        while slot >= 0:
            guards = guard[slot] - 1
            if guards < 0:
                raise InternalError(f"slot {slot} was unpinned more often than pinned")
            guard[slot] = guards
            if guards:
                break
            no_longer += 1
            if self.abandoned is not None:
                self.abandoned.append(slot)
            above = parent[slot]
            if state[slot] == _CONDEMNED:
                self.detach(slot)
                self.parent[slot] = NONE
                if slot not in self.held:
                    self.release(slot)
            slot = above
        self.protected -= no_longer


def _links(capacity: int) -> array[int]:
    return array("i", [NONE]) * capacity
