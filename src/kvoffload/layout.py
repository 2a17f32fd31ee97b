"""Where the bytes of an engine block are, found from the strides of vLLM's KV tensors, and how they lie in a slot.

A block is opaque bytes: each tensor's part of it is one or more *runs*, contiguous stretches that repeat from block to block with a
fixed stride. A slot is ``[64-byte header | runs in order]``, its size rounded up to 4 KiB.
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
        """Layers in registration order, dimension 0 of each being the block.

        Layers that share one tensor (the same memory in the same shape) are copied once. Raises LayoutError for all that it does
        not understand.
        """
        if not kv_caches:
            raise LayoutError("no KV tensors were registered")
        views = [_View.of(name, tensor) for name, tensor in kv_caches.items()]
        devices = {view.device for view in views}
        if len(devices) > 1:
            raise LayoutError(f"the KV tensors are on several devices: {', '.join(sorted(devices))}")
        distinct = {(view.address, view.shape, view.strides, view.itemsize): view for view in reversed(views)}
        runs: list[Run] = []
        for view in views:
            if distinct[view.address, view.shape, view.strides, view.itemsize] is view:
                runs.extend(view.runs(num_blocks))
                if len(runs) > MAX_RUNS:
                    raise LayoutError(f"a block is in more than {MAX_RUNS} pieces: this layout is too fragmented to be copied")
        _refuse_overlaps(runs, num_blocks)
        merged = tuple(_merge(runs))
        payload_bytes = sum(run.size for run in merged)
        return cls(
            num_blocks=num_blocks,
            names=tuple(kv_caches),
            runs=merged,
            payload_bytes=payload_bytes,
            slot_bytes=-(-(HEADER_BYTES + payload_bytes) // SLOT_ALIGNMENT) * SLOT_ALIGNMENT,
            device=views[0].device,
            _digest=_digest_of(views),
            keep=tuple(kv_caches.values()),
        )

    @property
    def alignment(self) -> int:
        """The widest access, 1, 2, 4, 8 or 16 bytes, that every run allows in every block and in every slot of an aligned segment."""
        bits, offset = MAX_ALIGNMENT, HEADER_BYTES
        for run in self.runs:
            bits |= run.address | run.block_stride | run.size | offset
            offset += run.size
        return bits & -bits

    def digest(self) -> bytes:
        """16 bytes, equal where a slot's bytes mean the same: names, shapes without the number of blocks, types, strides."""
        return self._digest


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor in bytes."""

    name: str
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    dtype: str
    device: str

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> _View:
        if isinstance(tensor, np.ndarray):
            address, itemsize, device = tensor.ctypes.data, tensor.itemsize, "cpu"
            strides = tuple(int(stride) for stride in tensor.strides)
        elif hasattr(tensor, "data_ptr") and hasattr(tensor, "stride"):
            address, itemsize, device = tensor.data_ptr(), tensor.element_size(), str(tensor.device)
            strides = tuple(int(stride) * itemsize for stride in tensor.stride())
        else:
            raise LayoutError(
                f"layer {name}: the KV cache is a {type(tensor).__name__}, one tensor is expected (hybrid models are not supported)"
            )
        if device.partition(":")[0] not in ("cpu", "cuda"):
            raise LayoutError(f"layer {name}: KV on device {device!r} is not supported, only cpu and cuda")
        if any(stride % itemsize for stride in strides):
            raise LayoutError(f"layer {name}: strides {strides} are no multiples of the {itemsize} bytes of an element")
        shape = tuple(int(size) for size in tensor.shape)
        return cls(name, int(address), shape, strides, itemsize, str(tensor.dtype).removeprefix("torch."), device)

    def runs(self, num_blocks: int) -> Iterator[Run]:
        if not self.shape or self.shape[0] != num_blocks:
            raise LayoutError(
                f"layer {self.name}: shape {self.shape} does not have the {num_blocks} blocks as dimension 0; "
                "kvoffload knows the layouts of vLLM 0.27 and later"
            )
        if 0 in self.shape:
            raise LayoutError(f"layer {self.name}: shape {self.shape} holds nothing")
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


def _digest_of(views: Sequence[_View]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for view in views:
        first = next(index for index, other in enumerate(views) if other.address == view.address and other.strides == view.strides)
        # The block's own stride counts too: it tells padded pages and blocks outermost from the plain layout.
        digest.update(repr((view.name, view.shape[1:], view.strides, view.itemsize, view.dtype, views[first].name)).encode())
    return digest.digest()
