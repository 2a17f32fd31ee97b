"""L1: which block is in which slot of host memory, who may read it, and who goes when room is needed. Pure: no loop, no I/O."""

from __future__ import annotations

from kvoffload.l1.core import L1Core, L1Message
from kvoffload.l1.effects import Effect, ToRank, ToScheduler
from kvoffload.l1.parts import L1Config
from kvoffload.l1.states import TRANSITIONS, State
from kvoffload.l1.statistics import L1Statistics

__all__ = ["TRANSITIONS", "Effect", "L1Config", "L1Core", "L1Message", "L1Statistics", "State", "ToRank", "ToScheduler"]
