"""What the two synchronous halves need of the runtime; the runtime implements it, and tests put a pure one in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvoffload.messages import Job, LoadBlocks, LoadEnded, SaveBlocks, ToL1Manager, ToScheduler


class HubPort(Protocol):
    """The hub as SchedulerSide sees it. Nothing here waits, save `wait`; nothing raises."""

    @property
    def is_live(self) -> bool:
        """New promises may be made: every rank is joined, every heartbeat is fresh, nothing is off."""
        ...

    def offer(self, message: ToL1Manager) -> bool:
        """Post a request; False when it is refused for want of room."""
        ...

    def owe(self, message: ToL1Manager) -> None:
        """Post what must not be refused (its room was reserved)."""
        ...

    def take(self) -> Sequence[ToScheduler]:
        """What came since the last call."""
        ...

    def wait(self, timeout_s: float) -> bool:
        """Wait, interpreter lock released, until there is something to take."""
        ...


class LedgerPort(Protocol):
    """The block ledger as its only writer sees it (`kvoffload.ledger`)."""

    def bump(self, ids: Sequence[int]) -> None: ...

    def epochs(self, ids: Sequence[int]) -> tuple[int, ...]: ...


class LoadHandle(Protocol):
    """One load handed to the copy threads."""

    def withdraw(self) -> bool:
        """Keep the copy from starting; False when it has started, or ended, already."""
        ...


class CopyPort(Protocol):
    """The copy threads as WorkerSide sees them. Nothing here waits, save `wait`; nothing raises."""

    def mark(self) -> object:
        """A token for the end of everything launched so far by vLLM's thread."""
        ...

    def save(self, message: SaveBlocks) -> bool: ...

    def load(self, message: LoadBlocks) -> LoadHandle | None:
        """None when the copy threads are gone: nothing will be copied."""
        ...

    def withdrawn(self, job: Job, request: str) -> None:
        """A load that was promised, and never handed over, is off: its lease may end."""
        ...

    def take(self) -> Sequence[LoadEnded]:
        """Loads that have ended since the last call, in no order; each exactly once, the withdrawn ones too."""
        ...

    def wait(self, timeout_s: float) -> bool: ...
