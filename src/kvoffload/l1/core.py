"""L1, decided without a loop: messages in, effects out."""

from __future__ import annotations

from typing import assert_never

from kvoffload.errors import InternalError
from kvoffload.l1 import fetching, matching, removal, saving, waiting, writing
from kvoffload.l1.catching_up import CatchingUp
from kvoffload.l1.check import check_all
from kvoffload.l1.effects import Effect, ToRank, ToScheduler
from kvoffload.l1.parts import L1Config, Parts, Slices
from kvoffload.l1.remote import Remote, RemoteConfig
from kvoffload.l1.states import State
from kvoffload.l1.statistics import L1Statistics, RemoteStatistics
from kvoffload.messages import (
    BlocksFilled,
    BlocksFound,
    DropReason,
    FetchFinished,
    ForgetRequest,
    Job,
    LoadFinished,
    LoadOutcome,
    MatchPrefix,
    NodeBack,
    NodesChanged,
    PrefixHit,
    RankLost,
    ReleaseHit,
    ReserveSlots,
    ResetCache,
    SegmentGrown,
    SlotGrant,
    StartLoad,
    TransfersSettled,
    WriteFinished,
)

FromNodes = BlocksFound | FetchFinished | WriteFinished | TransfersSettled | NodesChanged | NodeBack
"""What concerns the second tier alone."""

L1Message = (
    ReserveSlots
    | MatchPrefix
    | StartLoad
    | ReleaseHit
    | ForgetRequest
    | ResetCache
    | BlocksFilled
    | LoadFinished
    | SegmentGrown
    | RankLost
    | FromNodes
)
"""All that `L1Core.handle` takes; `Flush` and `Drain` are the shell's."""


