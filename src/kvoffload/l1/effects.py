"""What `L1Core.handle` wants sent, in order; the shell around it does the sending."""

from __future__ import annotations

from dataclasses import dataclass

from kvoffload.messages import ParentMissing, PrefixHit, SlotGrant


@dataclass(frozen=True, slots=True)
class ToRank:
    """Send ``message`` to the GpuCopy of ``rank``."""

    rank: int
    message: SlotGrant


@dataclass(frozen=True, slots=True)
class ToScheduler:
    """Put ``message`` into SchedulerSide's inbox."""

    message: PrefixHit | ParentMissing


Effect = ToRank | ToScheduler
