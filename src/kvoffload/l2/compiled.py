"""Loops that numba compiles once a machine, and compiles again when anything of them has changed."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numba

from kvoffload.errors import UnsupportedError
from kvoffload.observe.logs import get_logger


def digest_of(*modules: ModuleType) -> int:
    """Of their source. numba's cache looks at the file, the code and the closure of the function that it compiles, and not at what this one
    calls: a function whose closure holds the digest is compiled again when something behind it has changed. Raises UnsupportedError."""
    if numba.config.DISABLE_JIT:
        raise UnsupportedError("NUMBA_DISABLE_JIT is set: what moves values would be interpreted code")
    digest = 0
    for module in modules:
        try:
            digest = zlib.crc32(Path(str(module.__file__)).read_bytes(), digest)
        except OSError as error:
            raise UnsupportedError(f"what moves values is compiled from its source, which cannot be read: {error}") from error
    return digest


def compiled(function: Callable[..., Any], signature: Any, *, keeps_lock: bool = False, is_cached: bool = True) -> Callable[..., int]:
    """Of a function of addresses and numbers. Raises UnsupportedError where numba cannot.

    ``keeps_lock``: the interpreter's, which else is let go. The cache does not tell one from the other: the closure must.
    """
    try:
        made: Callable[..., int] = numba.njit(signature, nogil=not keeps_lock, cache=is_cached)(function)
    except Exception as error:
        if not is_cached:
            raise UnsupportedError(f"numba cannot compile {function.__qualname__}: {error}") from error
        get_logger("l2").info("compiling without numba's cache", reason=str(error))
        return compiled(function, signature, keeps_lock=keeps_lock, is_cached=False)
    return made
