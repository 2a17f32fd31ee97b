"""Cases whose distances do not fit in 32 bits, in memory that is reserved and never filled; asserts as cases.py does."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray
from tests.cuda.kernels.cases import Check
from tests.cuda.kernels.shim import Geometry, Launch, Shim

GIB = 1 << 30
MIB = 1 << 20
PIECE = 2064
MAP_NORESERVE = 0x4000
"""Linux's; the module knows no name for it in every Python."""


def sparse(size: int) -> NDArray[np.uint8]:
    """Zeros that take memory only where they are written."""
    return np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE), dtype=np.uint8)


def copy_far(shim: Shim, kernel: str, run: tuple[int, int], slot: tuple[int, int, int]) -> None:
    """One piece, between a block (``run``: stride and id) and a slot (``slot``: its bytes, id, and the offset in it).

    All other memory is zero: who reads elsewhere, as with a distance cut to 32 bits, copies zeros, who writes elsewhere leaves zeros.
    """
    (stride, block), (slot_bytes, index, offset) = run, slot
    far_block, far_slot = block * stride, index * slot_bytes + offset
    kv, slab = sparse(far_block + 2 * PIECE), sparse(far_slot + 2 * PIECE)
    source, target = (kv, slab) if kernel == "kv_gather" else (slab, kv)
    at_source, at_target = (far_block, far_slot) if kernel == "kv_gather" else (far_slot, far_block)
    piece = np.random.default_rng(1).integers(1, 256, PIECE, dtype=np.uint8)
    source[at_source : at_source + PIECE] = piece
    launch = Launch(
        runs=np.array([[kv.ctypes.data, stride, PIECE, offset]], dtype=np.uint64),
        blocks=np.array([block], dtype=np.uint64),
        slots=np.array([index], dtype=np.uint64),
        num_blocks=block + 1,
        num_slots=index + 1,
        slot_base=slab.ctypes.data,
        slot_bytes=slot_bytes,
    )
    shim.launch(kernel, launch, Geometry(2, 32))
    assert np.array_equal(target[at_target : at_target + PIECE], piece), f"{kernel}: {at_target:#x} was not written from {at_source:#x}"
    assert not target[at_target + PIECE :].any(), f"{kernel}: written behind the piece"


def stride_of_a_gibibyte(shim: Shim, kernel: str) -> None:
    """One factor of the product is large: either alone fits in 32 bits, the product does not."""
    copy_far(shim, kernel, (GIB + 4112, 9), (256 + PIECE, 3, 64))


def stride_beyond_32_bits(shim: Shim, kernel: str) -> None:
    copy_far(shim, kernel, (5 * GIB + 16, 1), (256 + PIECE, 3, 64))


def many_blocks_and_slots(shim: Shim, kernel: str) -> None:
    copy_far(shim, kernel, (MIB, 5000), (MIB + 4096, 6000, 64))


def slots_beyond_32_bits(shim: Shim, kernel: str) -> None:
    copy_far(shim, kernel, (4096, 3), (5 * GIB + 4096, 2, 64))


def offset_beyond_32_bits(shim: Shim, kernel: str) -> None:
    copy_far(shim, kernel, (4096, 3), (9 * GIB, 0, 4 * GIB + 64))


def ids_beyond_32_bits(shim: Shim, kernel: str) -> None:
    """More blocks and slots than 32 bits count, each of 16 bytes."""
    copy_far(shim, kernel, (16, 4 * GIB + 3), (16, 4 * GIB + 5, 0))


def more_runs_than_16_bits_count(shim: Shim, kernel: str) -> None:
    copy_many(shim, kernel, runs=(1 << 16) + 500, items=1)


def more_items_than_16_bits_count(shim: Shim, kernel: str) -> None:
    copy_many(shim, kernel, runs=1, items=(1 << 16) + 500)


def copy_many(shim: Shim, kernel: str, *, runs: int, items: int) -> None:
    """Words side by side: word ``i`` of the engine's second half to or from word ``i`` of the segment's first."""
    count = runs * items
    random = np.random.default_rng(2)
    kv, slab = (random.integers(0, 1 << 63, (2, count, 2), dtype=np.uint64) for _ in range(2))
    run, item = (np.arange(length, dtype=np.uint64) for length in (runs, items))
    table = np.stack([kv.ctypes.data + 16 * run, np.full_like(run, 16 * runs), np.full_like(run, 16), 16 * run], axis=1)
    launch = Launch(table, item + np.uint64(items), item, 2 * items, 2 * items, slab.ctypes.data, 16 * runs)
    wanted_kv, wanted_slab = kv.copy(), slab.copy()
    if kernel == "kv_gather":
        wanted_slab[0] = kv[1]
    else:
        wanted_kv[1] = slab[0]
    counted = shim.launch(kernel, launch, Geometry(12, 2))
    assert np.array_equal(kv, wanted_kv), f"{kernel}: the engine's memory is not as it should be"
    assert np.array_equal(slab, wanted_slab), f"{kernel}: the segment is not as it should be"
    assert counted == (count, count)


def long_runs(shim: Shim, kernel: str) -> None:
    """Words that are more than 16 bits, bytes that are more than 32 bits, and words that are more than 32 bits count."""
    for size, threads in ((2 * MIB + 48, (2, 3)), (4 * GIB + 48, (2, 3)), (64 * GIB + 48, (3,))):
        runs = np.array([[1 << 40, size, size, 64]], dtype=np.uint64)
        ids = np.array([1], dtype=np.uint64)
        launch = Launch(runs, ids, ids, 2, 2, 1 << 44, size + 4096)
        for thread in threads:  # thread 2 has one word more than thread 3
            words = len(range(thread, size // 16, 1024))
            counted = shim.count_thread(kernel, launch, Geometry(1, 1024), block=0, thread=thread)
            assert counted == (words, words), f"{kernel}: thread {thread} copies {counted} words of {size} bytes, {words} expected"


LARGE: dict[str, Check] = {
    check.__name__.replace("_", " "): check
    for check in (
        stride_of_a_gibibyte,
        stride_beyond_32_bits,
        many_blocks_and_slots,
        slots_beyond_32_bits,
        offset_beyond_32_bits,
        ids_beyond_32_bits,
        more_runs_than_16_bits_count,
        more_items_than_16_bits_count,
        long_runs,
    )
}
