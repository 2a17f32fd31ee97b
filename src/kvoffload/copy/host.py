"""Copies where the engine's KV cache is ordinary memory (vLLM's CPU backend)."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from kvoffload.copy.engine import Ids
from kvoffload.copy.ids import OK, own_load, own_save, refusal
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
        source, target, planned = own_save(blocks, slots, epochs)
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
        if outcome != OK:
            raise refusal("save", outcome, source, target, self._num_blocks, self._num_slots)
        return flags

    def load(self, slots: Ids, blocks: Ids, after: object = None) -> None:
        """See `CopyEngine.load`."""
        source, target = own_load(slots, blocks)
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
        if outcome != OK:
            raise refusal("load", outcome, target, source, self._num_blocks, self._num_slots)

    def close(self) -> None:
        """Let go of tensors, segment and ledger, once calls under way have ended. Later calls raise CopyError."""
        with self._saving, self._loading:
            self._closed = True
            self._keep = ()
            self._ledger = np.empty(0, dtype=np.uint64)

    def _check_open(self) -> None:
        if self._closed:
            raise CopyError("the copy engine is closed")
