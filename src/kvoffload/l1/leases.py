"""The hits that requests hold: each is one pin, on the deepest block of the hit."""

from __future__ import annotations

from dataclasses import dataclass

from kvoffload.errors import InternalError
from kvoffload.l1.slots import NONE, SlotTable


@dataclass(frozen=True, slots=True)
class Lease:
    """The hit ``sequence`` of a request: ``length`` blocks down to the slot ``deepest``."""

    sequence: int
    deepest: int
    length: int


class Leases:
    """At most one lease per request, the newest; while it is here its pin is held."""

    def __init__(self, slots: SlotTable) -> None:
        self._slots = slots
        self.held: dict[str, Lease] = {}

    def __len__(self) -> int:
        return len(self.held)

    def grant(self, request: str, sequence: int, deepest: int, length: int, room: int) -> int:
        """Pin a hit for a request that holds none; gives how much of it, from its first block on.

        That is less than ``length`` where protecting further slots would bring their number above ``room``.
        """
        slots = self._slots
        newly = slots.pin(deepest)
        over = min(newly, slots.protected - room)
        if over > 0:
            # What was protected before lies above what was not, so the slots too many are the deepest.
            slots.unpin(deepest)
            length -= over
            if not length:
                return 0
            deepest = slots.ancestor(deepest, over)
            slots.pin(deepest)
        self.held[request] = Lease(sequence, deepest, length)
        return length

    def extend(self, request: str, deepest: int, length: int, room: int) -> bool:
        """The request's lease becomes this longer one of the same chain; False, and nothing changed, where there is no room for it."""
        slots, lease = self._slots, self.held[request]
        slots.pin(deepest)  # before the other goes: only what is new is walked
        if slots.protected > room:
            slots.unpin(deepest)
            return False
        slots.unpin(lease.deepest)
        self.held[request] = Lease(lease.sequence, deepest, length)
        return True

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
            self._slots.unpin(lease.deepest)

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

    def release_all(self) -> None:
        """End every lease."""
        for request in list(self.held):
            self.release(request)
