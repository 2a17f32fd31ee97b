"""The start-up proof: before any KV is trusted to a layout, one round trip shows that plan, engine and tensors agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvoffload.copy.engine import CopyEngine
from kvoffload.errors import CopyError, LayoutError
from kvoffload.layout import HEADER_BYTES, BlockLayout, Tensor
from kvoffload.ledger import Ledger
from kvoffload.segment import Segment

Words = NDArray[Any]


def prove(layout: BlockLayout, engine: CopyEngine, tensors: Mapping[str, Tensor], segment: Segment, ledger: Ledger) -> None:
    """Raise LayoutError unless blocks survive block -> slot -> other block, and nothing else is touched.

    Patterns are written and read through each tensor's own dimension 0, never through the plan. Uses two slots (one, if there is
    only one), and blocks other than 0, which must hold nothing that anyone is writing; what they held is put back, also on failure.
    Needs at least 4 blocks.
    """
    count = layout.num_blocks
    if count < 4:
        raise LayoutError(f"{count} blocks are too few to prove the layout, 4 are needed")
    first, second, third = 1, count // 2, count - 1
    watched = sorted({0, *(near for block in (first, second, third) for near in (block - 1, block, block + 1) if near < count)})
    views = {name: _Blocks(tensor) for name, tensor in tensors.items()}
    slots = np.arange(min(2, segment.slots), dtype=np.int64)
    sources = np.array([first, second], dtype=np.int64)[: len(slots)]
    targets = np.array([third, first], dtype=np.int64)[: len(slots)]

    with _put_back(views, watched):
        _fill(views, (first, second, third), np.random.default_rng(0x6B76))
        before = _read(views, watched)
        segment.array[: len(slots) * segment.slot_bytes] = 0xA5
        beyond = segment.array[len(slots) * segment.slot_bytes :][: segment.slot_bytes].copy()
        try:
            _save(engine, sources, slots, ledger)
            if any(segment.slot(int(slot))[:HEADER_BYTES].any() for slot in slots):
                raise LayoutError("the layout proof failed: a save does not clear the header of its slot")
            _expect(views, before, "a save changed the engine's own blocks")
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

    def __init__(self, tensor: Tensor) -> None:
        if isinstance(tensor, np.ndarray):
            self._numpy: Words | None = tensor.view(f"u{tensor.itemsize}")
            return
        import torch

        self._numpy = None
        kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        if not isinstance(tensor, torch.Tensor) or tensor.element_size() not in kinds:
            raise LayoutError(f"the layout proof does not know tensors of {tensor.dtype}")
        self._torch = tensor.view(kinds[tensor.element_size()])

    def read(self, block: int) -> Words:
        if self._numpy is not None:
            return np.array(self._numpy[block])
        words: Words = self._torch[block].cpu().contiguous().numpy().copy()
        return words

    def write(self, block: int, words: Words) -> None:
        if self._numpy is not None:
            self._numpy[block] = words
            return
        import torch

        self._torch[block].copy_(torch.from_numpy(words))


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
