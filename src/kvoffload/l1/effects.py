"""What `L1Core.handle` wants sent, in order; the shell around it does the sending."""

from __future__ import annotations

from dataclasses import dataclass

from kvoffload.messages import FetchBlocks, FindBlocks, Node, ParentMissing, PrefixHit, SlotGrant, WriteBlocks


@dataclass(frozen=True, slots=True)
class ToRank:
    """Send ``message`` to the GpuCopy of ``rank``."""

    rank: int
    message: SlotGrant


@dataclass(frozen=True, slots=True)
class ToScheduler:
    """Put ``message`` into SchedulerSide's inbox."""

    message: PrefixHit | ParentMissing


@dataclass(frozen=True, slots=True)
class ToPrefetcher:
    """Offer ``message`` to the L2Prefetcher of ``node``; where it is refused, answer for it at once."""

    node: Node
    message: FindBlocks | FetchBlocks


@dataclass(frozen=True, slots=True)
class ToWriter:
    """Offer ``message`` to the L2Writer of ``node``; where it is refused, answer for it at once."""

    node: Node
    message: WriteBlocks


Effect = ToRank | ToScheduler | ToPrefetcher | ToWriter
