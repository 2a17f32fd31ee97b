"""The values of a batch of blocks, as nodes take them: made when they are first looked at, by the thread that does it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import cycle, repeat
from typing import Protocol, Self, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from kvoffload.envelope import Envelope, Fault, Part
from kvoffload.errors import InternalError
from kvoffload.l2.node import Item, value_names
from kvoffload.layout import HEADER_BYTES
from kvoffload.messages import BlockKey

T = TypeVar("T")

_item = partial(tuple.__new__, Item)  # as Item._make, in C


class Slots(Protocol):
    """What of a `kvoffload.segment.Segment` is used."""

    def slot(self, index: int) -> NDArray[np.uint8]: ...


class SlotBuffers:
    """The slots of all ranks' segments, as values: header and payload, without what fills a slot up to its size."""

    def __init__(self, segments: Sequence[Slots], payload_bytes: int) -> None:
        """``segments[rank]``; ``payload_bytes`` of one rank's part of a block."""
        self._segments = segments
        self.ranks = len(segments)
        self.value_bytes = HEADER_BYTES + payload_bytes
        self.block_bytes = self.ranks * self.value_bytes
        """Of one block, all ranks together."""

    def array(self, rank: int, slot: int) -> NDArray[np.uint8]:
        """The value in a slot, writable. Raises InternalError where the segment is gone or too small."""
        value = self._segments[rank].slot(slot)[: self.value_bytes]
        if len(value) != self.value_bytes:
            raise InternalError(
                f"slot {slot} of rank {rank} has {len(value)} bytes, and a value {self.value_bytes}: is its segment closed?"
            )
        return value

    def check(self, slots: Sequence[int]) -> None:
        """Raise InternalError where a segment is gone, or too small for these: a segment has all slots between two that it has."""
        if slots:
            first, last = min(slots), max(slots)
            for rank in range(self.ranks):
                self.array(rank, first)
                self.array(rank, last)

    def parts(self, slots: Sequence[int], keys: Sequence[BlockKey]) -> list[Part]:
        """Every rank's part of every block, block by block."""
        if self.ranks == 1:
            array = self.array
            return [Part(array(0, slot), key) for slot, key in zip(slots, keys, strict=True)]
        return [Part(self.array(rank, slot), key, rank) for slot, key in zip(slots, keys, strict=True) for rank in range(self.ranks)]

    def clear(self, slots: Sequence[int]) -> None:
        """Nothing that lies in these slots passes for a block any more."""
        for slot in slots:
            for rank in range(self.ranks):
                self.array(rank, slot)[:HEADER_BYTES] = 0


def names_of(namespace: str, keys: Sequence[BlockKey], ranks: int) -> list[str]:
    """Of every rank's part of every block, block by block."""
    if ranks == 1:
        return value_names(namespace, keys, repeat(0))
    return value_names(namespace, [key for key in keys for _ in range(ranks)], cycle(range(ranks)))


def seal(envelope: Envelope, buffers: SlotBuffers, slots: Sequence[int], keys: Sequence[BlockKey]) -> None:
    """`Envelope.seal_all` of every rank's part of every block, for a worker thread."""
    envelope.seal_all(buffers.parts(slots, keys))


class _Made(Sequence[T]):
    """Some of the parts of blocks, which are counted block by block; a slice of them is another, and is not made either.

    The threads of a node need these; on the loop they would be a microsecond and more per value.
    """

    def __init__(self, count: int) -> None:
        self._places = range(count)
        self._all: list[T] | None = None

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, int) or self._all is not None:
            return self._made()[index]
        return self._at(self._places[index])

    def __iter__(self) -> Iterator[T]:
        return iter(self._made())

    def _made(self) -> list[T]:
        # Two threads would make the same twice over, and keep one of them.
        if self._all is None:
            self._all = self._make(self._places)
        return self._all

    def _at(self, places: range) -> Self:
        chosen = object.__new__(type(self))
        chosen.__dict__.update(self.__dict__)
        chosen._places = places
        return chosen

    def _make(self, places: range) -> list[T]:
        raise NotImplementedError


def _rows(table: Sequence[T], places: range, ranks: int) -> Sequence[T]:
    """What a table of blocks has for each of these parts."""
    if ranks > 1 or places.step < 0:
        return [table[place // ranks] for place in places]
    return table[places.start : places.stop : places.step]


class Names(_Made[str]):
    """`names_of`, made when they are looked at."""

    def __init__(self, namespace: str, keys: Sequence[BlockKey], ranks: int) -> None:
        super().__init__(len(keys) * ranks)
        self._namespace, self._keys, self._ranks = namespace, keys, ranks

    def _make(self, places: range) -> list[str]:
        ranks = self._ranks
        return value_names(
            self._namespace, _rows(self._keys, places, ranks), [place % ranks for place in places] if ranks > 1 else repeat(0)
        )


class Values(_Made[Item]):
    """Every rank's part of every block, made when they are looked at: all of ``value_bytes``, all writable or none."""

    def __init__(
        self,
        buffers: SlotBuffers,
        namespace: str,
        slots: Sequence[int],
        keys: Sequence[BlockKey],
        *,
        is_writable: bool,
        envelope: Envelope | None = None,
    ) -> None:
        """For a read writable; for a write not: whoever stores a slot cannot change it. With an ``envelope`` they may be `prove`n.

        Raises InternalError as `SlotBuffers.check`.
        """
        if len(slots) != len(keys):
            raise InternalError(f"{len(slots)} slots and {len(keys)} keys: a value needs one of each")
        super().__init__(len(slots) * buffers.ranks)
        self.value_bytes = buffers.value_bytes
        self.is_writable = is_writable
        self._buffers, self._slots, self._keys, self._envelope = buffers, slots, keys, envelope
        self.proven = bytearray(len(self))
        """1 for each part that was verified where it was received, sound or not; of all parts, also in a slice."""
        self.faults: dict[int, Fault] = {}
        """What is wrong with which of them."""
        self._names = Names(namespace, keys, buffers.ranks)
        buffers.check(slots)

    def _make(self, places: range) -> list[Item]:
        ranks, array = self._buffers.ranks, self._buffers.array
        slots = _rows(self._slots, places, ranks)
        if ranks == 1:
            views = [array(0, slot).data for slot in slots]
        else:
            views = [array(place % ranks, slot).data for place, slot in zip(places, slots, strict=True)]
        if not self.is_writable:
            views = [view.toreadonly() for view in views]
        return list(map(_item, zip(self._names._make(places), views, strict=True)))

    def prove(self, which: Iterable[int], is_stopped: Callable[[], bool]) -> None:
        """Verify these, counted within this slice, or as many as there is time for: by the thread that has just received all their bytes,
        before it lets go of them. Others are received meanwhile; what is not proven here is by whoever asked for it."""
        if self._envelope is None:
            return
        items, ranks = self._made(), self._buffers.ranks
        for index in which:
            if is_stopped():
                return
            place = self._places[index]
            fault = self._envelope.verify(items[index].buffer, self._keys[place // ranks], place % ranks)
            if fault is not None:
                self.faults[place] = fault
            self.proven[place] = 1
