"""Loops that numba compiles, once a machine, and again when anything of them has changed."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numba

from kvoffload.errors import UnsupportedError
from kvoffload.observe.logs import get_logger


def compile_native(function: Callable[..., Any], signature: Any, *, nogil: bool = True, cached: bool = True) -> Callable[..., int]:
    """Compile a function, which then runs with the interpreter lock released, or kept. Raises UnsupportedError.

    numba's cache looks at the file, the code and the closure of the function: not at what this one calls in other files (`digest_of`), nor
    at ``nogil``.
    """
    if numba.config.DISABLE_JIT:
        raise UnsupportedError(f"NUMBA_DISABLE_JIT is set: {function.__qualname__} would be interpreted code")
    try:
        compiled: Callable[..., int] = numba.njit(signature, nogil=nogil, cache=cached)(function)
    except Exception as error:
        if not cached:
            raise UnsupportedError(f"numba cannot compile {function.__qualname__}: {error}") from error
        # No writable cache directory, a full disk, or a broken cache file: numba has an error of its own for each.
        get_logger("numba").info("compiling without numba's cache", reason=str(error))
        return compile_native(function, signature, nogil=nogil, cached=False)
    return compiled


def digest_of(*modules: ModuleType) -> int:
    """Of their source: a function whose closure holds it is compiled again when something in them has changed. Raises UnsupportedError."""
    digest = 0
    for module in modules:
        try:
            digest = zlib.crc32(Path(str(module.__file__)).read_bytes(), digest)
        except OSError as error:
            raise UnsupportedError(f"{module.__name__} is compiled from its source, which cannot be read: {error}") from error
    return digest
