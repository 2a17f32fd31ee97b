"""The hits that requests hold: each is one pin, on the deepest block of the hit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvoffload.errors import InternalError
from kvoffload.l1.slots import NONE, Slots, SlotTable

MANY = 32
"""From so many slots on numpy is faster than a loop."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The hit ``sequence`` of a request: ``length`` blocks down to the slot ``deepest``. ``chain`` is all of them, where they are many."""

    sequence: int
    deepest: int
    length: int
    chain: Slots | None


class Leases:
    """At most one lease per request, the newest; while it is here its pin is held."""

    def __init__(self, slots: SlotTable) -> None:
        self._slots = slots
        self.many = MANY
        self.held: dict[str, Lease] = {}

    def __len__(self) -> int:
        return len(self.held)

    def grant(self, request: str, sequence: int, deepest: int, length: int, room: int, likely: Slots | None = None) -> int:
        """Pin a hit for a request that holds none; gives how much of it, from its first block on.

        That is less than ``length`` where protecting further slots would bring their number above ``room``. ``likely`` is what the
        hit's slots should be, if somebody knows.
        """
        slots = self._slots
        chain = self._chain(deepest, length, likely)
        newly = self._pin(deepest, chain)
        over = min(newly, slots.protected - room)
        if over > 0:
            # What was protected before lies above what was not, so the slots too many are the deepest.
            self._unpin(deepest, chain)
            length -= over
            if not length:
                return 0
            deepest = slots.ancestor(deepest, over)
            chain = chain[:-over] if chain is not None else None
            self._pin(deepest, chain)
        self.held[request] = Lease(sequence, deepest, length, chain)
        return length

    def extend(self, request: str, deepest: int, length: int, room: int) -> bool:
        """The request's lease becomes this longer one of the same chain; False, and nothing changed, where there is no room for it."""
        lease, chain = self.held[request], self._chain(deepest, length)
        self._pin(deepest, chain)  # before the other goes: only what is new is walked
        if self._slots.protected > room:
            self._unpin(deepest, chain)
            return False
        self._unpin(lease.deepest, lease.chain)
        self.held[request] = Lease(lease.sequence, deepest, length, chain)
        return True

    def chain(self, request: str) -> tuple[list[int], Slots | None]:
        """The slots of the request's lease, parents first; and as an array, where they are many."""
        lease = self.held[request]
        return (self._slots.chain(lease.deepest), None) if lease.chain is None else (lease.chain.tolist(), lease.chain)

    def release_older(self, request: str, sequence: int) -> None:
        """The request asks anew, as ``sequence``: what it held goes."""
        lease = self.held.get(request)
        if lease is None:
            return
        if lease.sequence >= sequence:
            raise InternalError(f"request {request} asked for match {sequence} after match {lease.sequence}")
        self.release(request)

    def release(self, request: str, sequence: int | None = None) -> None:
        """End the request's lease, if it holds this one (or any, for None)."""
        lease = self.held.get(request)
        if lease is not None and (sequence is None or lease.sequence == sequence):
            del self.held[request]
            self._unpin(lease.deepest, lease.chain)

    def use(self, request: str, sequence: int, blocks: int) -> int:
        """End the lease, leaving a pin on the last of its first ``blocks`` blocks: that slot, the pin now the caller's.

        NONE when the request does not hold this lease (any more).
        """
        lease = self.held.get(request)
        if lease is None or lease.sequence != sequence:
            return NONE
        if not 0 < blocks <= lease.length:
            raise InternalError(f"request {request} loads {blocks} blocks of match {sequence}, which has {lease.length}")
        slot = self._slots.ancestor(lease.deepest, lease.length - blocks)
        self._slots.pin(slot)
        self.release(request)
        return slot

    def _chain(self, deepest: int, length: int, likely: Slots | None = None) -> Slots | None:
        """All slots down to this one, where walking them once is worth it."""
        if length < self.many:
            return None
        if likely is not None and len(likely) == length and likely[-1] == deepest:
            parents = self._slots.parents[likely]
            if parents[0] < 0 and (parents[1:] == likely[:-1]).all():
                return likely
        parent, slot = self._slots.parent, deepest
        chain = [deepest]
        chain += [slot := parent[slot] for _ in range(length - 1)]
        if parent[slot] >= 0 or min(chain) < 0:
            chain = self._slots.chain(deepest)[::-1]  # not so long: `matching.answer` says so
        return np.array(chain[::-1], dtype=np.intp)

    def _pin(self, deepest: int, chain: Slots | None) -> int:
        return self._slots.pin_chain(chain) if chain is not None else self._slots.pin(deepest)

    def _unpin(self, deepest: int, chain: Slots | None) -> None:
        if chain is not None:
            self._slots.unpin_chain(chain)
        else:
            self._slots.unpin(deepest)

    def release_all(self) -> None:
        """End every lease."""
        for request in list(self.held):
            self.release(request)
