"""What the tests of L1 share: a core on one line, and keys that are chains."""

from __future__ import annotations

from collections.abc import Sequence

from kvoffload.l1 import L1Config, L1Core, State, ToRank, ToScheduler
from kvoffload.l1.core import L1Message
from kvoffload.messages import (
    ROOT,
    BlockKey,
    BlocksFilled,
    DropReason,
    MatchPrefix,
    ParentMissing,
    PrefixHit,
    ReserveSlots,
    SaveRun,
    SegmentGrown,
    SlotGrant,
)


def chain(name: str, length: int) -> tuple[BlockKey, ...]:
    """The keys of a prompt of this name: unlike any other's."""
    return tuple(f"{name}.{block}".encode().rjust(24, b"\0")[::-1] for block in range(length))


def run(keys: Sequence[BlockKey], start: int = 0, request: str = "r") -> SaveRun:
    """The blocks of this chain from ``start`` on, in engine blocks of the same numbers."""
    ids = tuple(range(start, len(keys)))
    return SaveRun(request, keys[start - 1] if start else ROOT, tuple(keys[start:]), ids, tuple(i + 1000 for i in ids))


class Rig:
    """A core that checks itself after each message, and the shortest way to say what tests say often."""

    def __init__(self, slots: int, ranks: int = 1, **config: object) -> None:
        self.core = L1Core(L1Config(ranks=ranks, **config), slots)  # type: ignore[arg-type]
        self.ranks = ranks
        self.job = self.sequence = 0
        for rank in range(ranks):
            self.send(SegmentGrown(rank, slots))

    def send(self, message: L1Message) -> list[SlotGrant | PrefixHit | ParentMissing]:
        effects = self.core.handle(message, now=5.0)
        while self.core.has_work:
            effects += self.core.go_on(5.0)
        self.core.check()
        mine = [effect.message for effect in effects if isinstance(effect, ToRank | ToScheduler)]
        assert len(mine) == len(effects), "there is no second tier here"
        return mine

    def reserve(self, *runs: SaveRun) -> tuple[SlotGrant, tuple[str, ...]]:
        """A new job; its grant, and the requests whose parents are missing."""
        self.job += 1
        answers = self.send(ReserveSlots(self.job, runs))
        grants = [answer for answer in answers if isinstance(answer, SlotGrant)]
        assert grants == [grants[0]] * self.ranks
        missing = [request for answer in answers if isinstance(answer, ParentMissing) for request in answer.requests]
        return grants[0], tuple(missing)

    def fill(self, grant: SlotGrant, *failed: int, rank: int = 0, reason: DropReason | None = None) -> None:
        """This rank has filled the grant, save for the blocks at these places."""
        bad = tuple(grant.slots[at] for at in failed)
        good = tuple(slot for slot in grant.slots if slot not in bad)
        self.send(BlocksFilled(grant.job, rank, good, bad, reason))

    def save(self, keys: Sequence[BlockKey], start: int = 0) -> tuple[int, ...]:
        """Reserve and fill on every rank; the slots."""
        grant, _ = self.reserve(run(keys, start))
        for rank in range(self.ranks if grant.slots else 0):
            self.fill(grant, rank=rank)
        return grant.slots

    def match(self, keys: Sequence[BlockKey], request: str = "r") -> PrefixHit:
        self.sequence += 1
        (hit,) = self.send(MatchPrefix(request, self.sequence, tuple(keys), deadline=6.0))
        assert isinstance(hit, PrefixHit)
        return hit

    def slots_in(self, state: State) -> int:
        return self.core.statistics().slots[state]

    def drops(self, reason: DropReason) -> int:
        return self.core.statistics().drops.get(reason, 0)
