"""Calls of the C library for loops that numba compiles, and memory by its address."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic, register_jitable

import kvoffload.copy.native  # noqa: F401 - makes llvmlite bearable to vLLM

recv = types.ExternalFunction("recv", types.int64(types.int32, types.int64, types.int64, types.int32))
_errno_location = types.ExternalFunction("__errno_location", types.int64())


@intrinsic
def word32(typing_context: Any, address: Any) -> Any:
    """The ``i32`` at an address."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(builder.inttoptr(arguments[0], ir.IntType(32).as_pointer()))

    return types.int32(types.int64), emit


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), emit


@register_jitable
def words(address: int, rows: int, columns: int) -> Any:
    """The int64 there, as an array."""
    return carray(_pointer(address), (rows, columns), np.int64)


@register_jitable
def octets(address: int, count: int) -> Any:
    """The bytes there, as an array."""
    return carray(_pointer(address), (count,), np.uint8)


@register_jitable
def last_error() -> Any:
    """``errno``, right after a call that answered -1."""
    return word32(_errno_location())
