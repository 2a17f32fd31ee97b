"""Anonymous shared memory whose size can never change: what the ledger and the segments are made of."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os

from kvoffload.errors import CapacityError, PeerError, UnsupportedError

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def create_memfd(name: str, num_bytes: int) -> int:
    """A sealed memfd of ``num_bytes`` zeros, closed on exec. Raises CapacityError or UnsupportedError."""
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise UnsupportedError(f"the kernel gives no memfd for {name}: {error}") from error
    try:
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        os.close(fd)
        raise CapacityError(f"cannot size {name} to {num_bytes} bytes: {error}") from error
    return fd


def check_memfd(fd: int, num_bytes: int, name: str) -> None:
    """Raise PeerError unless ``fd`` is a memfd of at least ``num_bytes`` that nobody can shrink.

    A peer that could truncate it would end this process with SIGBUS at the next access.
    """
    try:
        size = os.fstat(fd).st_size
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise PeerError(f"what the peer sent as {name} is not a memfd: {error}") from error
    if size < num_bytes:
        raise PeerError(f"the peer's {name} has {size} bytes, {num_bytes} were announced")
    if not seals & fcntl.F_SEAL_SHRINK:
        raise PeerError(f"the peer's {name} is not sealed against shrinking")


def map_memfd(fd: int, num_bytes: int, *, writable: bool) -> mmap.mmap:
    """Map it shared. The mapping lives until the last array made of it is gone, whatever is closed before. Raises CapacityError."""
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    try:
        return mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED, prot=protection)
    except OSError as error:
        raise CapacityError(f"cannot map {num_bytes} bytes: {error}") from error


def unmap(mapping: mmap.mmap) -> None:
    """Unmap it now, or, while somebody still holds an array of it, when they let go: memory in use is never pulled away."""
    with contextlib.suppress(BufferError):
        mapping.close()


def close_fd(fd: int) -> None:
    """Close ``fd``; closed already is fine."""
    try:
        os.close(fd)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
