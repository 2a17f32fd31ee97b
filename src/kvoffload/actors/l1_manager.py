"""L1Manager: the actor around `kvoffload.l1.core`, which decides everything."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import assert_never

import anyio
from anyio.lowlevel import checkpoint

from kvoffload.l1.core import L1Core, L1Message
from kvoffload.l1.effects import Effect, ToPrefetcher, ToRank, ToScheduler, ToWriter
from kvoffload.mailbox import EndOfMailbox, Receiver, Reply
from kvoffload.messages import (
    BlocksFound,
    Drain,
    FetchBlocks,
    FetchFinished,
    FindBlocks,
    Flush,
    Job,
    Node,
    ParentMissing,
    PrefixHit,
    SlotGrant,
    ToL1Manager,
    WriteBlocks,
    WriteFinished,
)
from kvoffload.observe.profiling import tagged

BURST_S = 0.001
"""After so long the others on the loop have their turn; a slice of one message takes less."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A Flush or Drain, and the jobs that must end before it is answered True; then, unless ``is_last``, the writes that they led to."""

    reply: Reply[bool]
    jobs: frozenset[Job]
    deadline: float | None = None
    is_last: bool = False
    is_whole: bool = True


class L1Manager:
    """Owns: the index, the slots and the leases, all in ``core``.
    Receives: `ToL1Manager`, from SchedulerSide, from every rank's GpuCopy, and from the second tier.
    Sends: `SlotGrant` by ``to_rank``; `PrefixHit` and `ParentMissing` by ``to_scheduler``. Both return at once: answers never wait.
        `FindBlocks` and `FetchBlocks` by ``to_prefetcher``, `WriteBlocks` by ``to_writer``: a refusal is as if the node had failed.
    Ends: when all senders have closed. Who then still waits for a Flush or a Drain is answered False.
    """

    def __init__(
        self,
        core: L1Core,
        receiver: Receiver[ToL1Manager],
        to_rank: Callable[[int, SlotGrant], None],
        to_scheduler: Callable[[PrefixHit | ParentMissing], None],
        clock: Callable[[], float] = time.monotonic,
        *,
        to_prefetcher: Callable[[Node, FindBlocks | FetchBlocks], bool] = lambda node, message: False,
        to_writer: Callable[[Node, WriteBlocks], bool] = lambda node, message: False,
    ) -> None:
        self._core = core
        self._receiver = receiver
        self._to_rank = to_rank
        self._to_scheduler = to_scheduler
        self._to_prefetcher = to_prefetcher
        self._to_writer = to_writer
        self._clock = clock
        self._burst: deque[ToL1Manager] = deque()
        self._refusals: deque[L1Message] = deque()
        self._waiting: list[_Waiting] = []

    async def run(self) -> None:
        """Until the mailbox ends. An InternalError of the core goes to the supervisor: L1 cannot be trusted any more."""
        try:
            while True:
                with anyio.move_on_after(self._time_left()):
                    self._burst.extend(await self._receiver.receive_burst())
                await self._handle_burst()
                self._answer_waiting()
        except EndOfMailbox:
            pass
        finally:
            self._settle()

    async def _handle_burst(self) -> None:
        while self._has_work:
            with tagged("l1_manager"):
                self._handle_for(BURST_S)
            if self._has_work:
                await checkpoint()

    @property
    def _has_work(self) -> bool:
        return bool(self._burst) or self._core.has_work or bool(self._refusals) or self._is_due(self._clock())

    def _handle_for(self, limit_s: float) -> None:
        begun = now = self._clock()
        while now - begun <= limit_s:
            if self._core.has_work:
                self._perform(self._core.go_on(now))
            elif self._refusals:
                self._perform(self._core.handle(self._refusals.popleft(), now))
            elif self._is_due(now):
                self._perform(self._core.tick(now))
            elif self._burst:
                self._handle(self._burst.popleft(), now)
            else:
                return
            now = self._clock()

    def _is_due(self, now: float) -> bool:
        """Whether the deadline of a match has come, or something that is done by and by."""
        deadline = self._core.next_deadline()
        return deadline is not None and deadline <= now

    def _handle(self, message: ToL1Manager, now: float) -> None:
        if isinstance(message, Flush):
            jobs = self._core.open_jobs()
            if not message.nodes:
                jobs = _of_ranks(jobs)
            self._waiting.append(_Waiting(message.reply, jobs, is_last=not message.nodes))
        elif isinstance(message, Drain):
            self._perform(self._core.close())
            jobs = self._core.open_jobs() | self._core.unsettled_jobs()
            self._waiting.append(_Waiting(message.reply, jobs, message.deadline))
        else:
            self._perform(self._core.handle(message, now))

    def _perform(self, effects: list[Effect]) -> None:
        """Send all this; what the second tier refuses is dealt with next."""
        for effect in effects:
            match effect:
                case ToRank():
                    self._to_rank(effect.rank, effect.message)
                case ToScheduler():
                    self._to_scheduler(effect.message)
                case ToPrefetcher():
                    if not self._to_prefetcher(effect.node, effect.message):
                        self._refusals.append(_not_read(effect))
                case ToWriter():
                    if not self._to_writer(effect.node, effect.message):
                        self._refusals.append(WriteFinished(effect.message.batch, effect.node, (), effect.message.slots))
                case _:
                    assert_never(effect)

    def _answer_waiting(self) -> None:
        if not self._waiting:
            return
        now, nothing = self._clock(), frozenset[Job]()
        left: list[_Waiting] = []
        for waiting in self._waiting:
            # What may never settle has failed for a Flush; a Drain, which has a deadline, waits for it.
            unsettled = self._core.unsettled_jobs() if waiting.deadline is not None else nothing
            awaited = waiting.jobs & (self._core.open_jobs() | unsettled)
            if not awaited:
                if not waiting.is_last and (writes := self._core.open_writes() | unsettled):
                    left.append(replace(waiting, jobs=writes, is_last=True))
                else:
                    waiting.reply.answer(waiting.is_whole)
            elif waiting.deadline is not None and waiting.deadline <= now:
                waiting.reply.answer(False)
            elif self._core.has_lost_rank and (unreported := _of_ranks(awaited)):
                if waiting.deadline is None or awaited == unreported:
                    waiting.reply.answer(False)  # a lost rank does not report
                else:
                    left.append(replace(waiting, jobs=waiting.jobs - unreported, is_whole=False))  # but nodes do
            else:
                left.append(waiting)
        self._waiting = left

    def _time_left(self) -> float | None:
        """Seconds until the deadline of a Drain, or until the core has something to do; None when there is neither."""
        deadlines = [waiting.deadline for waiting in self._waiting if waiting.deadline is not None]
        if (next_deadline := self._core.next_deadline()) is not None:
            deadlines.append(next_deadline)
        return max(0.0, min(deadlines) - self._clock()) if deadlines else None

    def _settle(self) -> None:
        for waiting in self._waiting:
            waiting.reply.answer(False)
        self._waiting.clear()
        for message in self._burst:
            if isinstance(message, Flush | Drain):
                message.reply.gone()
        self._burst.clear()
        self._receiver.close()


def _of_ranks(jobs: frozenset[Job]) -> frozenset[Job]:
    """Those that ranks report; fetches and writes have negative numbers."""
    return frozenset(job for job in jobs if job >= 0)


def _not_read(effect: ToPrefetcher) -> L1Message:
    """The answer for a prefetcher that did not take the question."""
    message = effect.message
    if isinstance(message, FindBlocks):
        return BlocksFound(message.batch, effect.node, ())
    return FetchFinished(message.batch, effect.node, (), (), message.slots)
