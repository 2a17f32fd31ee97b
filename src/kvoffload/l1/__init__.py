"""L1: which block is in which slot of host memory, who may read it, who goes when room is needed, and what
is fetched from and written to nodes. Pure: no loop, no I/O."""

from __future__ import annotations

from kvoffload.l1.core import L1Core, L1Message
from kvoffload.l1.effects import Effect, ToPrefetcher, ToRank, ToScheduler, ToWriter
from kvoffload.l1.parts import L1Config
from kvoffload.l1.remote import RemoteConfig
from kvoffload.l1.states import TRANSITIONS, State
from kvoffload.l1.statistics import L1Statistics, RemoteStatistics

__all__ = [
    "TRANSITIONS",
    "Effect",
    "L1Config",
    "L1Core",
    "L1Message",
    "L1Statistics",
    "RemoteConfig",
    "RemoteStatistics",
    "State",
    "ToPrefetcher",
    "ToRank",
    "ToScheduler",
    "ToWriter",
]
