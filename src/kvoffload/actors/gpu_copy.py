"""GpuCopy: the asyncio half of one rank's copies. The other half, the threads, is `kvoffload.copy.hands`."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

import anyio

from kvoffload.copy.hands import CopyFact, CopyHands, HandsCrashed
from kvoffload.errors import InternalError
from kvoffload.mailbox import EndOfMailbox, Receiver, Reply
from kvoffload.messages import (
    BlocksFilled,
    Drain,
    DropReason,
    Flush,
    Job,
    LoadEnded,
    LoadFinished,
    SegmentGrown,
    SlotGrant,
    ToGpuCopy,
)
from kvoffload.observe.profiling import tagged

FromGpuCopy = BlocksFilled | LoadFinished | SegmentGrown


@dataclass(frozen=True, slots=True)
class GpuCopyConfig:
    """``settle_timeout_s`` bounds how long an ending actor waits for copies under way; `shutdown` as a whole may take 3 s."""

    rank: int = 0
    settle_timeout_s: float = 2.5


@dataclass(slots=True)
class _Waiting:
    """A Flush or Drain, and what has to be reported before it is answered."""

    reply: Reply[bool]
    saves: set[Job]
    loads: set[Job]
    deadline: float | None = None


class GpuCopy:
    """One rank's copies, as L1Manager sees them.

    Owns: the order of reports, what is left to report.
    Receives: `SlotGrant`, `Flush`, `Drain`; from the threads `BlocksFilled`, `LoadEnded`, `SegmentGrown`, `HandsCrashed`.
    Sends: to L1Manager `BlocksFilled` in the order of the grants, `LoadFinished`, `SegmentGrown`; their room was reserved.
    Ends: when its senders have closed. However it ends, saving stops, loads that did not start are withdrawn, and running copies
    are waited for and reported first; a crash of the threads is raised as InternalError.
    """

    def __init__(
        self,
        config: GpuCopyConfig,
        hands: CopyHands,
        receiver: Receiver[ToGpuCopy | CopyFact],
        to_l1: Callable[[FromGpuCopy], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._hands = hands
        self._receiver = receiver
        self._to_l1 = to_l1
        self._clock = clock
        self._burst: deque[ToGpuCopy | CopyFact] = deque()
        self._grants: OrderedDict[Job, BlocksFilled | None] = OrderedDict()
        # A Flush may find a load among the live ones whose end it has just passed on: the thread tells first and forgets then.
        self._told_loads: deque[Job] = deque(maxlen=1024)
        self._waiting: list[_Waiting] = []
        self._is_draining = False
        self._crash: BaseException | None = None

    async def run(self) -> None:
        """Until the mailbox ends. Raises InternalError when a copy thread has crashed."""
        try:
            while True:
                with anyio.move_on_after(self._time_left()):
                    self._burst.extend(await self._receiver.receive_burst())
                with tagged("gpu_copy"):
                    self._handle_burst()
                    self._keep_time()
                if self._crash is not None:
                    raise InternalError(f"a copy thread of rank {self._config.rank} crashed: {self._crash!r}") from self._crash
        except EndOfMailbox:
            pass
        finally:
            await self._settle()

    def _handle_burst(self) -> None:
        grown: SegmentGrown | None = None
        while self._burst:
            message = self._burst.popleft()
            match message:
                case SlotGrant():
                    self._take_grant(message)
                case BlocksFilled():
                    self._take_filled(message)
                case LoadEnded():
                    self._take_load(message)
                case SegmentGrown():
                    grown = message  # the last one wins
                case HandsCrashed():
                    self._crash = message.error
                case Flush():
                    self._wait_for_all(message.reply, None)
                case Drain():
                    self._is_draining = True
                    self._wait_for_all(message.reply, message.deadline)
                case _:
                    assert_never(message)
        if grown is not None:
            self._to_l1(grown)

    def _take_grant(self, grant: SlotGrant) -> None:
        if grant.slots:
            self._grants[grant.job] = None
        if self._is_draining and grant.slots:
            self._take_filled(BlocksFilled(grant.job, self._config.rank, (), grant.slots, DropReason.OFF))
        else:
            self._hands.granted(grant)

    def _take_filled(self, fact: BlocksFilled) -> None:
        if self._grants.get(fact.job, fact) is not None:
            raise InternalError(f"job {fact.job} was reported twice, or never granted: {fact}")
        self._grants[fact.job] = fact
        while self._grants and (first := next(iter(self._grants.values()))) is not None:
            self._report_filled(first)

    def _report_filled(self, fact: BlocksFilled) -> None:
        del self._grants[fact.job]
        self._to_l1(fact)
        for waiting in self._waiting:
            waiting.saves.discard(fact.job)
        self._answer_waiting()

    def _take_load(self, ended: LoadEnded) -> None:
        self._to_l1(LoadFinished(ended.job, self._config.rank, ended.outcome))
        self._told_loads.append(ended.job)
        for waiting in self._waiting:
            waiting.loads.discard(ended.job)
        self._answer_waiting()

    def _wait_for_all(self, reply: Reply[bool], deadline: float | None) -> None:
        loads = set(self._hands.live_loads()).difference(self._told_loads)
        self._waiting.append(_Waiting(reply, set(self._grants), loads, deadline))
        self._answer_waiting()

    def _answer_waiting(self) -> None:
        """In order: a Flush is answered after those before it, as what they wait for came before it too."""
        while self._waiting and not self._waiting[0].saves and not self._waiting[0].loads:
            self._waiting.pop(0).reply.answer(True)

    def _time_left(self) -> float | None:
        """Seconds until a grant or a Drain has waited too long; None when none waits."""
        times = [waiting.deadline for waiting in self._waiting if waiting.deadline is not None]
        if (expiry := self._hands.next_expiry()) is not None:
            times.append(expiry)
        return max(0.0, min(times) - self._clock()) if times else None

    def _keep_time(self) -> None:
        now = self._clock()
        expiry = self._hands.next_expiry()
        if expiry is not None and expiry <= now:
            self._hands.expire(now)  # reported by the hands, as any other failure
        late = [waiting for waiting in self._waiting if waiting.deadline is not None and waiting.deadline <= now]
        for waiting in late:
            self._waiting.remove(waiting)
            waiting.reply.answer(False)
        if late:
            self._answer_waiting()

    async def _settle(self) -> None:
        self._hands.stop_saving()
        self._hands.withdraw_all_unstarted()
        if not self._hands.wait_idle(0):
            with anyio.CancelScope(shield=True):
                await self._wait_idle()
        try:
            while left := self._receiver.receive_nowait():
                self._burst.extend(left)
        except EndOfMailbox:
            pass
        self._is_draining = True
        try:
            self._handle_burst()
            # A copy that has still not ended holds up no others; L1 hears nothing of it and keeps its slots.
            for fact in [fact for fact in self._grants.values() if fact is not None]:
                self._report_filled(fact)
        finally:  # what ended the actor may be among what is left, and raise again
            for waiting in self._waiting:
                waiting.reply.answer(False)
            self._waiting.clear()
            self._receiver.close()

    async def _wait_idle(self) -> None:
        """In a daemon thread: one of anyio's pool would keep the process from ending where this loop is abandoned."""
        idle: Reply[bool] = Reply()

        def wait() -> None:
            idle.answer(self._hands.wait_idle(self._config.settle_timeout_s))

        threading.Thread(target=wait, name="kvoffload-settle", daemon=True).start()
        await idle.wait()
