"""Asking for a remembered answer again, as vLLM does in every step for requests that wait in its queue."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from kvoffload.bench.measuring import unique_prompts
from kvoffload.messages import HitReason, MatchPrefix, PrefixHit, ToL1Manager, ToScheduler

WAITING = 1000
"""Requests in vLLM's queue."""


class EverythingIsHere:
    """A stand-in for the hub: answers every match with a full hit that never expires."""

    is_live = True

    def __init__(self) -> None:
        self._answers: list[ToScheduler] = []

    def offer(self, message: ToL1Manager) -> bool:
        if isinstance(message, MatchPrefix):
            slots = tuple(range(len(message.keys)))
            self._answers.append(PrefixHit(message.request, message.sequence, slots, 0, 0, float("inf"), HitReason.HIT))
        return True

    def owe(self, message: ToL1Manager) -> None:
        pass

    def take(self) -> Sequence[ToScheduler]:
        taken, self._answers = self._answers, []
        return taken

    def wait(self, timeout_s: float) -> bool:
        return bool(self._answers)


class NoLedger:
    """A stand-in for the block ledger."""

    def bump(self, ids: Sequence[int]) -> None:
        pass

    def epochs(self, ids: Sequence[int]) -> tuple[int, ...]:
        return (0,) * len(ids)


def remembered_match_us(rounds: int, waiting: int = WAITING) -> float:
    """Microseconds of the median call over all waiting requests, the median of ``rounds`` of them. Imports vLLM."""
    from kvoffload.connector.matcher import MatchSettings
    from kvoffload.connector.scheduler_side import SchedulerSettings, SchedulerSide

    settings = SchedulerSettings(block_size=16, namespace=bytes(24), match=MatchSettings(max_loads=waiting))
    side = SchedulerSide(EverythingIsHere(), NoLedger(), settings, lambda request: b"")
    requests: list[Any] = [_request(index, prompt) for index, prompt in enumerate(unique_prompts(waiting, [512], seed=3))]
    for request in requests:
        side.on_new_request(request)
        if side.get_num_new_matched_tokens(request, 0) != (496, True):
            raise AssertionError("the stand-in hub's answer was not used")
    medians = []
    for _ in range(rounds):
        times = []
        for request in requests:
            begun = time.perf_counter()
            side.get_num_new_matched_tokens(request, 0)
            times.append((time.perf_counter() - begun) * 1e6)
        medians.append(statistics.median(times))
    return statistics.median(medians)


def _request(index: int, tokens: list[int]) -> SimpleNamespace:
    """What SchedulerSide reads of vLLM's Request."""
    return SimpleNamespace(
        request_id=f"r{index}",
        num_tokens=len(tokens),
        num_prompt_tokens=len(tokens),
        num_preemptions=0,
        num_computed_tokens=0,
        _all_token_ids=tokens,
        skip_reading_prefix_cache=False,
        kv_transfer_params=None,
    )
