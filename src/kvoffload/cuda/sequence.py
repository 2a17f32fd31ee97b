"""One copy as one native call: everything that the driver is told for it, with the interpreter lock released from first to last.

Each call of the driver from Python gives the lock up and then waits to get it back, up to 5 ms while vLLM's thread computes in
Python; a copy makes at least four, and building its descriptors with numpy makes more. Here descriptors are written, submitted and
waited for, and the ledger is read, by compiled code that calls the driver's functions by address.

Pieces are submitted in *windows*, each one call of the driver: at most so many descriptors and so many bytes, two under way at once.

::

    wait for the mark -> (save: clear headers) -> window 0 -> window 1 -> wait for window 0 -> window 0 -> ... -> wait for the last
                      -> (save: compare the ledger)
    anything failed   -> wait for all that was submitted

All of it in the thread's relaxed capture mode: where some other thread captures a graph, waiting for an event would else break it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, register_jitable

from kvoffload.compiled import compile_native

# (numba's cache of what is compiled here does not see a change there: touch this file then)
from kvoffload.copy.native import read_after, store_zero

WAIT, RECORD, SYNCHRONIZE, SINGLE, BATCH, LAUNCH, SETTLE, EXCHANGE = range(8)
"""Places in the table of addresses; what failed is told by them."""

NAMES = (
    "cuStreamWaitEvent",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuMemcpyAsync",
    "cuMemcpyBatchAsync",
    "cuLaunchKernel",
    "cuStreamSynchronize",
    "cuThreadExchangeStreamCaptureMode",
)
SINCE = 12000
"""The version of CUDA as whose functions all but the batch are looked up."""

STREAM, EVENT_0, EVENT_1, WINDOW_BYTES, ATTRIBUTES, ATTRIBUTES_INDEX, FAIL_INDEX, MODE, UNSETTLED = range(9)
"""Places in a lane's words. FAIL_INDEX: where the batch writes it, 0 for the form that does not. UNSETTLED: after a failure, the
return code of waiting for what had been submitted."""
LANE_WORDS = 9
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED

BY_SINGLES, BY_BATCHES, BY_KERNEL = range(3)
"""How pinned slots are copied; the others always go one by one."""

KERNEL_FUNCTION, KERNEL_GRID, KERNEL_PARAMETERS = range(3)
"""Places in the kernel's words."""
KERNEL_WORDS = 3
KERNEL_THREADS = 256
PARAMETER_BLOCKS, PARAMETER_SLOTS, PARAMETER_COUNT = 2, 3, 4
"""Parameters of a kernel that change from window to window."""

_CODE_BITS = 32


@intrinsic
def _invoke(typing_context: Any, address: Any, arguments: Any) -> Any:
    """Call the C function at ``address`` with a tuple of integers, each as wide as its type; gives its int."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        target, packed = values
        parts = cgutils.unpack_tuple(builder, packed)
        kind = ir.FunctionType(ir.IntType(32), [part.type for part in parts])
        return builder.call(builder.inttoptr(target, kind.as_pointer()), parts)

    return types.int32(types.uint64, arguments), emit


@register_jitable
def _failure(function: int, code: Any) -> Any:
    """0, or the function's place and its return code in one number."""
    return np.int64(0) if code == 0 else (np.int64(function) << np.int64(_CODE_BITS)) | np.int64(code)


@register_jitable
def _end_window(calls: Any, lane: Any, window: int) -> Any:
    """The window's event happens when all submitted so far is done."""
    return _failure(RECORD, _invoke(calls[RECORD], (lane[EVENT_0 + window], lane[STREAM])))


@register_jitable
def _wait_window(calls: Any, lane: Any, window: int) -> Any:
    return _failure(SYNCHRONIZE, _invoke(calls[SYNCHRONIZE], (lane[EVENT_0 + window],)))


@register_jitable
def _wait_last(calls: Any, lane: Any, windows: int) -> Any:
    """Wait for the last of so many windows, and for the one before: each tells of its own errors."""
    for window in range(max(0, windows - 2), windows):
        failure = _wait_window(calls, lane, window & 1)
        if failure != 0:
            return failure
    return np.int64(0)


