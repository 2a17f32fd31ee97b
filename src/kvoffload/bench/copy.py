"""How fast blocks are copied out of the engine's cache and back, on the host, against a contiguous memcpy of the same bytes.

Measured cold: a source of 1 GiB walked in random order, so that no page is read twice before all others were, and a slab whose slots
are taken in random order; caches of 32 MiB see none of it again. Machines are shared and their memory's speed moves within a run,
so each call is paired with a memcpy right beside it and the figure is the median of the pairs' ratios.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvoffload.bench.figures import Figure
from kvoffload.copy.host import HostCopyEngine
from kvoffload.layout import BlockLayout
from kvoffload.ledger import Ledger
from kvoffload.limits import check_capacity
from kvoffload.segment import Segment

TARGETS = {64 << 10: 0.8, 16 << 10: 0.55, 2 << 10: 0.35}
"""Least share of memcpy's speed by bytes of a page. What is lost on small pages is the hardware's: its prefetch restarts on each."""

LAYERS = 8
CALL_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class _Scale:
    source_bytes: int
    slab_bytes: int
    pairs: int


FULL = _Scale(1 << 30, 512 << 20, 96)
QUICK = _Scale(256 << 20, 128 << 20, 12)


def run(quick: bool = False) -> list[Figure]:
    """Gather and scatter at each page size. Takes 1.5 GiB of memory and some ten seconds, ``quick`` a quarter of both."""
    scale = QUICK if quick else FULL
    check_capacity(scale.source_bytes + scale.slab_bytes, 256 << 20)
    source = np.ones(scale.source_bytes, dtype=np.uint8)
    figures = [figure for page_bytes in TARGETS for figure in _measure(source, page_bytes, scale)]
    return [*figures, _measure_bump()]


def _measure(source: NDArray[np.uint8], page_bytes: int, scale: _Scale) -> list[Figure]:
    blocks = scale.source_bytes // (LAYERS * page_bytes)
    caches = source.reshape(LAYERS, blocks, page_bytes)
    layout = BlockLayout.from_tensors({f"layers.{number}": caches[number] for number in range(LAYERS)}, blocks)
    segment = Segment.create(scale.slab_bytes, layout.slot_bytes)
    engine = HostCopyEngine(layout, segment, Ledger(blocks))
    segment.populate_next(segment.num_bytes)
    count = CALL_BYTES // layout.payload_bytes
    random = np.random.default_rng(page_bytes)
    next_blocks, next_slots = _rotation(random, blocks, count), _rotation(random, segment.slots, count)
    epochs = np.zeros(count, dtype=np.int64)

    def save() -> None:
        engine.save(next_blocks(), next_slots(), epochs, None)

    def load() -> None:
        engine.load(next_slots(), next_blocks(), None)

    windows = _rotation(random, scale.slab_bytes // CALL_BYTES, 1)
    source_windows = _rotation(random, scale.source_bytes // CALL_BYTES, 1)

    def memcpy(*, to_segment: bool) -> Callable[[], None]:
        def copy() -> None:
            slab = segment.address + min(int(windows()[0]) * CALL_BYTES, segment.num_bytes - CALL_BYTES)
            engine_side = source.ctypes.data + int(source_windows()[0]) * CALL_BYTES
            ctypes.memmove(*((slab, engine_side) if to_segment else (engine_side, slab)), CALL_BYTES)

        return copy

    figures = [
        _figure("gather", page_bytes, count * layout.payload_bytes, _pairs(save, memcpy(to_segment=True), scale.pairs)),
        _figure("scatter", page_bytes, count * layout.payload_bytes, _pairs(load, memcpy(to_segment=False), scale.pairs)),
    ]
    engine.close()
    segment.close()
    return figures


def _rotation(random: np.random.Generator, total: int, count: int) -> Callable[[], NDArray[np.int64]]:
    """The next ``count`` of all numbers below ``total`` in random order, round and round."""
    order, position = random.permutation(total).astype(np.int64), 0

    def advance() -> NDArray[np.int64]:
        nonlocal position
        if position + count > total:
            position = 0
        position += count
        return order[position - count : position]

    return advance


def _pairs(copy: Callable[[], None], reference: Callable[[], None], pairs: int) -> list[tuple[float, float]]:
    """Seconds of each call and of the memcpy beside it, which of them is first changing each time; the first pair warms up."""
    measured = []
    for number in range(pairs + 1):
        if number % 2:
            reference_s, copy_s = _seconds(reference), _seconds(copy)
        else:
            copy_s, reference_s = _seconds(copy), _seconds(reference)
        measured.append((copy_s, reference_s))
    return measured[1:]


def _seconds(function: Callable[[], None]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def _figure(direction: str, page_bytes: int, num_bytes: int, pairs: list[tuple[float, float]]) -> Figure:
    # The reference always copies CALL_BYTES; a call copies as many whole blocks as fit into that.
    share = statistics.median(reference_s / copy_s for copy_s, reference_s in pairs) * num_bytes / CALL_BYTES
    speed = num_bytes / statistics.median(copy_s for copy_s, _ in pairs) / 1e9
    ceiling = CALL_BYTES / statistics.median(reference_s for _, reference_s in pairs) / 1e9
    target = TARGETS[page_bytes]
    return Figure(
        name=f"{direction}, pages of {page_bytes >> 10} KiB",
        value=share,
        unit="x memcpy",
        target=f">= {target}",
        passed=share >= target,
        detail=f"{speed:.1f} GB/s beside {ceiling:.1f} GB/s, {LAYERS} layers, median of {len(pairs)} pairs, one thread",
    )


def _measure_bump() -> Figure:
    """What the ledger costs vLLM's thread for the blocks of a typical step."""
    ledger, blocks, times = Ledger(65536), [7, 1013, 40000, 65535], []
    for _ in range(50):
        begun = time.perf_counter()
        for _ in range(1000):
            ledger.bump(blocks)
        times.append((time.perf_counter() - begun) / 1000)
    ledger.close()
    best_us = statistics.median(times) * 1e6
    return Figure("ledger: bump of 4 blocks", best_us, "us", "<= 1.5", best_us <= 1.5, "median of 50 x 1,000 calls")