class L1Core:
    """The index, the slots and the leases of one engine, at most ``capacity`` slots per rank; ``remote`` where there is a second tier.

    `handle` (and `tick`, for what is due) is all there is to it: it never waits, and what is to be sent it returns, in order. A long
    message is dealt with in slices, between which others on the loop may have their turn, but no other message is handled. One that
    cannot be (a report of an unknown job, a second one) raises InternalError; L1 is then not to be used any more.
    """

    def __init__(self, config: L1Config, capacity: int, remote: RemoteConfig | None = None) -> None:
        self._config = config
        self._parts = Parts(config, capacity, remote)
        self._remote = self._parts.remote
        self._catching_up = CatchingUp(self._parts, self._remote) if self._remote is not None else None
        self._populated = [0] * config.ranks
        self._lost: set[int] = set()
        self._closed = False
        self._effects: list[Effect] = []
        self._work: Slices[None] | None = None

    def handle(self, message: L1Message, now: float) -> list[Effect]:
        """Act on one message; ``now`` is `time.monotonic`, in seconds. There may be more to it: see `has_work`."""
        return self._begin(self._handle(message, now), now)

    def tick(self, now: float) -> list[Effect]:
        """Answer the matches whose deadline has come, and do what is done by and by. There may be more to it, as with a message."""
        return self._begin(self._due(), now)

    @property
    def has_work(self) -> bool:
        """Whether the last message is not dealt with yet: `go_on`, again and again, before another is handled."""
        return self._work is not None

    def go_on(self, now: float) -> list[Effect]:
        """Deal with some more of the last message, for less than a millisecond."""
        if self._remote is not None:
            self._remote.now = now
        if self._work is not None:
            work, self._work = self._work, None
            for _ in work:
                self._work = work
                break
        return self._take_effects()

    def _due(self) -> Slices[None]:
        if self._remote is not None and self._catching_up is not None:
            yield from waiting.expire(self._parts, self._remote)
            yield from self._catching_up.step()

    def _begin(self, work: Slices[None], now: float) -> list[Effect]:
        effects: list[Effect] = []
        while self._work is not None:
            effects += self.go_on(now)
        self._work = self._whole(work)
        return effects + self.go_on(now) if effects else self.go_on(now)

    def _whole(self, work: Slices[None]) -> Slices[None]:
        """And what is to be done after anything."""
        yield from work
        if self._remote is not None and self._remote.has_fallen:
            yield from waiting.look_again(self._parts, self._remote)
        if self._remote is not None and self._catching_up is not None and self._remote.dropped:
            self._catching_up.later(self._remote.dropped)
            self._remote.dropped.clear()
        if not self._config.keeps:
            yield from removal.let_go_abandoned(self._parts)

    def _take_effects(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects + self._remote.take_effects() if self._remote is not None else effects

    def next_deadline(self) -> float | None:
        """When `tick` is to be called, if no message comes before."""
        if self._remote is None or self._catching_up is None:
            return None
        of_matches, later = self._remote.next_deadline(), self._catching_up.next_at
        if of_matches is None or later is None:
            return of_matches if later is None else later
        return min(of_matches, later)

    def _handle(self, message: L1Message, now: float) -> Slices[None]:
        parts = self._parts
        match message:
            case ReserveSlots():
                yield from self._reserve(message)
            case BlocksFilled():
                yield from saving.filled(parts, message)
            case MatchPrefix():
                answer = yield from self._match(message, now)
                if answer is not None:
                    self._effects.append(ToScheduler(answer))
            case StartLoad():
                matching.start_load(parts, message)
            case LoadFinished():
                matching.finish_load(parts, message)
            case ReleaseHit():
                parts.leases.release(message.request, message.sequence)
                if self._remote is not None:
                    self._remote.give_up(message.request, message.sequence)
            case ForgetRequest():
                parts.leases.release(message.request)
                if self._remote is not None:
                    self._remote.give_up(message.request)
            case ResetCache():
                parts.generation = message.generation
                removal.reset(parts)
                if self._remote is not None and self._catching_up is not None:
                    self._remote.reset(message.generation)
                    self._catching_up.end()
            case SegmentGrown():
                self._grow(message)
            case RankLost():
                self._lose(message.rank)
            case BlocksFound() | FetchFinished() | WriteFinished() | TransfersSettled() | NodesChanged() | NodeBack():
                yield from self._from_nodes(message)
            case _:
                assert_never(message)

    @property
    def generation(self) -> int:
        """Of the last `ResetCache`."""
        return self._parts.generation

    @property
    def is_off(self) -> bool:
        """Whether new work is refused: a rank was lost, or `close` was called."""
        return self._closed or bool(self._lost)

    @property
    def has_lost_rank(self) -> bool:
        """Whether some rank was reported lost, so that jobs may never end."""
        return bool(self._lost)

    def close(self) -> list[Effect]:
        """Refuse new work from now on, and tell the matches that wait so; what was begun goes on to its end."""
        self._closed = True
        self._stop_remote()
        self._let_go()
        return self._remote.take_effects() if self._remote is not None else []

    def _let_go(self) -> None:
        if not self._config.keeps:
            for _ in removal.let_go_abandoned(self._parts):
                pass

    def rank_gone(self, rank: int) -> None:
        """The process of a lost rank is known to be gone, and reads and writes no more: what waited for its reports ends."""
        if rank not in self._lost:
            raise InternalError(f"rank {rank} is gone but was not reported lost")
        saves, loads = self._parts.inflight.awaited_from(rank)
        for job in saves:
            for _ in saving.filled(self._parts, BlocksFilled(job, rank, self._parts.inflight.saves[job].slots, ())):
                pass
        for job in loads:
            matching.finish_load(self._parts, LoadFinished(job, rank, LoadOutcome.WITHDRAWN))
        self._let_go()

    def open_jobs(self) -> frozenset[Job]:
        """The saves and loads that some rank has not reported and that hold slots; the fetches and writes that nodes have not reported,
        as negative numbers."""
        jobs = self._parts.inflight.open_jobs()
        return jobs if self._remote is None else jobs | self._remote.open_jobs()

    def open_writes(self) -> frozenset[Job]:
        """The writes to nodes among them."""
        return frozenset(self._remote.open_writes()) if self._remote is not None else frozenset()

    def unsettled_jobs(self) -> frozenset[Job]:
        """Fetches and writes that have failed, and of which something may still use slots: negative numbers too. Perhaps for ever."""
        return frozenset(self._remote.unsettled_jobs()) if self._remote is not None else frozenset()

    def check(self) -> None:
        """Verify every invariant, in time proportional to the slots; raises InternalError."""
        check_all(self._parts)
        if self._catching_up is not None:
            self._catching_up.check()

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
            remote=self._remote_statistics(),
        )

    def _remote_statistics(self) -> RemoteStatistics | None:
        if self._remote is None or self._catching_up is None:
            return None
        return self._remote.statistics(len(self._parts.slots.held), len(self._catching_up))

    def _match(self, message: MatchPrefix, now: float) -> Slices[PrefixHit | None]:
        if self.is_off:
            return matching.refuse(self._parts, message, now)
        if self._remote is None:
            return (yield from matching.match(self._parts, message, now))
        return (yield from waiting.match(self._parts, self._remote, message))

    def _from_nodes(self, message: FromNodes) -> Slices[None]:
        parts, remote, catching_up = self._parts, self._remote, self._catching_up
        if remote is None or catching_up is None:
            raise InternalError(f"{type(message).__name__}, and there is no second tier")
        match message:
            case BlocksFound():
                if catching_up.has_asked(message.batch):
                    catching_up.found(message)
                else:
                    yield from waiting.found(parts, remote, message)
                    catching_up.question_ended(message.batch)
            case FetchFinished():
                yield from fetching.finished(parts, remote, message)
                yield from waiting.resume(parts, remote, message.batch)
                catching_up.batch_ended(message.batch)
            case WriteFinished():
                writing.finished(parts, remote, message)
                catching_up.write_ended(message)
            case TransfersSettled():
                self._settle(remote, message)
            case NodesChanged():
                yield from catching_up.nodes_changed(message.ring)
            case NodeBack():
                yield from catching_up.node_back(message.node)
            case _:
                assert_never(message)

    def _settle(self, remote: Remote, message: TransfersSettled) -> None:
        slots = set(message.slots)
        for table, settled in ((remote.unsettled_fetches, fetching.settled), (remote.unsettled_writes, writing.settled)):
            left = table.get(message.batch)
            if left is not None and slots <= left and len(slots) == len(message.slots):
                settled(self._parts, remote, message.slots)
                left -= slots
                if not left:
                    del table[message.batch]
                if self._catching_up is not None and table is remote.unsettled_writes:
                    self._catching_up.later((message.node,))
                return
        raise InternalError(f"node {message.node} settled slots {message.slots} of batch {message.batch}, which were not unsettled")

    def _stop_remote(self) -> None:
        if self._remote is not None and self._catching_up is not None:
            self._remote.is_stopped = True
            self._catching_up.end()
            waiting.refuse_all(self._parts, self._remote)

    def _reserve(self, message: ReserveSlots) -> Slices[None]:
        if self.is_off:
            blocks = sum(len(run.keys) for run in message.runs)
            self._parts.counts.offered += blocks
            self._parts.counts.drops[DropReason.OFF] += blocks
            self._effects += self._to_ranks(SlotGrant(message.job, (), (), ()))
            return
        grant, missing = yield from saving.reserve(self._parts, message)
        self._effects += self._to_ranks(grant)
        if missing is not None:
            self._effects.append(ToScheduler(missing))

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
        self._stop_remote()

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self._config.ranks:
            raise InternalError(f"there is no rank {rank}, only {self._config.ranks} ranks")
