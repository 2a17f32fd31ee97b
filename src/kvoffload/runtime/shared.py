"""What the second tier needs to know of an engine's blocks, and how to reach their bytes."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from kvoffload.segment import Segment


class SegmentView:
    """A segment's slots, for as long as this lives: whoever closes the segment meanwhile pulls nothing away."""

    def __init__(self, segment: Segment) -> None:
        self._array = segment.array
        self.address = segment.address
        self.num_bytes = segment.num_bytes
        self.slot_bytes = segment.slot_bytes
        self.fd = os.dup(segment.fd)
        """Of its memory, for other processes to map; open for as long as this lives."""
        weakref.finalize(self, os.close, self.fd)

    def slot(self, index: int) -> NDArray[np.uint8]:
        """The bytes of one slot, header first."""
        return self._array[index * self.slot_bytes : (index + 1) * self.slot_bytes]


@dataclass(frozen=True, slots=True)
class Shared:
    """``namespace``: the root of the keys, 24 bytes; the layout is of every rank's block; a segment per rank, by rank."""

    namespace: bytes
    layout_digest: bytes
    payload_bytes: int
    segments: tuple[SegmentView, ...]

    @property
    def block_bytes(self) -> int:
        """Of all ranks together."""
        return self.payload_bytes * len(self.segments)

    def digest(self) -> bytes:
        """Of all that decides what a block's bytes mean, 24 bytes: keys do not say in which order a slot has the layers."""
        return blake2b(self.namespace + self.layout_digest, digest_size=24, person=b"kvoffload.l2").digest()
