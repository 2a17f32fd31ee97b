"""The block ledger: how often each engine block was handed to a new owner, in memory that every process can read.

A save notes the epochs of its blocks when it is planned; when they are unchanged right after the bytes were read, only the old
bytes can have been read, because a bump precedes the plan that overwrites.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvoffload.errors import MisuseError
from kvoffload.memfd import check_memfd, close_fd, create_memfd, map_memfd, unmap

_FEW = 48
"""Up to here a loop over a memoryview is faster than numpy's fixed cost."""


class Ledger:
    """One uint64 epoch per engine block. Written by the scheduler's thread only; read by any number of copy threads."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise MisuseError(f"a ledger needs at least one block, not {num_blocks}")
        self._open(create_memfd("kvoffload-ledger", num_blocks * 8), num_blocks, writable=True)

    @classmethod
    def attach(cls, fd: int, num_blocks: int) -> Ledger:
        """A read-only view of another process's ledger. Takes over ``fd``. Raises PeerError when it is too small or not sealed."""
        check_memfd(fd, num_blocks * 8, "ledger")
        ledger = cls.__new__(cls)
        ledger._open(fd, num_blocks, writable=False)
        return ledger

    def _open(self, fd: int, num_blocks: int, *, writable: bool) -> None:
        self.fd = fd
        self.num_blocks = num_blocks
        self.writable = writable
        self.ignored = 0
        """Ids that were out of range, since the start."""
        self._mapping = map_memfd(fd, num_blocks * 8, writable=writable)
        self.array: NDArray[np.uint64] = np.frombuffer(self._mapping, dtype=np.uint64, count=num_blocks)
        self._epochs = memoryview(self._mapping).cast("Q")
        self._closed = False

    def bump(self, ids: Sequence[int]) -> None:
        """These blocks have a new owner. Each rises by at least one; ids out of range are ignored and counted in `ignored`."""
        if not self.writable:
            raise MisuseError("only the process that made the ledger may bump it")
        if len(ids) > _FEW:
            self._bump_many(ids)
            return
        epochs, num_blocks = self._epochs, self.num_blocks
        for block in ids:
            if 0 <= block < num_blocks:
                epochs[block] += 1
            else:
                self.ignored += 1

    def bump_all(self) -> None:
        """Any of the blocks may have a new owner."""
        if not self.writable:
            raise MisuseError("only the process that made the ledger may bump it")
        self.array += np.uint64(1)

    def _bump_many(self, ids: Sequence[int]) -> None:
        blocks = np.asarray(ids)
        if blocks.dtype.kind not in "iu":  # ids beyond 64 bits give an array of objects: sort them out one by one
            for start in range(0, len(ids), _FEW):
                self.bump(ids[start : start + _FEW])
            return
        known = blocks[(blocks >= 0) & (blocks < self.num_blocks)]
        self.ignored += len(blocks) - len(known)
        self.array[known] += np.uint64(1)

    def epochs(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The present epoch of each of these blocks. Raises MisuseError for an id out of range."""
        epochs, num_blocks = self._epochs, self.num_blocks
        for block in ids:
            if not 0 <= block < num_blocks:
                raise MisuseError(f"block {block} is not one of the ledger's {num_blocks}")
        return tuple([epochs[block] for block in ids])

    def close(self) -> None:
        """Let go of the memory; whoever still holds `array` keeps it. May be called twice."""
        if not self._closed:
            self._closed = True
            self._epochs.release()
            self._epochs = memoryview(b"").cast("Q")
            self.num_blocks = 0
            self.array = np.empty(0, dtype=np.uint64)
            close_fd(self.fd)
            unmap(self._mapping)
