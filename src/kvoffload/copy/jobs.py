"""What the copy threads work on, and what they report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from kvoffload.messages import BlocksFilled, DropReason, Job, LoadBlocks, LoadEnded, LoadOutcome, SegmentGrown


@dataclass(frozen=True, slots=True)
class HandsConfig:
    """``max_loads`` and ``max_saves`` bound the queues; ``load_first_s`` is how long one chunk of a save gives way to loads."""

    rank: int = 0
    max_loads: int = 64
    max_saves: int = 256
    pair_timeout_s: float = 60.0
    chunk_bytes: int = 64 << 20
    load_first_s: float = 0.05


@dataclass(frozen=True, slots=True)
class HandsCrashed:
    """A copy thread ended by ``error``, or a callback raised it: no more copies. The job it was at was reported before.

    But for a save that lost the engine (EngineLost), which is never reported: its slots may still be written.
    """

    error: BaseException


CopyFact = BlocksFilled | LoadEnded | SegmentGrown | HandsCrashed
"""What the threads of a rank's worker half report to GpuCopy's mailbox."""


class LoadState(Enum):
    QUEUED = "queued"
    STARTED = "started"
    ENDED = "ended"
    WITHDRAWN = "withdrawn"


class LoadJob:
    """A load on its way. `state` may be read at any time; it changes only under the lock of its hands."""

    __slots__ = ("_withdraw", "message", "queued_at", "state")

    def __init__(self, message: LoadBlocks, queued_at: float, state: LoadState, withdraw: Callable[[LoadJob], bool]) -> None:
        self._withdraw = withdraw
        self.message = message
        self.queued_at = queued_at
        self.state = state

    @property
    def job(self) -> Job:
        return self.message.job

    @property
    def request(self) -> str:
        return self.message.request

    def withdraw(self) -> bool:
        """Whether it is withdrawn by this call: it had not started, and its `LoadEnded` was delivered when this returns."""
        return self._withdraw(self)


@dataclass(slots=True)
class HandsStatistics:
    """Counted since the start, in jobs unless the name says otherwise."""

    loads: dict[LoadOutcome, int] = field(default_factory=lambda: dict.fromkeys(LoadOutcome, 0))
    saves: int = 0
    blocks_saved: int = 0
    blocks_failed: dict[DropReason, int] = field(default_factory=dict)
    refused: int = 0
