"""What the kernels must do, as cases that numpy answers too. Raises AssertionError at the first difference; imports no test tool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product

import numpy as np
from numpy.typing import NDArray
from tests.cuda.kernels.shim import Geometry, Launch, Shim, Words

GUARD = 4096
WORD = 16
HEADER = 64
Bytes = NDArray[np.uint8]
Check = Callable[[Shim, str], None]
"""Takes a library and the name of a kernel."""

FEW_THREADS = 8
EVERY_BOUNDARY = tuple(WORD * words for words in range(2 * 4 * FEW_THREADS + FEW_THREADS + 2))
"""Sizes of runs: nothing, and each number of words up to beyond two rounds of the unrolled loop with so few threads, and a third begun."""

HUGE = 1 << 32
FAR_IDS = ((1 << 64) - 1, HUGE, HUGE + 1, 1 << 63)
"""Out of every range; the low halves of two of them are not."""


class Arena:
    """Random bytes with ``guard`` more on each side; at an odd multiple of 16, so that no wider access happens to be aligned."""

    def __init__(self, size: int, guard: int, random: np.random.Generator) -> None:
        slack = 2 * WORD if guard else 0  # without guards a sanitizer's red zones begin at the first byte and behind the last
        self.all: Bytes = random.integers(0, 256, size + 2 * guard + slack, dtype=np.uint8)
        first = guard + ((WORD - self.all.ctypes.data - guard) % (2 * WORD) if guard else 0)
        self.bytes: Bytes = self.all[first : first + size]
        self.address = int(self.bytes.ctypes.data)
        assert self.address % WORD == 0


@dataclass(frozen=True, slots=True)
class Case:
    """Copies of ``blocks`` to or from ``slots``, in runs of ``sizes`` bytes."""

    sizes: Sequence[int]
    blocks: Sequence[int]
    slots: Sequence[int]
    geometries: Sequence[Geometry]
    num_blocks: int = 7
    num_slots: int = 6
    claimed_blocks: int = 0  # what the launch says instead, where not 0
    claimed_slots: int = 0
    gap: int = 48  # from the end of a run to its beginning in the next block
    outermost: bool = False  # all runs of one block, then those of the next


def geometries(grids: Sequence[int], blocks: Sequence[int]) -> tuple[Geometry, ...]:
    return tuple(Geometry(grid, block, reverse) for grid, block, reverse in product(grids, blocks, (False, True)))


CASES = {
    "one run": Case((432,), (1, 6, 0, 4), (5, 0, 2, 4), geometries((1, 2, 3, 4, 5, 9), (5, 32)), gap=0),
    "odd runs": Case((16, 48, 0, 112), (6, 2, 4, 0, 1), (1, 0, 5, 3, 2), geometries((1, 2, 3, 4, 5, 7, 8, 20, 21), (4,)), gap=16),
    "every boundary": Case(EVERY_BOUNDARY, (5, 0, 3), (2, 5, 0), geometries((3, 100), (FEW_THREADS,))),
    "other thread blocks": Case(EVERY_BOUNDARY[::3], (6, 1), (0, 4), geometries((2,), (1, 3, 32, 33, 256, 1024))),
    "blocks outermost": Case((48, 16, 272), (4, 6, 0), (5, 1, 2), geometries((1, 2, 3, 4, 8), (8,)), outermost=True),
    "more strides than sizes": Case((16, 32), (3, 5), (3, 1), geometries((2,), (2,)), gap=4096),
    "many runs": Case((16,) * 300, (2,), (3,), geometries((7, 299), (1,))),
    "nothing": Case((64,), (), (), geometries((1, 4), (8,))),
    "no runs": Case((), (3, 1), (0, 1), geometries((1, 4), (8,))),
    "blocks out of range": Case((64, 80), (7, 2, *FAR_IDS, 6, 8), (0, 1, 2, 2, 3, 3, 4, 5), geometries((1, 3, 40), (4,))),
    "slots out of range": Case((64, 80), (0, 1, 2, 3, 4, 5, 6, 6), (6, 2, *FAR_IDS, 5, 7), geometries((1, 3, 40), (4,))),
    "both out of range": Case((64,), (7, *FAR_IDS), (6, *FAR_IDS), geometries((2,), (4,))),
    "one block, one slot": Case((64,), (0, 1, 0), (0, 0, 1), geometries((2,), (4,)), num_blocks=1, num_slots=1),
    "more blocks than 32 bits count": Case((64,), (5, 1), (4, 2), geometries((2,), (4,)), claimed_blocks=HUGE + 2, claimed_slots=HUGE + 1),
    "sizes that are no multiple of 16 are never exceeded": Case((40, 71, 15), (5, 1), (4, 2), geometries((2,), (4,))),
}


@dataclass(slots=True)
class Rig:
    """Memory of an engine and of a segment, and the table of runs, for one case."""

    case: Case
    guard: int
    seed: int = 0
    kv: Arena = field(init=False)
    slab: Arena = field(init=False)
    runs: Words = field(init=False)
    slot_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        case, random = self.case, np.random.default_rng(self.seed)
        spans = [-(-size // WORD) * WORD + case.gap for size in case.sizes]
        self.kv = Arena(case.num_blocks * sum(spans), self.guard, random)
        # Behind the last run there is one that no launch names: who reads too far in the table copies something.
        table = np.empty((len(case.sizes) + 1, 4), dtype=np.uint64)
        table[-1] = (self.kv.address, 0, WORD, 0)
        address, offset = self.kv.address, HEADER
        for row, (size, span) in enumerate(zip(case.sizes, spans, strict=True)):
            table[row] = (address, sum(spans) if case.outermost else span, size, offset)
            address += span if case.outermost else span * case.num_blocks
            offset += -(-size // WORD) * WORD + (WORD if row % 2 else 0)
        self.runs = table[:-1]
        self.slot_bytes = offset + 3 * WORD
        self.slab = Arena(case.num_slots * self.slot_bytes, self.guard, random)

    def launch(self) -> Launch:
        case = self.case
        # So do those who read too far among the ids.
        ids = np.array([[*case.blocks, 0], [*case.slots, 0]], dtype=np.uint64)
        return Launch(
            runs=self.runs,
            blocks=ids[0, :-1],
            slots=ids[1, :-1],
            num_blocks=case.claimed_blocks or case.num_blocks,
            num_slots=case.claimed_slots or case.num_slots,
            slot_base=self.slab.address,
            slot_bytes=self.slot_bytes,
        )

    def expected(self, kernel: str) -> tuple[Bytes, Bytes, int]:
        """All bytes of both arenas afterwards, guards too, and how many words were copied."""
        kv, slab, words = self.kv.all.copy(), self.slab.all.copy(), 0
        first_kv = int(self.kv.bytes.ctypes.data - self.kv.all.ctypes.data)
        first_slab = int(self.slab.bytes.ctypes.data - self.slab.all.ctypes.data)
        for block, slot in zip(self.case.blocks, self.case.slots, strict=True):
            if block >= self.case.num_blocks or slot >= self.case.num_slots:
                continue
            for address, stride, size, offset in self.runs.tolist():
                length = size // WORD * WORD
                at_kv = first_kv + address - self.kv.address + block * stride
                at_slab = first_slab + slot * self.slot_bytes + offset
                if kernel == "kv_gather":
                    slab[at_slab : at_slab + length] = kv[at_kv : at_kv + length]
                else:
                    kv[at_kv : at_kv + length] = slab[at_slab : at_slab + length]
                words += length // WORD
        return kv, slab, words


def check_case(shim: Shim, kernel: str, *, case: Case, guard: int = GUARD) -> None:
    for geometry in case.geometries:
        rig = Rig(case, guard)
        kv, slab, words = rig.expected(kernel)
        counted = shim.launch(kernel, rig.launch(), geometry)
        assert np.array_equal(rig.slab.all, slab), f"{kernel} {geometry}: the segment is not as it should be"
        assert np.array_equal(rig.kv.all, kv), f"{kernel} {geometry}: the engine's memory is not as it should be"
        assert counted == (words, words), f"{kernel} {geometry}: {counted} words loaded and stored, {words} expected"


def cases(guard: int = GUARD) -> dict[str, Check]:
    return {name: partial(check_case, case=case, guard=guard) for name, case in CASES.items()}
