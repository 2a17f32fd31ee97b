"""Copies where the engine's KV cache is ordinary memory (vLLM's CPU backend)."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvoffload.copy.engine import Ids
from kvoffload.copy.plan import plan_of
from kvoffload.errors import CopyError, LayoutError, UnsupportedError
from kvoffload.layout import BlockLayout
from kvoffload.ledger import Ledger
from kvoffload.segment import Segment


class HostCopyEngine:
    """A `CopyEngine` of memcpy loops in native code. Each direction runs one call at a time; the two do not wait for each other.

    ``after`` is ignored: on the CPU backend the step has been computed when the hook that posts the job runs.
    """

    name = "host"

    def __init__(self, layout: BlockLayout, segment: Segment, ledger: Ledger) -> None:
        if layout.device != "cpu":
            raise LayoutError(f"the host engine copies KV in ordinary memory, this is on {layout.device}")
        if segment.slot_bytes != layout.slot_bytes:
            raise LayoutError(f"slots of {segment.slot_bytes} bytes do not fit the layout, which needs {layout.slot_bytes}")
        try:
            from kvoffload.copy import native
        except ImportError as error:
            raise UnsupportedError(f"copying on the CPU backend needs numba, which comes with kvoffload: {error}") from error
        self._native = native
        self._kernels = native.compile_kernels()
        self.block_bytes = layout.payload_bytes
        self.segment = segment
        self._plan = plan_of(layout)
        self._keep: tuple[object, ...] = (layout.keep, segment.array)  # what the plan's addresses point into
        self._segment_address = segment.address
        self._slot_bytes, self._num_slots = segment.slot_bytes, segment.slots
        self._num_blocks = layout.num_blocks
        self._slots_seen = np.zeros(self._num_slots, dtype=np.uint8)
        self._blocks_seen = np.zeros(self._num_blocks, dtype=np.uint8)
        self._saving, self._loading = threading.Lock(), threading.Lock()
        self._closed = False
        self.use_ledger(ledger)

    def use_ledger(self, ledger: Ledger) -> None:
        """See `CopyEngine.use_ledger`. Raises LayoutError when it is for another number of blocks."""
        if ledger.num_blocks != self._num_blocks:
            raise LayoutError(f"a ledger of {ledger.num_blocks} blocks does not fit a layout of {self._num_blocks}")
        with self._saving:
            self._ledger = ledger.array  # held: its memory stays, even when the ledger is closed during a save
            self._ledger_address: int = ledger.array.ctypes.data

    def prepare_slots(self, populated: int, *, at_start: bool = False) -> int:
        """All that are in memory: ordinary memory needs nothing more."""
        return populated

    def mark(self) -> object:
        """Nothing is ever in flight: None."""
        return None

    def save(self, blocks: Ids, slots: Ids, epochs: Ids, after: object = None) -> NDArray[np.bool_]:
        """See `CopyEngine.save`."""
        source, target = _ids(blocks), _ids(slots)
        planned = _ids(epochs).view(np.uint64)
        if not len(source) == len(target) == len(planned):
            raise CopyError(f"a save of {len(source)} blocks into {len(target)} slots with {len(planned)} epochs")
        flags = np.zeros(len(source), dtype=np.bool_)
        with self._saving:
            self._check_open()
            outcome = self._kernels.save(
                self._plan,
                self._segment_address,
                self._slot_bytes,
                self._num_slots,
                self._ledger_address,
                self._num_blocks,
                source,
                target,
                planned,
                self._slots_seen,
                flags,
            )
        if outcome != self._native.OK:
            raise self._refused("save", outcome, source, target)
        return flags

    def load(self, slots: Ids, blocks: Ids, after: object = None) -> None:
        """See `CopyEngine.load`."""
        source, target = _ids(slots), _ids(blocks)
        if len(source) != len(target):
            raise CopyError(f"a load of {len(source)} slots into {len(target)} blocks")
        with self._loading:
            self._check_open()
            outcome = self._kernels.load(
                self._plan,
                self._segment_address,
                self._slot_bytes,
                self._num_slots,
                self._num_blocks,
                source,
                target,
                self._blocks_seen,
            )
        if outcome != self._native.OK:
            raise self._refused("load", outcome, target, source)

    def close(self) -> None:
        """Let go of tensors, segment and ledger, once calls under way have ended. Later calls raise CopyError."""
        with self._saving, self._loading:
            self._closed = True
            self._keep = ()
            self._ledger = np.empty(0, dtype=np.uint64)

    def _check_open(self) -> None:
        if self._closed:
            raise CopyError("the copy engine is closed")

    def _refused(self, what: str, outcome: int, blocks: Ids, slots: Ids) -> CopyError:
        if outcome == self._native.DUPLICATE:
            return CopyError(f"a {what} of {len(blocks)} blocks names a destination twice; nothing was copied")
        limit = self._num_blocks if outcome == self._native.BLOCK_RANGE else self._num_slots
        ids, noun = (blocks, "block") if outcome == self._native.BLOCK_RANGE else (slots, "slot")
        wrong = ids[(ids < 0) | (ids >= limit)]
        return CopyError(f"a {what} names {noun} {wrong[0]}, there are {limit}; nothing was copied")


def _ids(values: ArrayLike | Sequence[int]) -> NDArray[np.int64]:
    """A copy of its own, contiguous: what is checked is what is used, whatever the caller does meanwhile."""
    try:
        ids = np.array(values, dtype=np.int64, order="C")
    except (OverflowError, TypeError, ValueError) as error:
        raise CopyError(f"these are not ids: {error}") from error
    if ids.ndim != 1:
        raise CopyError(f"ids must be one-dimensional, these have shape {ids.shape}")
    return ids
