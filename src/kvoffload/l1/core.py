"""L1, decided without a loop: messages in, effects out."""

from __future__ import annotations

from typing import assert_never

from kvoffload.errors import InternalError
from kvoffload.l1 import matching, removal, saving
from kvoffload.l1.check import check_all
from kvoffload.l1.effects import Effect, ToRank, ToScheduler
from kvoffload.l1.parts import L1Config, Parts
from kvoffload.l1.states import State
from kvoffload.l1.statistics import L1Statistics
from kvoffload.messages import (
    BlocksFilled,
    DropReason,
    ForgetRequest,
    Job,
    LoadFinished,
    LoadOutcome,
    MatchPrefix,
    RankLost,
    ReleaseHit,
    ReserveSlots,
    ResetCache,
    SegmentGrown,
    SlotGrant,
    StartLoad,
)

L1Message = (
    ReserveSlots | MatchPrefix | StartLoad | ReleaseHit | ForgetRequest | ResetCache | BlocksFilled | LoadFinished | SegmentGrown | RankLost
)
"""All that `L1Core.handle` takes; `Flush` and `Drain` are the shell's."""


class L1Core:
    """The index, the slots and the leases of one engine, at most ``capacity`` slots per rank.

    `handle` is all there is to it: it never waits, and what is to be sent it returns, in order. A message that cannot be (a report
    of an unknown job, a second one) raises InternalError; L1 is then not to be used any more.
    """

    def __init__(self, config: L1Config, capacity: int) -> None:
        self._config = config
        self._parts = Parts(config, capacity)
        self._populated = [0] * config.ranks
        self._lost: set[int] = set()
        self._closed = False
        self.generation = 0

    def handle(self, message: L1Message, now: float) -> list[Effect]:
        """Act on one message; ``now`` is `time.monotonic`, in seconds."""
        parts = self._parts
        match message:
            case ReserveSlots():
                return self._reserve(message)
            case BlocksFilled():
                saving.filled(parts, message)
            case MatchPrefix():
                answer = matching.refuse if self.is_off else matching.match
                return [ToScheduler(answer(parts, message, self.generation, now))]
            case StartLoad():
                matching.start_load(parts, message)
            case LoadFinished():
                matching.finish_load(parts, message)
            case ReleaseHit():
                parts.leases.release(message.request, message.sequence)
            case ForgetRequest():
                parts.leases.release(message.request)
            case ResetCache():
                self.generation = message.generation
                removal.reset(parts)
            case SegmentGrown():
                self._grow(message)
            case RankLost():
                self._lose(message.rank)
            case _:
                assert_never(message)
        return []

    @property
    def is_off(self) -> bool:
        """Whether new work is refused: a rank was lost, or `close` was called."""
        return self._closed or bool(self._lost)

    @property
    def has_lost_rank(self) -> bool:
        """Whether some rank was reported lost, so that jobs may never end."""
        return bool(self._lost)

    def close(self) -> None:
        """Refuse new work from now on; what was begun goes on to its end."""
        self._closed = True

    def rank_gone(self, rank: int) -> None:
        """The process of a lost rank is known to be gone, and reads and writes no more: what waited for its reports ends."""
        if rank not in self._lost:
            raise InternalError(f"rank {rank} is gone but was not reported lost")
        saves, loads = self._parts.inflight.awaited_from(rank)
        for job in saves:
            saving.filled(self._parts, BlocksFilled(job, rank, self._parts.inflight.saves[job].slots, ()))
        for job in loads:
            matching.finish_load(self._parts, LoadFinished(job, rank, LoadOutcome.WITHDRAWN))

    def open_jobs(self) -> frozenset[Job]:
        """The saves and loads that some rank has not reported and that hold slots."""
        return self._parts.inflight.open_jobs()

    def check(self) -> None:
        """Verify every invariant, in time proportional to the slots; raises InternalError."""
        check_all(self._parts)

    def statistics(self) -> L1Statistics:
        """A snapshot; takes constant time."""
        parts = self._parts
        counts = parts.counts
        return L1Statistics(
            slots={state: parts.slots.counts[state] for state in State},
            usable=parts.slots.usable,
            protected=parts.slots.protected,
            leases=len(parts.leases),
            saves=len(parts.inflight.saves),
            loads=len(parts.inflight.loads),
            matches=dict(counts.matches),
            asked=counts.asked,
            hit=counts.hit,
            offered=counts.offered,
            shared=counts.shared,
            committed=counts.committed,
            evictions=parts.evictor.evictions,
            invalidated=counts.invalidated,
            drops=dict(counts.drops),
        )

    def _reserve(self, message: ReserveSlots) -> list[Effect]:
        if self.is_off:
            blocks = sum(len(run.keys) for run in message.runs)
            self._parts.counts.offered += blocks
            self._parts.counts.drops[DropReason.OFF] += blocks
            return self._to_ranks(SlotGrant(message.job, (), (), ()))
        grant, missing = saving.reserve(self._parts, message)
        effects = self._to_ranks(grant)
        if missing is not None:
            effects.append(ToScheduler(missing))
        return effects

    def _to_ranks(self, grant: SlotGrant) -> list[Effect]:
        return [ToRank(rank, grant) for rank in range(self._config.ranks) if rank not in self._lost]

    def _grow(self, message: SegmentGrown) -> None:
        """A slot is usable when every rank has it; news that came late or twice changes nothing."""
        self._check_rank(message.rank)
        self._populated[message.rank] = max(self._populated[message.rank], message.slots)
        slots = self._parts.slots
        slots.grow(min(self._populated))
        self._parts.policy.resize(slots.usable)

    def _lose(self, rank: int) -> None:
        self._check_rank(rank)
        self._lost.add(rank)
        removal.quarantine(self._parts, rank)

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self._config.ranks:
            raise InternalError(f"there is no rank {rank}, only {self._config.ranks} ranks")
