"""How long it takes to derive keys: part of ``kvoffload bench index``."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from kvoffload.bench.figures import Figure
from kvoffload.keys import KEY_BYTES, KeyChain

BUDGET_US = 1.0
"""Per block. Larger blocks hold more bytes to pack and hash, and fall short of it; per token they are the cheaper ones."""


@dataclass(frozen=True, slots=True)
class KeyTiming:
    """Medians over the rounds, of a prompt that is new and of a call that finds nothing to do."""

    block_size: int
    tokens: int
    us_per_block: float
    ns_per_token: float
    idle_call_us: float


def measure(block_size: int, tokens: int = 4096, rounds: int = 101, seed: int = 1) -> KeyTiming:
    """Derive the keys of a random prompt ``rounds`` times."""
    ids = random.Random(seed).choices(range(128_000), k=tokens)
    fresh: list[float] = []
    idle: list[float] = []
    blocks = tokens // block_size
    for _ in range(rounds):
        chain = KeyChain(bytes(KEY_BYTES), block_size)
        begun = time.perf_counter()
        chain.extend(ids)
        derived = time.perf_counter()
        chain.extend(ids)
        fresh.append(derived - begun)
        idle.append(time.perf_counter() - derived)
    middle = sorted(fresh)[rounds // 2]
    return KeyTiming(block_size, tokens, middle / blocks * 1e6, middle / tokens * 1e9, sorted(idle)[rounds // 2] * 1e6)


def run(quick: bool = False) -> list[Figure]:
    """The block sizes that engines use: 16 is the default on GPUs, 128 on CPUs."""
    return [_figure(measure(size, rounds=5 if quick else 101)) for size in (16, 32, 128)]


def _figure(timing: KeyTiming) -> Figure:
    detail = f"{timing.ns_per_token:.0f} ns per token, median over a prompt of {timing.tokens}; nothing new: {timing.idle_call_us:.2f} us"
    value = timing.us_per_block
    return Figure(f"keys: blocks of {timing.block_size} tokens", value, "us/block", f"<= {BUDGET_US:g}", value <= BUDGET_US, detail)
