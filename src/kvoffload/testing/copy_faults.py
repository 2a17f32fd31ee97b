"""A copy engine with handles: it holds, slows, fails, corrupts and lies when a test says so, and otherwise does its work."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from kvoffload.copy.engine import CopyEngine, Ids
from kvoffload.errors import CopyError
from kvoffload.layout import HEADER_BYTES
from kvoffload.ledger import Ledger


class InjectedCrash(BaseException):
    """What `FaultyCopyEngine.crash_next` raises: not an Exception, so that nothing but a thread's last resort may catch it."""


class Fault(Enum):
    """What to do to one call; each is used up by the next call of its kind."""

    NONE = "none"
    FAIL = "fail"
    CRASH = "crash"
    CORRUPT = "corrupt"
    SWAP = "swap"
    LIE = "lie"


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the engine, in order of arrival; ``kind`` is "save" or "load"."""

    kind: str
    blocks: tuple[int, ...]
    slots: tuple[int, ...]


class FaultyCopyEngine:
    """Wraps any `CopyEngine`; all handles may be used from any thread, also while calls are running.

    Faults that alter bytes do so in the segment (a load's slot is altered for the time of the copy), so they work for every engine.
    """

    def __init__(self, engine: CopyEngine) -> None:
        self._engine = engine
        self._changed = threading.Condition()
        self._held_kinds: set[str] = set()
        self._waiting = {"save": 0, "load": 0}
        self._delay_s = 0.0
        self._faults: dict[str, list[Fault]] = {"save": [], "load": []}
        self._ignores_ledger = False
        self._calls: list[Call] = []
        self.name = f"faulty {engine.name}"
        self.block_bytes = engine.block_bytes
        self.segment = engine.segment

    # ------------------------------------------------------------ handles

    def hold_saves(self) -> None:
        """Saves from now on wait before they touch anything, until `release`."""
        self._hold("save")

    def hold_loads(self) -> None:
        """Loads from now on wait before they touch anything, until `release`."""
        self._hold("load")

    def release(self) -> None:
        """Let everything held go on, and hold no more."""
        with self._changed:
            self._held_kinds.clear()
            self._changed.notify_all()

    def wait_held(self, kind: str, timeout_s: float = 10.0) -> bool:
        """Whether a call of this kind ("save" or "load") is being held within ``timeout_s``."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting[kind] > 0 and kind in self._held_kinds, timeout_s)

    def wait_calls(self, count: int, timeout_s: float = 10.0) -> bool:
        """Whether ``count`` calls have arrived within ``timeout_s``."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._calls) >= count, timeout_s)

    def slow(self, seconds: float) -> None:
        """Every call from now on takes this much longer, before it touches anything; 0 ends it. `release` does not cut it short."""
        with self._changed:
            self._delay_s = seconds

    def fail_next(self, count: int = 1, kind: str | None = None) -> None:
        """The next ``count`` calls (of this kind, else of each) raise CopyError and touch nothing."""
        for name in ("save", "load") if kind is None else (kind,):
            self._add(name, *[Fault.FAIL] * count)

    def pass_next(self, kind: str, count: int = 1) -> None:
        """The next ``count`` calls of this kind are served well; what is asked for after this goes to the calls behind them."""
        self._add(kind, *[Fault.NONE] * count)

    def crash_next(self, kind: str) -> None:
        """The next call of this kind raises `InjectedCrash` in the thread that copies."""
        self._add(kind, Fault.CRASH)

    def corrupt_next(self, kind: str) -> None:
        """One byte of what the next call of this kind copies is altered."""
        self._add(kind, Fault.CORRUPT)

    def swap_next(self, kind: str) -> None:
        """The bytes of the first two blocks of the next call of this kind change places."""
        self._add(kind, Fault.SWAP)

    def lie_next_load(self) -> None:
        """The next load claims to have been done and does nothing."""
        self._add("load", Fault.LIE)

    def ignore_ledger(self, on: bool = True) -> None:
        """Saves claim that no block was overwritten: the negative control of every test of the ledger."""
        with self._changed:
            self._ignores_ledger = on

    @property
    def calls(self) -> list[Call]:
        """All calls so far, those that failed included."""
        with self._changed:
            return list(self._calls)

    # ------------------------------------------------------------ CopyEngine

    def use_ledger(self, ledger: Ledger) -> None:
        self._engine.use_ledger(ledger)

    def prepare_slots(self, populated: int, *, at_start: bool = False) -> int:
        return self._engine.prepare_slots(populated, at_start=at_start)

    def mark(self) -> object:
        return self._engine.mark()

    def save(self, blocks: Ids, slots: Ids, epochs: Ids, after: object = None) -> NDArray[np.bool_]:
        fault = self._enter("save", blocks, slots)
        order = _swapped(len(blocks), fault)
        flags = np.zeros(len(blocks), dtype=np.bool_)
        # Block order[i] goes where block i belongs: the slots keep their places.
        flags[order] = self._engine.save(blocks[order], slots, epochs[order], after)
        if fault is Fault.CORRUPT and len(slots):
            self.segment.slot(int(slots[0]))[HEADER_BYTES] ^= 0xFF
        with self._changed:
            return np.ones_like(flags) if self._ignores_ledger else flags

    def load(self, slots: Ids, blocks: Ids, after: object = None) -> None:
        fault = self._enter("load", blocks, slots)
        if fault is Fault.LIE:
            return
        order = _swapped(len(slots), fault)
        if fault is not Fault.CORRUPT or not len(slots):
            self._engine.load(slots[order], blocks, after)
            return
        first = self.segment.slot(int(slots[0]))
        first[HEADER_BYTES] ^= 0xFF
        try:
            self._engine.load(slots, blocks, after)
        finally:
            first[HEADER_BYTES] ^= 0xFF

    def close(self) -> None:
        self._engine.close()

    # ------------------------------------------------------------ inside

    def _hold(self, kind: str) -> None:
        with self._changed:
            self._held_kinds.add(kind)

    def _add(self, kind: str, *faults: Fault) -> None:
        with self._changed:
            self._faults[kind].extend(faults)

    def _enter(self, kind: str, blocks: Ids, slots: Ids) -> Fault | None:
        with self._changed:
            self._calls.append(Call(kind, tuple(blocks.tolist()), tuple(slots.tolist())))
            self._waiting[kind] += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: kind not in self._held_kinds)
            self._waiting[kind] -= 1
            fault = self._faults[kind].pop(0) if self._faults[kind] else None
            delay_s = self._delay_s
        if delay_s:
            threading.Event().wait(delay_s)
        if fault is Fault.FAIL:
            raise CopyError(f"injected failure of a {kind}")
        if fault is Fault.CRASH:
            raise InjectedCrash(f"injected crash of a {kind}")
        return fault


def _swapped(count: int, fault: Fault | None) -> NDArray[np.int64]:
    order = np.arange(count, dtype=np.int64)
    if fault is Fault.SWAP and count >= 2:
        order[[0, 1]] = [1, 0]
    return order
