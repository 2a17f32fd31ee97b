"""The start-up proof: before any KV is trusted to a layout, one round trip shows that plan, engine and tensors agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvoffload.copy.engine import CopyEngine
from kvoffload.errors import CopyError, LayoutError
from kvoffload.layout import HEADER_BYTES, BlockLayout, Tensor, block_axis
from kvoffload.ledger import Ledger
from kvoffload.segment import Segment

Words = NDArray[Any]
UNTOUCHED = 0xA5
"""In every byte of a slot before the first save."""


def prove(layout: BlockLayout, engine: CopyEngine, tensors: Mapping[str, Tensor], segment: Segment, ledger: Ledger) -> None:
    """Raise LayoutError unless blocks survive block -> slot -> other block, and nothing else is touched.

    Patterns are written and read through each tensor's own block dimension, never through the plan; and a slot must hold the bytes of
    each tensor where they belong, which is what engines that share blocks rely on. As the plan is exactly as long as the blocks of all
    tensors, it touches nothing else, such as padding. Uses two slots (one, if there is only one), and blocks other than 0, which must
    hold nothing that anyone is writing; what they held is put back, also on failure. Needs at least 4 blocks.
    """
    count = layout.num_blocks
    if count < 4:
        raise LayoutError(f"{count} blocks are too few to prove the layout, 4 are needed")
    first, second, third = 1, count // 2, count - 1
    watched = sorted({0, *(near for block in (first, second, third) for near in (block - 1, block, block + 1) if near < count)})
    views = {name: _Blocks(name, tensor, count) for name, tensor in tensors.items()}
    in_slot = _SlotOrder(views)
    planned = sum(run.size for run in layout.runs)
    if not in_slot.total_bytes == planned == layout.payload_bytes:
        raise LayoutError(f"the layout proof failed: a block has {in_slot.total_bytes} bytes, and {planned} are copied")
    slots = np.arange(min(2, segment.slots), dtype=np.int64)
    sources = np.array([first, second], dtype=np.int64)[: len(slots)]
    targets = np.array([third, first], dtype=np.int64)[: len(slots)]

    with _put_back(views, watched):
        _fill(views, (first, second, third), np.random.default_rng(0x6B76))
        before = _read(views, watched)
        segment.array[: len(slots) * segment.slot_bytes] = UNTOUCHED
        beyond = segment.array[len(slots) * segment.slot_bytes :][: segment.slot_bytes].copy()
        try:
            _save(engine, sources, slots, ledger)
            if any(segment.slot(int(slot))[:HEADER_BYTES].any() for slot in slots):
                raise LayoutError("the layout proof failed: a save does not clear the header of its slot")
            _expect(views, before, "a save changed the engine's own blocks")
            for source, slot in zip(sources.tolist(), slots.tolist(), strict=True):
                held = segment.slot(slot)[HEADER_BYTES:]
                if held[: layout.payload_bytes].tobytes() != in_slot.payload({name: before[name, source] for name in views}):
                    raise LayoutError("the layout proof failed: a slot does not hold a block's bytes in their order")
                if (held[layout.payload_bytes :] != UNTOUCHED).any():
                    raise LayoutError("the layout proof failed: a save wrote behind a block's bytes")
            engine.load(slots, targets, engine.mark())
        except CopyError as error:
            raise LayoutError(f"the layout proof failed: {engine.name} engine: {error}") from error
        finally:
            segment.array[: len(slots) * segment.slot_bytes] = 0
        after = dict(before)
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            for name in views:
                after[name, target] = before[name, source]
        _expect(views, after, "block -> slot -> block does not give the block's own bytes, or touches others")
        if not np.array_equal(beyond, segment.array[len(slots) * segment.slot_bytes :][: segment.slot_bytes]):
            raise LayoutError("the layout proof failed: a copy wrote beyond its slot")


def _save(engine: CopyEngine, sources: NDArray[np.int64], slots: NDArray[np.int64], ledger: Ledger) -> None:
    epochs = np.array(ledger.epochs(sources.tolist()), dtype=np.int64)
    if engine.save(sources, slots, epochs + 1, engine.mark()).any():
        raise LayoutError("the layout proof failed: a save with the wrong epoch was not noticed")
    if not engine.save(sources, slots, epochs, engine.mark()).all():
        raise LayoutError("the layout proof failed: the ledger changed while nothing else runs, or is read in the wrong place")


class _Blocks:
    """One tensor as blocks of unsigned integers as wide as its elements: patterns pass bit by bit, whatever the type."""

    def __init__(self, name: str, tensor: Tensor, num_blocks: int) -> None:
        axis, rows = block_axis(name, tensor.shape, num_blocks)
        if isinstance(tensor, np.ndarray):
            words = np.moveaxis(tensor.view(f"u{tensor.itemsize}"), axis, 0)
            shape, strides = words.shape[1:], words.strides
            self._numpy: Words | None = np.lib.stride_tricks.as_strided(
                words, (num_blocks, rows, *shape), (strides[0] * rows, strides[0], *strides[1:])
            )
            self.address, self.strides = tensor.ctypes.data, self._numpy.strides
        else:
            import torch

            kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
            if not isinstance(tensor, torch.Tensor) or tensor.element_size() not in kinds:
                raise LayoutError(f"the layout proof does not know tensors of {tensor.dtype}")
            self._numpy = None
            self._torch = tensor.view(kinds[tensor.element_size()]).movedim(axis, 0).unflatten(0, (num_blocks, rows))
            self.address, self.strides = tensor.data_ptr(), tuple(stride * tensor.element_size() for stride in self._torch.stride())
        self.shape = tuple(self._torch.shape if self._numpy is None else self._numpy.shape)
        self.itemsize = tensor.itemsize if isinstance(tensor, np.ndarray) else tensor.element_size()

    def read(self, block: int) -> Words:
        if self._numpy is not None:
            return np.array(self._numpy[block], order="C")
        words: Words = self._torch[block].cpu().contiguous().numpy().copy()
        return words

    def write(self, block: int, words: Words) -> None:
        if self._numpy is not None:
            self._numpy[block] = words
            return
        import torch

        self._torch[block].copy_(torch.from_numpy(words))

    def stretches(self) -> tuple[NDArray[np.int64], int]:
        """Addresses of block 0, one for each entry of all dimensions but the last if that is dense; and the bytes at each."""
        shape, strides, size = self.shape[1:], self.strides[1:], self.itemsize
        if strides[-1] == size:
            size *= shape[-1]
            shape, strides = shape[:-1], strides[:-1]
        addresses = np.full(shape, self.address, dtype=np.int64)
        for axis, (length, stride) in enumerate(zip(shape, strides, strict=True)):
            addresses += (np.arange(length) * stride).reshape([-1 if other == axis else 1 for other in range(len(shape))])
        return addresses.reshape(-1), size

    @property
    def end(self) -> int:
        last: int = sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True))
        return self.address + last + self.itemsize


class _SlotOrder:
    """How the bytes of a block lie in a slot: tensors as registered, those in between each other in memory by address."""

    def __init__(self, views: Mapping[str, _Blocks]) -> None:
        places: dict[object, str] = {}
        for name, view in views.items():
            places.setdefault((view.address, view.shape, view.strides), name)
        self._names = list(places.values())
        spans = [(views[name].address, views[name].end) for name in self._names]
        keys, self._where = list[tuple[int, int]](), list[tuple[int, int, int]]()
        for index, name in enumerate(self._names):
            addresses, size = views[name].stretches()
            region = self._first_of_region(index, spans)
            keys.extend((region, address) for address in addresses.tolist())
            self._where.extend((index, start, start + size) for start in range(0, size * len(addresses), size))
        self._order = sorted(range(len(keys)), key=keys.__getitem__)
        self.total_bytes = sum(end - start for _, start, end in self._where)

    @staticmethod
    def _first_of_region(index: int, spans: list[tuple[int, int]]) -> int:
        (start, end), grew = spans[index], True
        while grew:
            reached = [(low, high) for low, high in spans if low < end and start < high]
            wider = min(low for low, _ in reached), max(high for _, high in reached)
            grew = wider != (start, end)
            start, end = wider
        return next(number for number, (low, high) in enumerate(spans) if low < end and start < high)

    def payload(self, blocks: Mapping[str, Words]) -> bytes:
        """Of a slot that holds these blocks, by tensor name."""
        raw = [memoryview(blocks[name].tobytes()) for name in self._names]
        return b"".join(raw[index][start:end] for index, start, end in (self._where[number] for number in self._order))


_State = dict[tuple[str, int], Words]


def _read(views: Mapping[str, _Blocks], blocks: list[int]) -> _State:
    return {(name, block): view.read(block) for name, view in views.items() for block in blocks}


def _fill(views: Mapping[str, _Blocks], blocks: tuple[int, ...], random: np.random.Generator) -> None:
    for view in views.values():
        for block in blocks:
            old = view.read(block)
            view.write(block, np.frombuffer(random.bytes(old.nbytes), dtype=old.dtype).reshape(old.shape).copy())


@contextmanager
def _put_back(views: Mapping[str, _Blocks], blocks: list[int]) -> Iterator[None]:
    originals = _read(views, blocks)
    try:
        yield
    finally:
        for (name, block), words in originals.items():
            views[name].write(block, words)


def _expect(views: Mapping[str, _Blocks], state: _State, otherwise: str) -> None:
    for (name, block), words in state.items():
        if not np.array_equal(views[name].read(block), words):
            raise LayoutError(f"the layout proof failed at block {block} of {name}: {otherwise}")