@register_jitable
def _submit_pieces(calls: Any, lane: Any, pieces: Any, count: int, by_batches: bool) -> Any:
    """One window of descriptors, ``pieces`` being rows of destinations, sources and sizes."""
    if by_batches:
        to, source, size = np.uint64(pieces[0].ctypes.data), np.uint64(pieces[1].ctypes.data), np.uint64(pieces[2].ctypes.data)
        attributes, index, many = lane[ATTRIBUTES], lane[ATTRIBUTES_INDEX], np.uint64(count)
        if lane[FAIL_INDEX] != 0:
            arguments_9 = (to, source, size, many, attributes, index, np.uint64(1), lane[FAIL_INDEX], lane[STREAM])
            return _failure(BATCH, _invoke(calls[BATCH], arguments_9))
        arguments_8 = (to, source, size, many, attributes, index, np.uint64(1), lane[STREAM])
        return _failure(BATCH, _invoke(calls[BATCH], arguments_8))
    for piece in range(count):
        code = _invoke(calls[SINGLE], (pieces[0, piece], pieces[1, piece], pieces[2, piece], lane[STREAM]))
        if code != 0:
            return _failure(SINGLE, code)
    return np.int64(0)


@register_jitable
def _copy_pieces(
    calls: Any, lane: Any, descriptors: Any, plan: Any, segment: Any, slot_bytes: Any, to_slots: bool,
    by_batches: bool, blocks: Any, slots: Any, pinned: Any, wanted: int,
) -> Any:  # fmt: skip
    """Copy the items whose slots are ``wanted`` (pinned or not) piece by piece; nothing of it runs any more at the end."""
    windows = count = 0
    num_bytes = np.uint64(0)
    for item in range(blocks.shape[0]):
        if pinned[item] != wanted:
            continue
        block = np.uint64(blocks[item])
        slot = segment + np.uint64(slots[item]) * slot_bytes
        for run in range(plan.shape[0]):
            size = plan[run, 2]
            if count == descriptors.shape[2] or (count > 0 and num_bytes + size > lane[WINDOW_BYTES]):
                failure = _submit_pieces(calls, lane, descriptors[windows & 1], count, by_batches)
                if failure == 0:
                    failure = _end_window(calls, lane, windows & 1)
                windows, count, num_bytes = windows + 1, 0, np.uint64(0)
                if failure == 0 and windows > 1:
                    failure = _wait_window(calls, lane, windows & 1)  # the one before the last
                if failure != 0:
                    return failure
            in_block, in_slot = plan[run, 0] + block * plan[run, 1], slot + plan[run, 3]
            descriptors[windows & 1, 0, count] = in_slot if to_slots else in_block
            descriptors[windows & 1, 1, count] = in_block if to_slots else in_slot
            descriptors[windows & 1, 2, count] = size
            count += 1
            num_bytes += size
    if count == 0:
        return np.int64(0)
    failure = _submit_pieces(calls, lane, descriptors[windows & 1], count, by_batches)
    if failure == 0:
        failure = _end_window(calls, lane, windows & 1)
    return failure if failure != 0 else _wait_last(calls, lane, windows + 1)


@register_jitable
def _launch(calls: Any, lane: Any, kernel: Any, items: Any, parameters: Any, num_runs: int, window: int, count: int) -> Any:
    """Start the kernel on one window of ids, which it reads where they are."""
    parameters[PARAMETER_BLOCKS, 0] = np.uint64(items[window, 0].ctypes.data)
    parameters[PARAMETER_SLOTS, 0] = np.uint64(items[window, 1].ctypes.data)
    parameters[PARAMETER_COUNT, 0] = np.uint64(count)
    one, grid = np.uint32(1), np.uint32(min(kernel[KERNEL_GRID], np.uint64(count * num_runs)))
    arguments = (
        kernel[KERNEL_FUNCTION], grid, one, one, np.uint32(KERNEL_THREADS), one, one, np.uint32(0), lane[STREAM],
        kernel[KERNEL_PARAMETERS], np.uint64(0),
    )  # fmt: skip
    return _failure(LAUNCH, _invoke(calls[LAUNCH], arguments))


