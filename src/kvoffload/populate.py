"""From memory that is only promised to slots that may be used: populated step by step, prepared for copies, reported."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kvoffload.errors import CapacityError
from kvoffload.observe.logs import get_logger
from kvoffload.segment import STEP_BYTES, Crew, Segment

log = get_logger("populate")

LONGEST_PAUSE_S = 1.0
"""Between pieces prepared while the model runs. Each may hold up all who call the driver: the next waits for as long as the last took."""

MOST_ASKS = 64
"""For slots that an engine does not give: parts of a page, where memory ran out there. Each costs a step of vLLM some microseconds."""

CREW_STEP_BYTES = 8 * STEP_BYTES
"""Of several threads together: long enough that starting them costs nothing."""


class Prepare(Protocol):
    """`kvoffload.copy.engine.CopyEngine.prepare_slots`: how many slots may be used, given that so many are in memory."""

    def __call__(self, populated: int, *, at_start: bool = False) -> int: ...


@dataclass(frozen=True, slots=True)
class Preparation:
    """What populated slots need before they may be copied to: a GPU's engine pins them.

    The engine is asked for ``piece_slots`` more at a time, or for the last few; None: for all there are after each step. While
    ``needs_leave()`` it is, besides at the start, not asked before `Populator.allow`. Where it no longer needs leave, nothing is gained
    by being asked at the start. Called from the thread that asks.
    """

    prepare: Prepare
    piece_slots: int | None = None
    needs_leave: Callable[[], bool] = lambda: False
    crew: Crew | None = None
    later_piece_slots: int | None = None
    """After the start, instead of ``piece_slots``."""


class Populator:
    """Makes the slots of a segment usable: the first on the caller's thread, the rest from a thread of low priority.

    ``on_grown(slots)`` is called, from the thread that does it, after each step that made slots usable. When memory runs out
    (ENOMEM, or ``headroom()`` says that fewer than the next step's bytes may be taken) it stops with what there is; `error` has the
    reason. Without a ``preparation`` populated slots are usable.
    """

    def __init__(
        self,
        segment: Segment,
        on_grown: Callable[[int], None],
        *,
        headroom: Callable[[], int] | None = None,
        step_bytes: int = STEP_BYTES,
        preparation: Preparation | None = None,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], bool] | None = None,
    ) -> None:
        self._segment = segment
        self._on_grown = on_grown
        self._headroom = headroom
        self._step_bytes = step_bytes
        self._preparation = preparation
        self._crew = preparation.crew if preparation is not None else None
        self._clock = clock
        self._usable = 0
        self._stop = threading.Event()
        self._pause = pause or self._stop.wait  # whether it is to stop
        self._pause_s = 0.0
        self._gave_less = False  # than it was asked for: then asking again at once is of no use
        self._go_on = threading.Event()  # set by `allow` and `close`
        self._thread = threading.Thread(target=self._run, name="kvoffload-populate", daemon=True)
        self.error: Exception | None = None

    def first_slots(self, seconds: float = 0.0) -> int:
        """On the caller's thread, before `start`: the least that gives a usable slot, and as much more as ``seconds`` allow.

        Raises CapacityError when memory does not suffice for one slot; when it runs out later, `start` will find that again. Raises
        what the preparation does.
        """
        deadline = self._clock() + seconds
        segment, is_short = self._segment, False
        while not (is_short or self._stop.is_set() or segment.populated_slots == segment.slots):
            if segment.populated_slots and (self._clock() >= deadline or not self._gains_by_the_start()):
                break
            try:
                self._step()
            except CapacityError:
                if not segment.populated_slots:
                    raise
                is_short = True
            self._prepare_pieces(at_start=True)
        self._prepare_pieces(all_of_it=True, at_start=True)
        return self._usable

    def start(self) -> None:
        """Begin with the rest; once."""
        self._thread.start()

    def allow(self) -> None:
        """The engine may be asked to prepare slots now: no CUDA graph is captured any more. From any thread, any number of times."""
        if not self._go_on.is_set():
            self._go_on.set()

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended within ``timeout_s``, with all of the segment or with an `error`."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def close(self, timeout_s: float = 1.0) -> bool:
        """Stop after the step under way; whether that was within ``timeout_s``. The segment may be closed after it."""
        self._stop.set()
        self._go_on.set()
        return self._thread.ident is None or self.wait(timeout_s)

    def _run(self) -> None:
        _be_nice()
        try:
            self._populate_rest()
            self._prepare_rest()
        except Exception as error:
            self.error = error
            log.exception("populating the segment failed: L1 stays smaller than configured", slots=self._segment.populated_slots)

    def _populate_rest(self) -> None:
        try:
            while self._segment.populated_slots < self._segment.slots and not self._stop.is_set():
                self._step()
                if self._go_on.is_set() or not self._needs_leave():
                    self._prepare_pieces()
        except CapacityError as error:
            self.error = error
            log.warning(
                "memory ran out: L1 stays smaller than configured",
                slots=self._segment.populated_slots,
                wanted=self._segment.slots,
                reason=str(error),
            )

    def _prepare_rest(self) -> None:
        """Also what is less than a piece. An engine that gives fewer slots than asked for is asked again when next allowed to."""
        asks = 0
        while self._preparation is not None and self._usable < self._segment.populated_slots and asks < MOST_ASKS:
            if self._needs_leave() or self._gave_less:
                self._go_on.wait()
                self._go_on.clear()
            if self._stop.is_set():
                return
            self._prepare_pieces(all_of_it=True)
            asks += 1

    def _needs_leave(self) -> bool:
        return self._preparation is not None and self._preparation.needs_leave()

    def _gains_by_the_start(self) -> bool:
        """Slots that are prepared as well later on keep nobody waiting."""
        return self._preparation is None or self._needs_leave()

    def _step(self) -> None:
        step_bytes = self._step_bytes if self._crew is None else max(self._step_bytes, CREW_STEP_BYTES)
        if self._headroom is not None:
            # A process that goes on to the limit of its cgroup is not told ENOMEM, it is killed.
            left = self._headroom()
            if left < min(self._step_bytes, self._segment.unpopulated_bytes):
                raise CapacityError(f"only {left} bytes may still be taken")
            step_bytes = min(step_bytes, left)
        self._segment.populate_next(step_bytes, self._crew)

    def _prepare_pieces(self, *, all_of_it: bool = False, at_start: bool = False) -> None:
        """Prepare and report what is populated, piece by piece: what is done may be used while the next is at work."""
        populated, preparation = self._segment.populated_slots, self._preparation
        if preparation is None:
            self._report(populated)
            return
        while self._usable < populated:
            piece_slots = preparation.piece_slots if at_start else preparation.later_piece_slots or preparation.piece_slots
            upto = populated if piece_slots is None else self._usable + piece_slots
            if upto > populated and not all_of_it:
                return
            upto = min(upto, populated)
            if self._stop.is_set() if at_start else self._pause(self._pause_s):
                return
            begun = self._clock()
            usable = preparation.prepare(upto, at_start=at_start)
            self._pause_s = 0.0 if at_start or not preparation.needs_leave() else min(self._clock() - begun, LONGEST_PAUSE_S)
            self._gave_less = usable < upto
            if usable <= self._usable:
                return
            self._report(usable)

    def _report(self, usable: int) -> None:
        if usable > self._usable:
            self._usable = usable
            self._on_grown(usable)


def _be_nice() -> None:
    """Let everybody else run first. On Linux the nice value belongs to the thread."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
    except OSError as error:
        log.debug("priority not lowered", reason=str(error))
