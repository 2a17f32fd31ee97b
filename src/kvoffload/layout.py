"""Where the bytes of an engine block are, found from the strides of vLLM's KV tensors, and how they lie in a slot.

A block is opaque bytes: each tensor's part of it is one or more *runs*, contiguous stretches that repeat from block to block with a
fixed stride. A slot is ``[64-byte header | runs in order]``, its size rounded up to 4 KiB. The order is that of registration; tensors
that lie in between each other in memory (blocks outermost) are one run after another as in memory, so that they join.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any, Protocol

import numpy as np

from kvoffload.errors import LayoutError

HEADER_BYTES = 64
SLOT_ALIGNMENT = 4096
MAX_ALIGNMENT = 16
"""Bytes of the widest access that a GPU has."""
MAX_RUNS = 1 << 16
"""A block in more pieces than this is refused: it would be copied at a crawl."""


class TorchLike(Protocol):
    """What of a torch tensor is used; numpy arrays are taken as well."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> Any: ...
    @property
    def device(self) -> Any: ...
    def stride(self) -> Sequence[int]: ...
    def element_size(self) -> int: ...
    def data_ptr(self) -> int: ...


Tensor = TorchLike | np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """``size`` bytes at ``address + block * block_stride``."""

    address: int
    block_stride: int
    size: int


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """The runs of one engine block, in the order in which they lie in a slot behind its header."""

    num_blocks: int
    names: tuple[str, ...]
    runs: tuple[Run, ...]
    payload_bytes: int
    slot_bytes: int
    device: str
    _digest: bytes = field(repr=False)
    keep: tuple[object, ...] = field(repr=False, compare=False)
    """The tensors: the addresses are good for as long as this is held."""

    @classmethod
    def from_tensors(cls, kv_caches: Mapping[str, Tensor], num_blocks: int) -> BlockLayout:
        """Layers in registration order; where the blocks are in each, `block_axis` says.

        Layers that share one tensor (the same memory in the same shape) are copied once. What lies between blocks and belongs to no
        tensor (padding) is not copied. Raises LayoutError for all that it does not understand.
        """
        if not kv_caches:
            raise LayoutError("no KV tensors were registered")
        views = [_View.of(name, tensor, num_blocks) for name, tensor in kv_caches.items()]
        devices = {view.device for view in views}
        if len(devices) > 1:
            raise LayoutError(f"the KV tensors are on several devices: {', '.join(sorted(devices))}")
        seen: dict[object, int] = {}
        copied_as = [seen.setdefault(view.place, index) for index, view in enumerate(views)]
        regions = _regions(views)
        pieces: list[_Piece] = []
        for index, view in enumerate(views):
            if copied_as[index] == index:
                pieces.extend(_Piece(regions[index], index, number, run) for number, run in enumerate(view.runs()))
                if len(pieces) > MAX_RUNS:
                    raise LayoutError(f"a block is in more than {MAX_RUNS} pieces: this layout is too fragmented to be copied")
        _refuse_overlaps([piece.run for piece in pieces], num_blocks)
        pieces.sort(key=lambda piece: (piece.region, piece.run.address))
        merged = tuple(_merge([piece.run for piece in pieces]))
        payload_bytes = sum(run.size for run in merged)
        return cls(
            num_blocks=num_blocks,
            names=tuple(kv_caches),
            runs=merged,
            payload_bytes=payload_bytes,
            slot_bytes=-(-(HEADER_BYTES + payload_bytes) // SLOT_ALIGNMENT) * SLOT_ALIGNMENT,
            device=views[0].device,
            _digest=_digest_of(views, copied_as, pieces),
            keep=tuple(kv_caches.values()),
        )

    @property
    def alignment(self) -> int:
        """The widest access, 1, 2, 4, 8 or 16 bytes, that every run allows in every block and in every slot of an aligned segment."""
        bits = MAX_ALIGNMENT | HEADER_BYTES
        for run in self.runs:  # offsets in a slot are the header and sizes of others
            bits |= run.address | run.block_stride | run.size
        return bits & -bits

    def digest(self) -> bytes:
        """16 bytes, equal where a slot's bytes mean the same: names, types, shapes and strides of a block, the order in the slot.

        The number of blocks, and with it what lies outside of a block, does not count.
        """
        return self._digest


def block_axis(name: str, shape: Sequence[int], num_blocks: int) -> tuple[int, int]:
    """The dimension of a KV tensor that counts blocks, and how many of its rows are one block.

    Since 0.29 vLLM's tensors are ``[blocks, heads, tokens, content]``; before, K and V could be apart: ``[2, blocks, ...]``. Where the
    attention kernel wants smaller blocks than the scheduler's, each of these is as many rows one behind the other. Raises LayoutError
    for anything else, and for what could be either.
    """
    if 0 in shape:
        raise LayoutError(f"layer {name}: shape {tuple(shape)} holds nothing")
    found = [axis for axis, count in enumerate(shape[:2]) if count % num_blocks == 0 and (axis == 0 or shape[0] == 2)]
    if len(found) == 2:
        raise LayoutError(f"layer {name}: in shape {tuple(shape)} the {num_blocks} blocks could be dimension 0 or 1")
    if not found:
        raise LayoutError(
            f"layer {name}: shape {tuple(shape)} does not have the {num_blocks} blocks, or a multiple of them, as dimension 0 "
            "(or as 1, behind K and V): this layout is not known"
        )
    rows = shape[found[0]] // num_blocks
    if rows > 1 and len(shape) < found[0] + 3:
        raise LayoutError(f"layer {name}: shape {tuple(shape)} does not tell how {num_blocks} blocks lie in it")
    return found[0], rows


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor in bytes, its blocks as dimension 0; where a block is several rows, these are dimension 1."""

    name: str
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    dtype: str
    device: str
    axis: int

    @classmethod
    def of(cls, name: str, tensor: Tensor, num_blocks: int) -> _View:
        if isinstance(tensor, np.ndarray):
            address, itemsize, device = tensor.ctypes.data, tensor.itemsize, "cpu"
            strides = [int(stride) for stride in tensor.strides]
        elif hasattr(tensor, "data_ptr") and hasattr(tensor, "stride"):
            address, itemsize, device = tensor.data_ptr(), tensor.element_size(), str(tensor.device)
            strides = [int(stride) * itemsize for stride in tensor.stride()]
        else:
            raise LayoutError(
                f"layer {name}: the KV cache is a {type(tensor).__name__}, one tensor is expected (hybrid models are not supported)"
            )
        if device.partition(":")[0] not in ("cpu", "cuda"):
            raise LayoutError(f"layer {name}: KV on device {device!r} is not supported, only cpu and cuda")
        if any(stride % itemsize for stride in strides):
            raise LayoutError(f"layer {name}: strides {tuple(strides)} are no multiples of the {itemsize} bytes of an element")
        shape = [int(size) for size in tensor.shape]
        axis, rows = block_axis(name, shape, num_blocks)
        stride = strides.pop(axis)
        del shape[axis]
        if rows > 1:
            shape.insert(0, rows)
            strides.insert(0, stride)
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls(name, int(address), (num_blocks, *shape), (stride * rows, *strides), itemsize, dtype, device, axis)

    @property
    def place(self) -> object:
        return self.address, self.shape, self.strides, self.itemsize

    @property
    def end(self) -> int:
        return self.address + sum(stride * (count - 1) for stride, count in zip(self.strides, self.shape, strict=True)) + self.itemsize

    def runs(self) -> Iterator[Run]:
        """In order of address."""
        size = self.itemsize
        outer: list[list[int]] = []
        # From the smallest stride to the largest, a dimension must lie wholly inside one step of the next: then no byte is shared.
        span = self.itemsize
        dimensions = [(stride, count, axis) for axis, (stride, count) in enumerate(zip(self.strides, self.shape, strict=True)) if count > 1]
        for stride, count, axis in sorted(dimensions):
            if stride < span:
                raise LayoutError(
                    f"layer {self.name}: elements overlap or run backwards (shape {self.shape}, strides {self.strides} bytes)"
                )
            span += stride * (count - 1)
            if axis == 0:
                continue
            if stride == size and not outer:
                size *= count
            else:
                outer.append([step * stride for step in range(count)])
        pieces = 1
        for steps in outer:
            pieces *= len(steps)
        if pieces > MAX_RUNS:
            raise LayoutError(f"layer {self.name}: one block is in {pieces} pieces, at most {MAX_RUNS} are copied")
        for offsets in product(*reversed(outer)):
            yield Run(self.address + sum(offsets), self.strides[0], size)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run before it is joined to others: the ``number``-th of view ``view``."""

    region: int
    view: int
    number: int
    run: Run


def _regions(views: Sequence[_View]) -> list[int]:
    """For each view the first one of those that lie in between each other in memory; most often that is the view alone."""
    found = list(range(len(views)))
    end, together = 0, list[int]()
    for index in sorted(range(len(views)), key=lambda index: views[index].address):
        if views[index].address >= end:
            together = []
        together.append(index)
        end = max(end, views[index].end)
        for member in together:
            found[member] = min(together)
    return found


def _merge(runs: Sequence[Run]) -> Iterator[Run]:
    """Join a run to the one before it where it goes on right behind it in every block."""
    last = runs[0]
    for run in runs[1:]:
        if run.address == last.address + last.size and run.block_stride == last.block_stride:
            last = Run(last.address, last.block_stride, last.size + run.size)
        else:
            yield last
            last = run
    yield last


def _refuse_overlaps(runs: Sequence[Run], num_blocks: int) -> None:
    """Raise LayoutError where tensors may share bytes. Runs whose spans over all blocks meet must interleave with one stride."""
    end, group = 0, list[Run]()
    for run in sorted(runs, key=lambda run: run.address):
        if group and run.address >= end:
            _refuse_overlaps_in(group)
            group = []
        group.append(run)
        end = max(end, run.address + (num_blocks - 1) * run.block_stride + run.size)
    _refuse_overlaps_in(group)


def _refuse_overlaps_in(group: Sequence[Run]) -> None:
    if len(group) == 1:
        return
    stride, origin = group[0].block_stride, group[0].address
    # On the circle of one block stride every run must have its own arc.
    arcs = sorted(((run.address - origin) % stride if stride else run.address - origin, run.size) for run in group)
    ends_apart = all(first + size <= second for (first, size), (second, _) in pairwise(arcs))
    wraps = arcs[-1][0] + arcs[-1][1] > stride + arcs[0][0] if stride else False
    if any(run.block_stride != stride for run in group) or not ends_apart or wraps:
        raise LayoutError("KV tensors of different layers lie over each other in memory: this layout is not known")


def _digest_of(views: Sequence[_View], copied_as: Sequence[int], pieces: Sequence[_Piece]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for index, view in enumerate(views):
        # The block's own stride counts too: it tells padded pages and blocks outermost from the plain layout. A stride beyond it
        # (K apart from V, heads outside of blocks) only says how many blocks there are, beside its place in the order.
        block_stride, *strides = view.strides
        inside = [min(stride, block_stride) if count > 1 else 0 for count, stride in zip(view.shape[1:], strides, strict=True)]
        order = sorted(range(len(inside)), key=lambda axis: strides[axis] if inside[axis] else 0)
        known = (view.name, view.axis, view.shape[1:], inside, order, block_stride, view.itemsize, view.dtype, views[copied_as[index]].name)
        digest.update(repr(known).encode())
    digest.update(np.array([(piece.view, piece.number, piece.run.size) for piece in pieces], dtype="<i8").tobytes())
    return digest.digest()
