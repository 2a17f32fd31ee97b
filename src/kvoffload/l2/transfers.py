"""What a node's writer and prefetcher have in common: the bytes of slots as values, what became of them, and whose turn it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, repeat
from typing import Protocol

import anyio
import numpy as np
from anyio.lowlevel import checkpoint
from numpy.typing import NDArray

from kvoffload.envelope import Part
from kvoffload.errors import InternalError
from kvoffload.l2.node import Item, Outcome, value_names
from kvoffload.layout import HEADER_BYTES
from kvoffload.messages import BlockKey

PARTS_AT_ONCE = 128
"""So many items are made before the others on the loop have their turn; that takes less than a millisecond."""


class Slots(Protocol):
    """What of a `kvoffload.segment.Segment` is used."""

    def slot(self, index: int) -> NDArray[np.uint8]: ...


class SlotBuffers:
    """The slots of all ranks' segments, as values: header and payload, without what fills a slot up to its size."""

    def __init__(self, segments: Sequence[Slots], payload_bytes: int) -> None:
        """``segments[rank]``; ``payload_bytes`` of one rank's part of a block."""
        self._segments = segments
        self.value_bytes = HEADER_BYTES + payload_bytes

    @property
    def ranks(self) -> int:
        return len(self._segments)

    @property
    def block_bytes(self) -> int:
        """Of one block, all ranks together."""
        return self.ranks * self.value_bytes

    def array(self, rank: int, slot: int) -> NDArray[np.uint8]:
        """The value in a slot, writable. Raises InternalError where the segment is gone or too small."""
        value = self._segments[rank].slot(slot)[: self.value_bytes]
        if len(value) != self.value_bytes:
            raise InternalError(
                f"slot {slot} of rank {rank} has {len(value)} bytes, and a value {self.value_bytes}: is its segment closed?"
            )
        return value

    def parts(self, slots: Sequence[int], keys: Sequence[BlockKey]) -> list[Part]:
        """Every rank's part of every block, block by block."""
        if len(self._segments) == 1:
            array = self.array
            return [Part(array(0, slot), key) for slot, key in zip(slots, keys, strict=True)]
        return [Part(self.array(rank, slot), key, rank) for slot, key in zip(slots, keys, strict=True) for rank in range(self.ranks)]

    def clear(self, slots: Sequence[int]) -> None:
        """Nothing that lies in these slots passes for a block any more."""
        for slot in slots:
            for rank in range(len(self._segments)):
                self.array(rank, slot)[:HEADER_BYTES] = 0


def names_of(namespace: str, keys: Sequence[BlockKey], ranks: int) -> list[str]:
    """Of every rank's part of every block, block by block."""
    if ranks == 1:
        return value_names(namespace, keys, repeat(0))
    return value_names(namespace, [key for key in keys for _ in range(ranks)], cycle(range(ranks)))


async def parts_of(buffers: SlotBuffers, slots: Sequence[int], keys: Sequence[BlockKey]) -> list[Part]:
    """Every rank's part of every block, block by block."""
    parts: list[Part] = []
    blocks = max(1, PARTS_AT_ONCE // max(1, buffers.ranks))
    for start in range(0, len(slots), blocks):
        if start:
            await checkpoint()
        parts += buffers.parts(slots[start : start + blocks], keys[start : start + blocks])
    return parts


def items_of(namespace: str, parts: Sequence[Part], *, writable: bool) -> list[Item]:
    """For a read ``writable``; for a write not: whoever stores a slot cannot change it."""
    buffers = [slot.data for slot, _, _ in parts] if writable else [slot.data.toreadonly() for slot, _, _ in parts]
    names = value_names(namespace, [key for _, key, _ in parts], [rank for _, _, rank in parts])
    return list(map(Item._make, zip(names, buffers, strict=True)))


_GRAVEST = (Outcome.UNSETTLED, Outcome.FAILED, Outcome.LATE, Outcome.FULL, Outcome.MALFORMED, Outcome.ABSENT)


def is_all_done(outcomes: Sequence[Outcome]) -> bool:
    """The usual case, found out at a fraction of what looking at each costs: members of an enum hash and compare in Python."""
    return list(outcomes) == [Outcome.DONE] * len(outcomes)


def by_block(outcomes: Sequence[Outcome], ranks: int) -> list[Outcome]:
    """What became of each block: DONE where all its parts are, else its gravest part."""
    if is_all_done(outcomes):
        return [Outcome.DONE] * (len(outcomes) // ranks)
    blocks = []
    for start in range(0, len(outcomes), ranks):
        parts = outcomes[start : start + ranks]
        blocks.append(next((outcome for outcome in _GRAVEST if outcome in parts), Outcome.DONE))
    return blocks


class Turns:
    """Loads before writes, on one node: a write waits while reads are under way, but never longer than its patience."""

    def __init__(self) -> None:
        self._reads = 0
        self._idle: anyio.Event | None = None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While inside, writes wait."""
        self._reads += 1
        try:
            yield
        finally:
            self._reads -= 1
            if not self._reads and self._idle is not None:
                self._idle.set()
                self._idle = None

    async def wait_to_write(self, patience_s: float) -> bool:
        """Until no read is under way, at most ``patience_s``: whether that came to pass."""
        with anyio.move_on_after(patience_s):
            while self._reads:
                if self._idle is None:
                    self._idle = anyio.Event()
                await self._idle.wait()
        return not self._reads
