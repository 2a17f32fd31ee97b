"""How long L1 takes to reserve, commit and match, and what it weighs: part of ``kvoffload bench index``.

Times are processor time of this thread, so that a busy machine adds cache misses but not waiting. Where a figure is "typical" it is
the median over rounds; where it is "worst" it is the maximum.
"""

from __future__ import annotations

import gc
import random
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, field

from kvoffload.bench.figures import Figure
from kvoffload.l1 import Effect, L1Config, L1Core, State, ToRank
from kvoffload.l1.core import L1Message
from kvoffload.l1.eviction import PolicyName
from kvoffload.messages import (
    ROOT,
    BlockKey,
    BlocksFilled,
    MatchPrefix,
    PrefixHit,
    ReleaseHit,
    ReserveSlots,
    ResetCache,
    SaveRun,
    SegmentGrown,
)

SAVE_US, MATCH_US, LISTED_US, WORST_MS, SLOT_BYTES, FLAT = 3.0, 50.0, 1.5, 2.0, 300.0, 3.0
BATCH = 500
PROMPT = 6_250


@dataclass(slots=True)
class Load:
    """An L1 of ``slots`` slots, filled with prompts of ``BATCH`` blocks, and the time that each operation on it took, in seconds."""

    slots: int
    policy: PolicyName
    seed: int = 1
    core: L1Core = field(init=False)
    random: random.Random = field(init=False)
    job: int = 0
    worst_s: float = 0.0

    def __post_init__(self) -> None:
        self.core = L1Core(L1Config(policy=self.policy, max_waiting_share=1.0), self.slots)
        self.random = random.Random(self.seed)
        self.core.handle(SegmentGrown(0, self.slots), 0.0)

    def send(self, message: L1Message, blocks: int = BATCH) -> tuple[float, list[Effect]]:
        """How long it took, all slices of it, and what came out."""
        begun = time.thread_time()
        effects = self.core.handle(message, 0.0)
        while self.core.has_work:
            effects += self.core.go_on(0.0)
        took = time.thread_time() - begun
        if blocks <= BATCH:
            self.worst_s = max(self.worst_s, took)
        return took, effects

    def keys(self, count: int) -> tuple[BlockKey, ...]:
        """A chain that was never seen before."""
        return tuple(self.random.randbytes(24) for _ in range(count))

    def save(self, keys: tuple[BlockKey, ...], start: int = 0) -> float:
        """Reserve and commit the blocks from ``start`` on; seconds."""
        self.job += 1
        ids = tuple(range(len(keys) - start))
        parent = keys[start - 1] if start else ROOT
        reserving, effects = self.send(ReserveSlots(self.job, (SaveRun("r", parent, keys[start:], ids, ids),)), len(ids))
        assert isinstance(effects[0], ToRank)
        slots = effects[0].message.slots
        committing, _ = self.send(BlocksFilled(self.job, 0, slots, ()), len(ids))
        if len(slots) != len(ids):
            raise RuntimeError(f"{len(slots)} of {len(ids)} blocks found a slot: what is measured is not what was meant")
        return reserving + committing

    def fill(self) -> list[float]:
        """Take every slot once; seconds per batch."""
        return [self.save(self.keys(BATCH)) for _ in range(self.slots // BATCH)]

    def churn(self, rounds: int) -> list[float]:
        """Go on with new prompts while old ones are evicted, and some are used again; seconds per batch."""
        took = []
        recent: list[tuple[BlockKey, ...]] = []
        for number in range(rounds):
            recent.append(self.keys(BATCH))
            took.append(self.save(recent[-1]))
            self.match(self.random.choice(recent[-8:]), number)
        return took

    def match(self, keys: tuple[BlockKey, ...], number: int) -> tuple[float, int]:
        """Match and release; seconds for the match, and the blocks hit."""
        took, effects = self.send(MatchPrefix(f"m{number}", self.job, keys, 0.0), len(keys))
        hit = effects[0].message
        assert isinstance(hit, PrefixHit)
        self.send(ReleaseHit(f"m{number}", self.job), len(keys))
        return took, len(hit.slots)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def run(quick: bool = False) -> list[Figure]:
    """All figures of the index; ``quick`` with a smaller L1 and few rounds."""
    return list(measure((10_000,), rounds=20) if quick else measure())


def measure(sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000), rounds: int = 120) -> Iterator[Figure]:
    """The figures, each policy at each number of slots; a run over the default sizes takes about a minute."""
    policies: tuple[PolicyName, ...] = ("lru", "s3fifo")
    was_enabled = gc.isenabled()
    for policy in policies:
        per_block: dict[int, float] = {}
        for slots in sizes:
            gc.collect()
            gc.disable()  # collections are the process's, whatever it holds; L1 shows the collector almost nothing
            try:
                load = Load(slots, policy)
                yield _save_figure(f"save, free slots, {policy}, {slots:,} slots", load.fill())
                churned = load.churn(rounds)
                per_block[slots] = _median(churned) / BATCH * 1e6
                yield _save_figure(f"save, evicting, {policy}, {slots:,} slots", churned)
                yield from _match_figures(load)
                yield from _worst_figures(load)
            finally:
                if was_enabled:
                    gc.enable()
        ratio = per_block[sizes[-1]] / per_block[sizes[0]]
        yield Figure(f"save, evicting, {policy}, {sizes[-1]:,} against {sizes[0]:,} slots", ratio, "x", f"<= {FLAT:g}", ratio <= FLAT)
    for policy in policies:
        weight = weigh(100_000, policy)
        yield Figure(f"memory beside the slab, {policy}", weight, "bytes/slot", f"<= {SLOT_BYTES:g}", weight <= SLOT_BYTES)


def _save_figure(name: str, took: list[float]) -> Figure:
    value = _median(took) / BATCH * 1e6
    best = min(took) / BATCH * 1e6
    detail = f"reserve and commit, batches of {BATCH}, median of {len(took)}; best {best:.2f}"
    return Figure(name, value, "us/block", f"<= {SAVE_US:g}", value <= SAVE_US, detail)


def _match_figures(load: Load) -> Iterator[Figure]:
    for length in (100, PROMPT):
        if 2 * length > load.slots:
            continue
        keys = load.keys(length)
        for start in range(0, length, BATCH):
            load.save(keys[: start + BATCH], start)
        took = []
        for number in range(31):
            seconds, hit = load.match((*keys, *load.keys(3)), number)
            if hit != length:
                raise RuntimeError(f"{hit} of {length} blocks were hit")
            took.append(seconds * 1e6)
        strange = [load.keys(length) for _ in range(31)]
        missed = [load.match(keys, number)[0] * 1e6 for number, keys in enumerate(strange)]
        value, budget = _median(took), MATCH_US + LISTED_US * length
        yield Figure(
            f"match of {length:,} blocks, {load.policy}, {load.slots:,} slots",
            value,
            "us",
            f"<= {budget:,.0f}",
            value <= budget and _median(missed) <= MATCH_US,
            f"{MATCH_US:g} us and {LISTED_US:g} per block allowed; {value / length:.2f} us per block; a miss {_median(missed):.1f} us",
        )


def _worst_figures(load: Load) -> Iterator[Figure]:
    """The longest that any message of up to a batch has taken so far, then with all slots hot, then a reset of all."""
    what = f"{load.policy}, {load.slots:,} slots"
    value = load.worst_s * 1e3
    yield Figure(f"worst operation, {what}", value, "ms", f"<= {WORST_MS:g}", value <= WORST_MS, f"batches of up to {BATCH}")
    load.worst_s = 0.0
    policy = load.core._parts.policy
    for _ in range(3):
        policy.touch(policy.order())
    took = [load.save(load.keys(BATCH)) for _ in range(20)]
    value = load.worst_s * 1e3
    yield Figure(
        f"worst operation, every slot hot, {what}",
        value,
        "ms",
        f"<= {WORST_MS:g}",
        value <= WORST_MS,
        f"median save {_median(took) / BATCH * 1e6:.2f} us/block",
    )
    seconds, _ = load.send(ResetCache(1), load.slots)
    if load.core.statistics().slots[State.READY]:
        raise RuntimeError("a reset left blocks READY")
    yield Figure(f"reset, {what}", seconds * 1e3, "ms", "no target", True, "once per change of weights, not in a step")


def weigh(slots: int, policy: PolicyName) -> float:
    """Bytes per slot of an L1 that was filled and then turned over once, keys included."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        load = Load(slots, policy)
        for _ in range(2 * slots // BATCH):
            load.save(load.keys(BATCH))
        gc.collect()
        return (tracemalloc.get_traced_memory()[0] - before) / slots
    finally:
        tracemalloc.stop()
