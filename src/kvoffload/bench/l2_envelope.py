"""How fast blocks are sealed and verified: part of ``kvoffload bench l2``."""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Iterator

import numpy as np

from kvoffload.bench.figures import Figure
from kvoffload.envelope import Envelope, Part
from kvoffload.layout import HEADER_BYTES

SIZES = (256 << 10, 2 << 20)
SPREAD_BYTES = 64 << 20
"""Blocks lie as far apart as this, so that none is in a cache from the last time."""


def measure(*, quick: bool) -> Iterator[Figure]:
    """GB/s of one thread, both tags in turn."""
    rounds = 2 if quick else 15
    for size in SIZES:
        count = (4 << 20 if quick else SPREAD_BYTES) // size
        slots = [np.ones(HEADER_BYTES + size, np.uint8) for _ in range(count)]
        parts = [Part(slot, secrets.token_bytes(24)) for slot in slots]
        tags = {"xxh3": Envelope(bytes(24), size), "keyed BLAKE2b": Envelope(bytes(24), size, b"a secret of 16 bytes or more")}
        took: dict[str, list[float]] = {tag: [] for tag in tags}
        for _ in range(rounds):
            for tag, envelope in tags.items():
                envelope.seal_all(parts)
                begun = time.perf_counter()
                faults = envelope.verify_all(parts)
                took[tag].append((time.perf_counter() - begun) / count)
                if any(fault is not None for fault in faults):
                    raise RuntimeError(f"{tag}: what was sealed is {faults}")
        for tag, seconds in took.items():
            median = statistics.median(seconds)
            what = f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB"
            detail = f"verifying, one thread, {median * 1e6:.0f} us a block, median of {rounds} rounds of {count}"
            yield Figure(f"l2 envelope, {tag}, blocks of {what}", size / median / 1e9, "GB/s", "no target", True, detail)
