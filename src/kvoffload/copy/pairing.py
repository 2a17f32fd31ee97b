"""A save starts when its two halves have met: the grant of slots from L1, and the word of vLLM's thread that the step was launched.

Pure, and not locked: `CopyHands` holds its lock around every call.
"""

from __future__ import annotations

from collections import OrderedDict

from kvoffload.messages import Job, SaveBlocks, SlotGrant

_REMEMBERED = 1024
"""Dropped jobs whose other half may still come. One forgotten too early costs nothing but another `timeout_s` of waiting alone."""


class PairingTable:
    """Halves that wait for the other one, at most ``timeout_s`` seconds and ``max_saves`` of vLLM's halves.

    Grants have their room reserved by L1. Job numbers are never reused, so a late half can never meet the wrong one.
    """

    def __init__(self, timeout_s: float, max_saves: int) -> None:
        self._timeout_s = timeout_s
        self._max_saves = max_saves
        self._granted: OrderedDict[Job, tuple[SlotGrant, float]] = OrderedDict()
        self._saved: OrderedDict[Job, tuple[SaveBlocks, float]] = OrderedDict()
        self._dropped: OrderedDict[Job, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._granted) + len(self._saved)

    def has_room(self, now: float) -> bool:
        """For one more `SaveBlocks`; those that waited too long are dropped for it."""
        self._expire_saved(now)
        return len(self._saved) < self._max_saves

    def add_saved(self, message: SaveBlocks, now: float) -> SlotGrant | None:
        """The grant that this completes, or None: it waits, or is ignored because its grant was dropped."""
        if (waiting := self._granted.pop(message.job, None)) is not None:
            return waiting[0]
        if not self._was_dropped(message.job):
            self._saved[message.job] = (message, now)
        return None

    def add_granted(self, grant: SlotGrant, now: float) -> SaveBlocks | None:
        """The half that this completes, or None: it waits. Ask `was_dropped` first."""
        if (waiting := self._saved.pop(grant.job, None)) is not None:
            return waiting[0]
        self._granted[grant.job] = (grant, now)
        return None

    def drop_saved(self, job: Job) -> SlotGrant | None:
        """vLLM's half of this job was refused: its grant, now out of the table, or None: it is known as dropped if it comes."""
        waiting = self._granted.pop(job, None)
        if waiting is None:
            self._remember(job)
            return None
        return waiting[0]

    def was_dropped(self, job: Job) -> bool:
        """Whether this grant comes too late. Tells once."""
        return self._was_dropped(job)

    def expire(self, now: float) -> list[SlotGrant]:
        """Grants that waited too long, out of the table."""
        self._expire_saved(now)
        late = []
        while self._granted:
            grant, since = next(iter(self._granted.values()))
            if since + self._timeout_s > now:
                break
            del self._granted[grant.job]
            self._remember(grant.job)
            late.append(grant)
        return late

    def next_expiry(self) -> float | None:
        """When `expire` has something to do, at the earliest."""
        firsts = [next(iter(waiting.values()))[1] for waiting in (self._granted, self._saved) if waiting]
        return min(firsts) + self._timeout_s if firsts else None

    def clear(self) -> list[SlotGrant]:
        """All grants that wait; the table is empty after it."""
        grants = [grant for grant, _ in self._granted.values()]
        self._granted.clear()
        self._saved.clear()
        return grants

    def _expire_saved(self, now: float) -> None:
        while self._saved:
            message, since = next(iter(self._saved.values()))
            if since + self._timeout_s > now:
                return
            del self._saved[message.job]
            self._remember(message.job)

    def _was_dropped(self, job: Job) -> bool:
        if job not in self._dropped:
            return False
        del self._dropped[job]
        return True

    def _remember(self, job: Job) -> None:
        self._dropped[job] = None
        if len(self._dropped) > _REMEMBERED:
            self._dropped.popitem(last=False)