@register_jitable
def _copy_items(
    calls: Any, lane: Any, kernel: Any, items: Any, parameters: Any, num_runs: int, item_bytes: Any, blocks: Any, slots: Any, pinned: Any,
) -> Any:  # fmt: skip
    """Copy the items whose slots are pinned by the kernel; nothing of it runs any more at the end."""
    windows = done = 0
    room = max(np.int64(1), min(np.int64(items.shape[2]), np.int64(lane[WINDOW_BYTES] // item_bytes)))
    while done < blocks.shape[0]:
        window = windows & 1
        if windows > 1:
            failure = _wait_window(calls, lane, window)
            if failure != 0:
                return failure
        count = 0
        while done < blocks.shape[0] and count < room:
            if pinned[done] == 1:
                items[window, 0, count] = np.uint64(blocks[done])
                items[window, 1, count] = np.uint64(slots[done])
                count += 1
            done += 1
        if count == 0:
            break
        failure = _launch(calls, lane, kernel, items, parameters, num_runs, window, count)
        if failure == 0:
            failure = _end_window(calls, lane, window)
        if failure != 0:
            return failure
        windows += 1
    return _wait_last(calls, lane, windows)


@register_jitable
def _exchange_mode(calls: Any, lane: Any) -> Any:
    """Take the capture mode in the lane's word for this thread, and put there what it was."""
    return _failure(EXCHANGE, _invoke(calls[EXCHANGE], (np.uint64(lane.ctypes.data) + np.uint64(MODE * 8),)))


@register_jitable
def _run(
    calls: Any, lane: Any, descriptors: Any, kernel: Any, items: Any, parameters: Any, plan: Any, segment: Any, slot_bytes: Any,
    to_slots: bool, how: int, mark: Any, blocks: Any, slots: Any, pinned: Any, ledger: Any, epochs: Any, flags: Any,
) -> Any:  # fmt: skip
    failure = _failure(WAIT, _invoke(calls[WAIT], (lane[STREAM], mark, np.uint32(0))))
    if failure != 0:
        return failure
    if to_slots:
        for item in range(slots.shape[0]):
            for word in range(8):
                store_zero(segment + np.uint64(slots[item]) * slot_bytes + np.uint64(word * 8))
    if how == BY_KERNEL:
        item_bytes = np.uint64(0)
        for run in range(plan.shape[0]):
            item_bytes += plan[run, 2]
        failure = _copy_items(calls, lane, kernel, items, parameters, plan.shape[0], item_bytes, blocks, slots, pinned)
    else:
        failure = _copy_pieces(
            calls, lane, descriptors, plan, segment, slot_bytes, to_slots, how == BY_BATCHES, blocks, slots, pinned, 1
        )  # fmt: skip
    if failure == 0:
        failure = _copy_pieces(calls, lane, descriptors, plan, segment, slot_bytes, to_slots, False, blocks, slots, pinned, 0)
    if failure == 0 and to_slots:
        for item in range(blocks.shape[0]):
            flags[item] = read_after(ledger + np.uint64(blocks[item]) * np.uint64(8)) == epochs[item]
    return failure


def _copy(
    calls: Any, lane: Any, descriptors: Any, kernel: Any, items: Any, parameters: Any, plan: Any, segment: Any, slot_bytes: Any,
    to_slots: bool, how: int, mark: Any, blocks: Any, slots: Any, pinned: Any, ledger: Any, epochs: Any, flags: Any,
) -> Any:  # fmt: skip
    """Copy items between blocks and slots behind ``mark``; 0, or what `_failure` says. ``ledger``, ``epochs``, ``flags``: saves only.

    When it returns nothing of it is under way any more, unless the lane's word UNSETTLED is not 0.
    """
    lane[MODE], lane[UNSETTLED] = np.uint64(_RELAXED), np.uint64(0)
    failure = _exchange_mode(calls, lane)
    if failure != 0:
        return failure
    failure = _run(
        calls, lane, descriptors, kernel, items, parameters, plan, segment, slot_bytes,
        to_slots, how, mark, blocks, slots, pinned, ledger, epochs, flags,
    )  # fmt: skip
    if failure != 0 and _invoke(calls[SETTLE], (lane[STREAM],)) != 0:
        # It may have waited, and then told of the error that is known already: asked again it has nothing to tell.
        lane[UNSETTLED] = np.uint64(_invoke(calls[SETTLE], (lane[STREAM],)))
    restored = _exchange_mode(calls, lane)
    return failure if failure != 0 else restored


_WORDS = types.Array(types.uint64, 1, "C")
_TABLE = types.Array(types.uint64, 2, "C")
_CUBE = types.Array(types.uint64, 3, "C")
_IDS = types.Array(types.int64, 1, "C")
_BYTES = types.Array(types.uint8, 1, "C")
_FLAGS = types.Array(types.boolean, 1, "C")
_ADDRESS = types.uint64
_COPY = types.int64(
    _WORDS, _WORDS, _CUBE, _WORDS, _CUBE, _TABLE, _TABLE, _ADDRESS, types.uint64,
    types.boolean, types.int64, _ADDRESS, _IDS, _IDS, _BYTES, _ADDRESS, _WORDS, _FLAGS,
)  # fmt: skip


def split_failure(failure: int) -> tuple[int, int]:
    """Which function, as a place in `NAMES`, and its return code."""
    return failure >> _CODE_BITS, failure & ((1 << _CODE_BITS) - 1)


@cache
def compile_sequence() -> Callable[..., int]:
    """`_copy`, compiled now or by an earlier process. Raises UnsupportedError."""
    return compile_native(_copy, _COPY)
