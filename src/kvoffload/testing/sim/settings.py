"""One simulation's circumstances, all of them drawn from its seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from kvoffload.connector.matcher import MatchSettings
from kvoffload.connector.worker_side import WorkerSettings

BLOCK_SIZE = 16
"""Tokens per block, everywhere in the simulation."""

MAX_MODEL_LEN = 320
"""Tokens that a request may grow to; the engine's cache always holds one such request."""


@dataclass(frozen=True, slots=True)
class SimSettings:
    """``*_ticks`` are mean numbers of small events of the hub and of the copy threads in each of a step's gaps; shares are in [0, 1]."""

    seed: int
    actions: int = 120
    # -- vLLM
    blocks: int = 24
    max_batched_tokens: int = 64
    max_requests: int = 4
    async_scheduling: bool = False
    v2_runner: bool = False
    priority: bool = False
    reserve_whole_prompt: bool = True
    # -- kvoffload
    slots: int = 24
    policy: str = "s3fifo"
    max_loads: int = 4
    deadline_s: float = 0.05
    hit_lifetime_s: float = 10.0
    start_deadline_s: float = 1.0
    pair_timeout_s: float = 5.0
    mailbox_capacity: int = 64
    # -- the weather
    hub_ticks: float = 6.0
    load_ticks: float = 12.0
    save_ticks: float = 12.0
    refuse_share: float = 0.0
    fail_share: float = 0.0
    wait_finds_share: float = 0.5
    hook_fail_share: float = 0.0
    """Of the calls that hooks make into their ports."""
    faults: bool = True
    prompt: bool = False
    """Hub and copies do at once whatever they can."""

    def match(self) -> MatchSettings:
        return MatchSettings(deadline_s=self.deadline_s, max_loads=self.max_loads)

    def worker(self) -> WorkerSettings:
        return WorkerSettings(start_deadline_s=self.start_deadline_s)

    def with_(self, **changes: object) -> SimSettings:
        return replace(self, **changes)  # type: ignore[arg-type]


def draw_settings(seed: int) -> SimSettings:
    """The circumstances of ``seed``: caches from tiny to roomy, hub and copies from prompt to very late, calm and stormy."""
    rng = random.Random(f"settings {seed}")
    return SimSettings(
        seed=seed,
        blocks=rng.choice([22, 24, 30, 45]),
        max_batched_tokens=rng.choice([24, 48, 64, 160, 400]),
        max_requests=rng.choice([2, 4, 8]),
        async_scheduling=rng.random() < 0.3,
        v2_runner=rng.random() < 0.3,
        priority=rng.random() < 0.2,
        reserve_whole_prompt=rng.random() < 0.7,
        slots=rng.choice([5, 16, 40, 80, 200]),
        policy=rng.choice(["s3fifo", "lru"]),
        max_loads=rng.choice([1, 2, 8]),
        hit_lifetime_s=rng.choice([0.03, 0.5, 10.0]),
        start_deadline_s=rng.choice([0.03, 0.1, 1.0]),
        pair_timeout_s=rng.choice([0.1, 5.0]),
        mailbox_capacity=rng.choice([3, 64]),
        hub_ticks=rng.choice([0.5, 3.0, 8.0, 20.0]),
        load_ticks=rng.choice([1.0, 5.0, 20.0, 80.0]),
        save_ticks=rng.choice([1.0, 5.0, 20.0, 80.0]),
        refuse_share=rng.choice([0.0, 0.0, 0.0, 0.05, 0.3]),
        fail_share=rng.choice([0.0, 0.0, 0.05, 0.3]),
        wait_finds_share=rng.choice([0.1, 0.5, 0.9]),
        hook_fail_share=rng.choice([*[0.0] * 9, 0.01]),
        faults=rng.random() < 0.7,
    )
