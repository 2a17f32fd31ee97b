"""From the slot that the policy names to the slot that goes: only leaves go, and nothing that is pinned."""

from __future__ import annotations

from kvoffload.l1.eviction.policy import EvictionPolicy
from kvoffload.l1.index import KeyIndex
from kvoffload.l1.slots import NONE, SlotTable
from kvoffload.l1.states import State
from kvoffload.messages import BlockKey

BACKS = 8
"""How many named slots that have children are sent back in one reservation; behind that, the tail of the named one's chain goes."""
SKIPS = 500
"""How many named slots may be kept for being in use in one reservation, before it goes without."""
STEPS = 8_192
"""How many steps from parents to children one reservation may take in search of tails."""
LOOK = 64
"""How many slots to have named at once, at most."""

_FREE, _READY = int(State.FREE), int(State.READY)


class Evictor:
    """Evicts READY leaves in the policy's order, by one rule that every policy shares.

    A named slot that is protected is kept, and one that is being written to a node is sent back, at most SKIPS times. One that has
    children is sent back once, at most BACKS times; after that the end of its chain goes, found by following first READY children
    down; where a chain ends in blocks being filled or written the named slot is kept. A chain begun is finished before another: where
    its last tail went is remembered, so that a long chain is walked down once and not once per block.

    The limits are per reservation and bound its time. Where SKIPS binds, a reservation finds less than there is; the queue has then
    moved on, and a later one finds it. Where it does not, a reservation that found too little took all there was.
    """

    def __init__(self, slots: SlotTable, index: KeyIndex, policy: EvictionPolicy) -> None:
        self._slots = slots
        self._index = index
        self._policy = policy
        self._sent_back: set[int] = set()
        self._skips = self._steps = 0
        self._chain = self._end = NONE  # the named slot whose chain is being taken, and the chain's end
        self.evictions = 0

    def begin(self) -> None:
        """A new reservation: the limits are fresh."""
        self._policy.begin()
        self._sent_back.clear()
        self._skips = SKIPS
        self._steps = STEPS

    def forget(self) -> None:
        """Slots left the index otherwise than by `evict`: a remembered chain may be gone."""
        self._chain = self._end = NONE

    def evict(self, count: int) -> list[int]:
        """Up to ``count`` slots, evicted: FREE, out of the index and of every list; the caller owns them."""
        policy = self._policy
        victims: list[int] = []
        look, idle = 1, 0
        while len(victims) < count:
            named = policy.names(min(look, count - len(victims)))
            keys = self._leave(named)
            if keys:
                victims += named[: len(keys)]
                policy.evict(named[: len(keys)], keys)
                idle = 0
            if len(keys) == len(named):
                if not named:
                    break
                look = min(2 * look, LOOK)
                continue
            look = 1
            tails = self._instead_of(named[len(keys)], min(LOOK, count - len(victims)))
            if tails:
                keys = self._leave(tails)
                victims += tails[: len(keys)]
                for slot, key in zip(tails, keys, strict=False):
                    policy.take_out(slot, key)
                idle = 0
            else:
                idle += 1
                # Twice round everything (out of a first queue into a second, then round that) with nothing found is enough.
                if self._skips <= 0 or idle > 2 * len(policy) + BACKS:
                    break
        counts = self._slots.counts
        counts[_READY] -= len(victims)
        counts[_FREE] += len(victims)
        self.evictions += len(victims)
        victims.reverse()  # children come before parents: so the next chain has its parents first in memory
        return victims

    def _leave(self, named: list[int]) -> list[BlockKey]:
        """Take the first of these out of the index and the family tree, up to the first one that cannot go; their keys."""
        slots, shards = self._slots, self._index.shards
        if slots.held:
            named = named[: next((at for at, slot in enumerate(named) if slot in slots.held), None)]
        guard, parent, state, keys = slots.guard, slots.parent, slots.state, slots.keys
        first_child, next_sibling = slots.first_child, slots.next_sibling
        end = self._end
        left: list[BlockKey] = []
        for slot in named:
            if first_child[slot] >= 0 or guard[slot]:
                break
            key = keys[slot]
            left.append(key)
            del shards[key[0]][key]
            state[slot] = _FREE
            above = parent[slot]
            if above >= 0:
                if next_sibling[slot] < 0 and first_child[above] == slot:
                    first_child[above] = NONE
                else:
                    slots.detach(slot)
            if slot == end:
                self._end = end = above
                if slot == self._chain:
                    self._chain = NONE
        return left

    def _instead_of(self, named: int, limit: int) -> list[int]:
        """What may go in place of a slot that cannot go itself; nothing: ask the policy again, if any skips are left."""
        if named in self._slots.held:
            self._policy.send_back(named)  # being written is no use
            self._skips -= 1
            return []
        if not self._slots.guard[named]:
            if named != self._chain and named not in self._sent_back and len(self._sent_back) < BACKS:
                self._sent_back.add(named)
                self._policy.send_back(named)
                return []
            tails = self._tails(named, limit)
            if tails:
                return tails
            if self._steps <= 0:
                self._skips = 0  # so far for now: the next reservation goes on from there
                return []
        self._policy.keep(named)
        self._skips -= 1
        return []

    def _tails(self, named: int, limit: int) -> list[int]:
        """The end of the chain of an unprotected slot, if it can go, and what is above it, which can unless it has more children."""
        first_child, next_sibling, state = self._slots.first_child, self._slots.next_sibling, self._slots.state
        slot = self._end if named == self._chain else named
        while self._steps > 0:
            child = first_child[slot]
            while child >= 0 and state[child] != _READY:
                child = next_sibling[child]
                self._steps -= 1
            if child < 0:
                break
            slot = child
            self._steps -= 1
        self._chain, self._end = named, slot
        # The parent of what is being reserved is held by its own guard alone, so that it may be met here.
        if first_child[slot] >= 0 or self._slots.guard[slot] or slot in self._slots.held:
            return []
        tails = [slot]
        while slot != named and len(tails) < limit:
            slot = self._slots.parent[slot]
            tails.append(slot)
        return tails
