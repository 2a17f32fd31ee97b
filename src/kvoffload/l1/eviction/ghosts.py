"""Which keys were evicted lately: S3FIFO's memory of what it has seen once."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from kvoffload.errors import InternalError
from kvoffload.messages import BlockKey

_SPARSE = 4
_LEAST = 1 << 12
_FOREVER = (1 << 31) - 1


class Ghosts:
    """The keys of the last ``bound`` evictions, by fingerprint: 32 bits in a table of at least four places per key.

    A key's tag ``hash(key) >> 32`` is at ``hash(key) & mask``, an even number, and the number of its eviction is behind it, on the
    same cache line. Keys that fall on one place displace each other (at a full memory, one in ten is lost so), and a strange key is
    taken for a ghost with a chance of 2^-32: either costs a block its best queue, nothing else. The S3-FIFO paper (SOSP 2023,
    section 4.2) proposes such a table. An exact one would cost 100 bytes per ghost; this one takes 8 per place and never grows.
    """

    __slots__ = ("_now", "bound", "mask", "table")

    def __init__(self, capacity: int) -> None:
        places = _LEAST
        while places < _SPARSE * capacity:
            places *= 2
        self.mask = 2 * places - 2
        self.table: array[int] = array("i", bytes(8 * places))  # evictions are numbered from 1; 0 for an empty place
        self._now = 0
        self.bound = 0

    def add(self, keys: Iterable[BlockKey]) -> None:
        """These keys were evicted, in this order."""
        table, mask, now = self.table, self.mask, self._now
        for digest in map(hash, keys):
            at = digest & mask
            table[at] = digest >> 32
            now += 1
            table[at + 1] = now
        self._now = now
        if now > _FOREVER - (1 << 24):  # the numbers run out: begin again, knowing nothing
            self.clear()

    @property
    def has_any(self) -> bool:
        """Whether there may be some: nothing was evicted yet otherwise."""
        return self._now > 0

    def may_have(self, keys: Iterable[BlockKey], count: int) -> bool:
        """Whether one of these ``count`` keys may be remembered: False is certain."""
        digests = np.fromiter(map(hash, keys), dtype=np.int64, count=count)
        return bool((np.frombuffer(self.table, dtype=np.int32)[digests & self.mask] == digests >> 32).any())

    def pop(self, digest: int) -> bool:
        """Whether the key with this hash was among the last ``bound`` evicted, and has not been popped since."""
        at = digest & self.mask
        when = self.table[at + 1]
        if self.table[at] != digest >> 32 or not when or self._now - when >= self.bound:
            return False
        self.table[at + 1] = 0
        return True

    def clear(self) -> None:
        """Forget all."""
        self._numbers()[:] = 0
        self._now = 0

    def __len__(self) -> int:
        """How many keys are remembered; counts the whole table."""
        return int(np.count_nonzero(self._numbers() > max(0, self._now - self.bound)))

    def check(self) -> None:
        """Verify the bound; raises InternalError."""
        if len(self) > self.bound:
            raise InternalError(f"{len(self)} ghosts are remembered, the bound is {self.bound}")

    def _numbers(self) -> NDArray[np.int32]:
        return np.frombuffer(self.table, dtype=np.int32)[1::2]
