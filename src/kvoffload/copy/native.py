"""The copy loops, compiled by numba to run without the interpreter lock.

Importing this imports numba; `compile_kernels` compiles, or loads what an earlier process compiled. There is no Python fallback:
a loop over pages that takes the interpreter lock was measured at 1.4 to 888 ms for 23 blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import ffi
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from kvoffload.compiled import compile_native
from kvoffload.copy.ids import BLOCK_RANGE, DUPLICATE, OK, SLOT_RANGE


def _make_vars_work(library: Any) -> None:
    """Let ``vars(llvmlite.binding.ffi.lib)`` be a dict, where llvmlite makes a foreign function of it.

    vLLM 0.32's CPU backend looks at the ``vars`` of everything in every module when it starts (`_rebind_kernels` in its
    triton_utils/dispatcher.py) and dies of that one: an engine that starts in a process where ours has run would.
    """
    try:
        is_bearable = isinstance(vars(library), dict)
    except TypeError:
        is_bearable = True  # it has none, and is passed over
    if not is_bearable:

        class WithoutVars(type(library)):  # type: ignore[misc]
            __slots__ = ()
            __dict__ = property(lambda self: {})

        library.__class__ = WithoutVars


_make_vars_work(ffi.lib)

_WORD = ir.IntType(64)


@intrinsic
def _copy(typing_context: Any, to: Any, source: Any, size: Any) -> Any:
    """memcpy of the C library: its address is resolved when the code is linked, so cached code stays good."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(pointer, [pointer, pointer, _WORD])
        memcpy = cgutils.get_or_insert_function(builder.module, kind, "memcpy")
        target, origin, length = arguments
        builder.call(memcpy, [builder.inttoptr(target, pointer), builder.inttoptr(origin, pointer), length])
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.uint64), emit


@intrinsic
def store_zero(typing_context: Any, address: Any) -> Any:
    """Clear eight bytes."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(ir.Constant(_WORD, 0), builder.inttoptr(arguments[0], _WORD.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.uint64), emit


@intrinsic
def read_after(typing_context: Any, address: Any) -> Any:
    """Read a word of the ledger, not before any read that comes earlier in the program (the reader's side of a seqlock)."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("acquire")
        return builder.load_atomic(builder.inttoptr(arguments[0], _WORD.as_pointer()), "monotonic", 8)

    return types.uint64(types.uint64), emit


@register_jitable
def _check(blocks: Any, slots: Any, num_blocks: int, num_slots: int, targets: Any, seen: Any) -> Any:
    for index in range(blocks.shape[0]):
        if blocks[index] < 0 or blocks[index] >= num_blocks:
            return BLOCK_RANGE
        if slots[index] < 0 or slots[index] >= num_slots:
            return SLOT_RANGE
    # `seen` has a byte per possible target, all zero between calls: cheaper than sorting, and nothing is allocated.
    unique = 0
    while unique < targets.shape[0] and seen[targets[unique]] == 0:
        seen[targets[unique]] = 1
        unique += 1
    for index in range(unique):
        seen[targets[index]] = 0
    return OK if unique == targets.shape[0] else DUPLICATE


def _save(
    plan: Any,
    segment: int,
    slot_bytes: int,
    num_slots: int,
    ledger: int,
    num_blocks: int,
    blocks: Any,
    slots: Any,
    epochs: Any,
    seen: Any,
    flags: Any,
) -> Any:
    wrong = _check(blocks, slots, num_blocks, num_slots, slots, seen)
    if wrong != OK:
        return wrong
    for index in range(blocks.shape[0]):
        block = np.uint64(blocks[index])
        slot = segment + np.uint64(slots[index]) * slot_bytes
        for word in range(8):
            store_zero(slot + np.uint64(word * 8))
        for run in range(plan.shape[0]):
            _copy(slot + plan[run, 3], plan[run, 0] + block * plan[run, 1], plan[run, 2])
        flags[index] = read_after(ledger + block * np.uint64(8)) == epochs[index]
    return OK


def _load(
    plan: Any,
    segment: int,
    slot_bytes: int,
    num_slots: int,
    num_blocks: int,
    slots: Any,
    blocks: Any,
    seen: Any,
) -> Any:
    wrong = _check(blocks, slots, num_blocks, num_slots, blocks, seen)
    if wrong != OK:
        return wrong
    for index in range(blocks.shape[0]):
        block = np.uint64(blocks[index])
        slot = segment + np.uint64(slots[index]) * slot_bytes
        for run in range(plan.shape[0]):
            _copy(plan[run, 0] + block * plan[run, 1], slot + plan[run, 3], plan[run, 2])
    return OK


_ADDRESS = types.uint64
_COUNT = types.int64
_PLAN = types.Array(types.uint64, 2, "C")
_IDS = types.Array(types.int64, 1, "C")
_EPOCHS = types.Array(types.uint64, 1, "C")
_BYTES = types.Array(types.uint8, 1, "C")
_FLAGS = types.Array(types.boolean, 1, "C")
_SAVE = types.int64(_PLAN, _ADDRESS, types.uint64, _COUNT, _ADDRESS, _COUNT, _IDS, _IDS, _EPOCHS, _BYTES, _FLAGS)
_CHECK = types.int64(_IDS, _IDS, _COUNT, _COUNT, _IDS, _BYTES)
_LOAD = types.int64(_PLAN, _ADDRESS, types.uint64, _COUNT, _COUNT, _IDS, _IDS, _BYTES)


@dataclass(frozen=True, slots=True)
class Kernels:
    """The compiled loops; arguments as in `_save` and `_load` above, answers `OK` or what was wrong with the ids."""

    save: Callable[..., int]
    load: Callable[..., int]


@cache
def compile_kernels() -> Kernels:
    """Compile now (about a second; milliseconds when an earlier process left it in numba's cache). Raises UnsupportedError."""
    return Kernels(save=compile_native(_save, _SAVE), load=compile_native(_load, _LOAD))


@cache
def compile_check() -> Callable[..., int]:
    """`_check` alone, for copies that others do; arguments as there. Raises UnsupportedError.

    It takes microseconds and keeps the interpreter lock: to have it back would take longer.
    """
    return compile_native(_check, _CHECK, nogil=False)
