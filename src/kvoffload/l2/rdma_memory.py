"""Where a buffer lies in the segments that a node's child process has mapped too."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from kvoffload.errors import MisuseError

REGION_BYTES = 1 << 30
"""About so much is registered at once, when first used: it takes the memory, and a request is about one region."""


class Shared(Protocol):
    """What of a `kvoffload.segment.Segment` is used."""

    @property
    def fd(self) -> int: ...
    @property
    def address(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def slot_bytes(self) -> int: ...


class Memory:
    """Segments by address. Owns duplicates of their descriptors: they may be closed meanwhile."""

    def __init__(self, segments: Sequence[Shared], region_bytes: int = REGION_BYTES) -> None:
        """No slot lies across two regions. Raises MisuseError without segments."""
        if not segments:
            raise MisuseError("RDMA needs the segments that the values are in")
        self._spans = [(segment.address, segment.num_bytes) for segment in segments]
        self._regions = [max(1, region_bytes // segment.slot_bytes) * segment.slot_bytes for segment in segments]
        self.fds = [os.dup(segment.fd) for segment in segments]

    @property
    def regions(self) -> list[tuple[int, int]]:
        """Of each segment, bytes, and bytes per region."""
        return [(num_bytes, region) for (_, num_bytes), region in zip(self._spans, self._regions, strict=True)]

    def locate(self, buffer: memoryview) -> tuple[int, int] | None:
        """(segment, offset); None where it is not one run of bytes within one region."""
        size = buffer.nbytes
        if not buffer.contiguous or size == 0:
            return None
        address = int(np.frombuffer(buffer, dtype=np.uint8).__array_interface__["data"][0])
        for index, (start, num_bytes) in enumerate(self._spans):
            offset = address - start
            if offset >= 0 and offset + size <= num_bytes:
                region = self._regions[index]
                return (index, offset) if offset // region == (offset + size - 1) // region else None
        return None

    def close(self) -> None:
        """May be called twice."""
        while self.fds:
            os.close(self.fds.pop())
