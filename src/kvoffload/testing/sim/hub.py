"""The hub without a loop: the real `L1Core`, and mailboxes whose delivery the simulation decides."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from kvoffload.l1.core import L1Core
from kvoffload.l1.effects import ToPrefetcher, ToRank, ToWriter
from kvoffload.messages import (
    BlocksFilled,
    ConnectorOff,
    LoadFinished,
    MatchPrefix,
    ParentMissing,
    PrefixHit,
    ReserveSlots,
    SegmentGrown,
    SlotGrant,
    StartLoad,
    ToL1Manager,
    ToScheduler,
)
from kvoffload.testing.sim.memory import SimClock
from kvoffload.testing.sim.settings import SimSettings
from kvoffload.testing.sim.trace import Tag, Trace, shorten


class GrantTaker(Protocol):
    """The copy side as the hub sees it."""

    def issued(self, grant: SlotGrant) -> None:
        """L1 has decided on this grant; nobody has heard of it yet."""
        ...

    def granted(self, grant: SlotGrant) -> None: ...


class SimHub:
    """`kvoffload.connector.ports.HubPort` over an `L1Core`; nothing happens but in `tick`.

    ``mailbox`` is L1Manager's, in one order; ``reports`` are on their way to it from GpuCopy, ``grants`` to GpuCopy and ``answers`` to
    SchedulerSide, each in order.
    """

    def __init__(
        self,
        core: L1Core,
        settings: SimSettings,
        clock: SimClock,
        rng: random.Random,
        trace: Trace,
        progress: Callable[[], None],
        perhaps_fail: Callable[[], None],
    ) -> None:
        self.core = core
        self.live = True
        self.frozen = False
        self.dead = False
        self.mailbox: deque[ToL1Manager] = deque()
        self.reports: deque[BlocksFilled | LoadFinished | SegmentGrown] = deque()
        self.grants: deque[SlotGrant] = deque()
        self.answers: deque[ToScheduler] = deque()
        self.copies: GrantTaker | None = None
        self.waited_s = 0.0
        self._inbox: list[ToScheduler] = []
        self._settings = settings
        self._clock = clock
        self._rng = rng
        self._trace = trace
        self._progress = progress
        self._perhaps_fail = perhaps_fail

    # ------------------------------------------------------------ HubPort

    @property
    def is_live(self) -> bool:
        return self.live and not self.dead

    def offer(self, message: ToL1Manager) -> bool:
        self._perhaps_fail()
        full = len(self.mailbox) >= self._settings.mailbox_capacity
        if self.dead or full or self._rng.random() < self._settings.refuse_share:
            self._trace.note(f"refused: {_text(message)}", *_tags(message))
            return False
        self._post(message)
        return True

    def owe(self, message: ToL1Manager) -> None:
        self._perhaps_fail()
        self._post(message)

    def _post(self, message: ToL1Manager) -> None:
        self._trace.note(f"posted: {_text(message)}", *_tags(message))
        if not self.dead:
            self.mailbox.append(message)

    def take(self) -> Sequence[ToScheduler]:
        self._perhaps_fail()
        taken, self._inbox = self._inbox, []
        return taken

    def wait(self, timeout_s: float) -> bool:
        """Virtual: something may happen meanwhile, and time passes."""
        spent = timeout_s
        if self._rng.random() < self._settings.wait_finds_share:
            for _ in range(20):
                self._progress()
                if self._inbox:
                    spent = self._rng.random() * timeout_s
                    break
        self._clock.advance(spent)
        self.waited_s += spent
        return bool(self._inbox)

    # ------------------------------------------------------------ what the simulation moves

    def report(self, message: BlocksFilled | LoadFinished | SegmentGrown) -> None:
        """From GpuCopy."""
        self._trace.note(f"reported: {_text(message)}", *_tags(message))
        if not self.dead:
            self.reports.append(message)

    def tick(self) -> bool:
        """One small event, drawn among those that can happen; False when none can."""
        choices: list[Callable[[], None]] = []
        if self.mailbox and not self.frozen:
            choices += [self._handle_one] * 3
        if self.reports and not self.frozen:
            choices.append(self._deliver_report)
        if self.grants:
            choices.append(self._deliver_grant)
        if self.answers:
            choices.append(self._deliver_answer)
        if not choices:
            return False
        self._rng.choice(choices)()
        return True

    @property
    def is_quiet(self) -> bool:
        """Nothing is on its way to or from SchedulerSide."""
        return not (self.mailbox or self.answers or self._inbox)

    def die(self, reason: str) -> None:
        """The loop, and L1 with it, is gone for good; what it had said is still heard."""
        self._trace.note("the hub dies")
        self.dead = True
        self.mailbox.clear()
        self.reports.clear()
        self.answers.append(ConnectorOff(reason))

    def _handle_one(self) -> None:
        message = self.mailbox.popleft()
        effects = self.core.handle(message, self._clock.now)  # type: ignore[arg-type]
        while self.core.has_work:
            effects += self.core.go_on(self._clock.now)
        self._trace.note(f"handled: {_text(message)}", *_tags(message))
        for effect in effects:
            self._trace.note(f"effect: {_text(effect.message)}", *_tags(effect.message))
            if isinstance(effect, ToRank):
                if self.copies is not None:
                    self.copies.issued(effect.message)
                self.grants.append(effect.message)
            else:
                assert not isinstance(effect, ToPrefetcher | ToWriter), "there is no second tier here"
                self.answers.append(effect.message)

    def _deliver_report(self) -> None:
        self.mailbox.append(self.reports.popleft())

    def _deliver_grant(self) -> None:
        grant = self.grants.popleft()
        if self.copies is not None:
            self.copies.granted(grant)

    def _deliver_answer(self) -> None:
        self._inbox.append(self.answers.popleft())


def _text(message: object) -> str:
    match message:
        case ReserveSlots():
            runs = "; ".join(f"{run.request} blocks {shorten(run.blocks)}" for run in message.runs)
            return f"ReserveSlots job {message.job}: {runs}"
        case SlotGrant():
            return f"SlotGrant job {message.job}: blocks {shorten(message.blocks)} -> slots {shorten(message.slots)}"
        case BlocksFilled():
            reason = message.reason.value if message.reason else "all well"
            return f"BlocksFilled job {message.job}: filled {shorten(message.filled)}, failed {shorten(message.failed)} ({reason})"
        case PrefixHit():
            slots = shorten(message.slots)
            return (
                f"PrefixHit {message.request} #{message.sequence}: slots {slots} ({message.reason.name}, generation {message.generation})"
            )
        case MatchPrefix():
            return f"MatchPrefix {message.request} #{message.sequence}: {len(message.keys)} keys"
    return repr(message)


def _tags(message: object) -> list[Tag]:
    tags: list[Tag] = []
    match message:
        case ReserveSlots():
            tags += [f"request {run.request}" for run in message.runs]
            tags += [f"block {block}" for run in message.runs for block in run.blocks]
        case ParentMissing():
            tags += [f"request {request}" for request in message.requests]
        case SlotGrant():
            tags += [f"slot {slot}" for slot in message.slots] + [f"block {block}" for block in message.blocks]
        case BlocksFilled():
            tags += [f"slot {slot}" for slot in (*message.filled, *message.failed)]
        case PrefixHit():
            tags += [f"request {message.request}", *(f"slot {slot}" for slot in message.slots)]
        case StartLoad():
            tags.append(f"request {message.request}")
        case _:
            request = getattr(message, "request", None)
            if request is not None:
                tags.append(f"request {request}")
    job = getattr(message, "job", None)
    if job is not None:
        tags.append(f"job {job}")
    return tags
