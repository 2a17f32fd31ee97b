"""Copies where the engine's KV cache is in a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from kvoffload.copy.engine import Ids
from kvoffload.copy.ids import OK, own_load, own_save, refusal
from kvoffload.copy.plan import plan_of
from kvoffload.cuda.batch import BatchEntry
from kvoffload.cuda.dispatch import Direction, DispatchTable, Path
from kvoffload.cuda.driver import CudaError, Driver
from kvoffload.cuda.kernels import Kernels
from kvoffload.cuda.settings import CopyMode, GpuCopySettings
from kvoffload.cuda.streams import Event, EventPool
from kvoffload.errors import CopyError, EngineLost, LayoutError, UnsupportedError
from kvoffload.layout import BlockLayout
from kvoffload.ledger import Ledger
from kvoffload.observe.logs import get_logger
from kvoffload.segment import Segment

if TYPE_CHECKING:
    from kvoffload.cuda.lane import Check  # which brings numba

log = get_logger("cuda")

_CAPTURED = "a CUDA graph was being captured when it was marked: what a graph computes is saved when it is replayed"

_lost_engines: list[CudaCopyEngine] = []
"""A copy of theirs may still be under way: they hold tensors and slots to the end of the process."""


class Pinned(Protocol):
    """The segment as the GPU sees it. `kvoffload.cuda.pinned.PinnedSegment` is one."""

    device_pointer_is_host_pointer: bool
    """Whether kernels may use the host's addresses of what is registered."""

    def prepare(self, populated: int) -> int:
        """Register what is complete of ``populated`` slots; how many, from the first on, may be used."""
        ...

    def is_pinned(self, slots: Ids) -> NDArray[np.bool_]:
        """Which of these slots are registered. Does not change for a slot in use."""
        ...

    def close(self) -> None:
        """Unregister all."""
        ...


@dataclass(frozen=True, slots=True)
class Gpu:
    """What the engine copies with. It belongs to the engine that is made of it, which closes it."""

    driver: Driver
    pinned: Pinned
    current_stream: Callable[[], int]
    """On vLLM's thread: the CUstream that the model computes in."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What `CudaCopyEngine.mark` gives: an event, or why there is none."""

    event: Event | None
    reason: str = ""


class CudaCopyEngine:
    """A `CopyEngine` over the CUDA driver, with a stream for each direction. A call blocks its thread, interpreter lock released.

    Needs no torch itself. Holds tensors and segment until closed. Made and closed where no graph is being captured.
    """

    name = "cuda"

    def __init__(self, layout: BlockLayout, segment: Segment, ledger: Ledger, gpu: Gpu, settings: GpuCopySettings) -> None:
        with ExitStack() as stack:
            stack.callback(_close, "context", gpu.driver.close)
            stack.callback(_close, "pinned memory", gpu.pinned.close)
            if layout.device.partition(":")[0] != "cuda":
                raise LayoutError(f"the CUDA engine copies KV in a GPU, this is on {layout.device}")
            if segment.slot_bytes != layout.slot_bytes:
                raise LayoutError(f"slots of {segment.slot_bytes} bytes do not fit the layout, which needs {layout.slot_bytes}")
            try:
                from kvoffload.copy import native
                from kvoffload.cuda import lane as lanes
            except ImportError as error:
                raise UnsupportedError(f"copying needs numba, which comes with kvoffload: {error}") from error
            self._check_ids, self._new_check = native.compile_check(), lanes.Check
            self.block_bytes = layout.payload_bytes
            self.segment = segment
            self._driver, self._pinned = gpu.driver, gpu.pinned
            self.gpu = gpu
            self._keep: tuple[object, ...] = (layout.keep, segment.array)  # what the plan's addresses point into
            self._num_blocks, self._num_slots = layout.num_blocks, segment.slots
            self._runs, self._piece_bytes = len(layout.runs), layout.payload_bytes // len(layout.runs)
            self.table = DispatchTable(settings)
            self._slots_seen = np.zeros(self._num_slots, dtype=np.uint8)
            self._blocks_seen = np.zeros(self._num_blocks, dtype=np.uint8)
            self._saving, self._loading = threading.Lock(), threading.Lock()
            self._marking = threading.Lock()  # so that no event goes between being taken and being recorded
            self._closed = False
            self._has_stepped, self._usable = False, 0
            self.use_ledger(ledger)
            gpu.driver.bind()
            self._events = EventPool(gpu.driver)
            stack.callback(_close, "events", self._events.close)
            plan = plan_of(layout)
            batch = BatchEntry(gpu.driver, use_batches=settings.copy is not CopyMode.SINGLE)
            self._lanes = {}
            for direction in Direction:
                lane = lanes.Lane(direction, gpu.driver, batch, self._events, plan, segment, settings)
                stack.callback(_close, f"stream of {direction.value}s", lane.close)
                self._lanes[direction] = lane
            self._load_kernels(layout, plan, settings, stack)
            self._give_back = stack.pop_all()

    def _load_kernels(self, layout: BlockLayout, plan: NDArray[np.uint64], settings: GpuCopySettings, stack: ExitStack) -> None:
        wanted = [direction for direction in Direction if self.table.may_choose_kernel(direction, self._piece_bytes)]
        if not wanted:
            return
        try:
            kernels = Kernels(self._driver, layout, plan, self.segment)
        except (UnsupportedError, CudaError) as error:
            log.warning("blocks are copied by DMA only, which is slow towards the GPU where pieces are small", reason=str(error))
            return
        stack.callback(_close, "kernels", kernels.close)
        try:
            for direction in wanted:
                self._lanes[direction].use_kernels(kernels, settings)
        except CudaError as error:
            log.warning("no memory for the copy kernel: blocks are copied by DMA", reason=str(error))

    def use_ledger(self, ledger: Ledger) -> None:
        """See `CopyEngine.use_ledger`. Raises LayoutError when it is for another number of blocks."""
        if ledger.num_blocks != self._num_blocks:
            raise LayoutError(f"a ledger of {ledger.num_blocks} blocks does not fit a layout of {self._num_blocks}")
        with self._saving:
            self._ledger = ledger.array  # held: its memory stays, even when the ledger is closed during a save
            self._ledger_address: int = ledger.array.ctypes.data
            self._has_stepped = False  # marks until now were the proof's

    def prepare_slots(self, populated: int, *, at_start: bool = False) -> int:
        """See `CopyEngine.prepare_slots`. Registering memory while any thread captures a graph would spoil the graph."""
        if at_start:
            self._has_stepped = False
        elif not self._has_stepped:
            return self._usable
        if not self._closed:
            with self._driver.pushed(), self._driver.relaxed():
                self._usable = self._pinned.prepare(populated)
        return self._usable

    def mark(self) -> Mark:
        """See `CopyEngine.mark`: an event behind all that the current stream has been given. None is recorded into a graph."""
        if self._closed:
            return Mark(None, "the copy engine is closed")
        try:
            stream = self.gpu.current_stream()
            with self._marking:
                if self._closed:
                    return Mark(None, "the copy engine is closed")
                with self._driver.pushed():
                    if int(self._driver.call("cuStreamIsCapturing", stream)):
                        return Mark(None, _CAPTURED)
                    event = self._events.take()
                    self._events.record(event, stream)
        except (CudaError, RuntimeError) as error:  # in vLLM's thread nothing is raised: the copy that comes with it will be
            return Mark(None, f"what it was to come after could not be marked: {error}")
        self._has_stepped = True
        return Mark(event)

    def save(self, blocks: Ids, slots: Ids, epochs: Ids, after: object) -> NDArray[np.bool_]:
        """See `CopyEngine.save`."""
        source, target, planned = own_save(blocks, slots, epochs)
        flags = np.zeros(len(source), dtype=np.bool_)
        with self._saving:
            self._check_usable()
            self._refuse("save", source, target, target, self._slots_seen)
            if len(source):
                check = self._new_check(self._ledger_address, planned, flags)
                self._run(Direction.SAVE, after, source, target, check)
        return flags

    def load(self, slots: Ids, blocks: Ids, after: object) -> None:
        """See `CopyEngine.load`."""
        source, target = own_load(slots, blocks)
        with self._loading:
            self._check_usable()
            self._refuse("load", target, source, target, self._blocks_seen)
            if len(source):
                self._run(Direction.LOAD, after, target, source)

    def close(self) -> None:
        """Give all back, once calls under way have ended. Later calls raise CopyError. Never raises; may be called twice."""
        with self._saving, self._loading:
            if self._closed:
                return
            with self._marking:
                self._closed = True
            if any(lane.lost for lane in self._lanes.values()):
                log.error("memory and streams are left to the end of the process: a copy may still be under way")
                return
            _close("context", self._driver.bind)
            self._give_back.close()
            self._keep = ()
            self._ledger = np.empty(0, dtype=np.uint64)

    def _run(self, direction: Direction, after: object, blocks: Ids, slots: Ids, check: Check | None = None) -> None:
        if not isinstance(after, Mark):
            raise CopyError(f"a {direction.value} comes after a mark of this engine, not after {after!r}")
        if after.event is None:
            raise CopyError(f"nothing was copied: {after.reason}")
        if after.event.pool is not self._events:
            raise CopyError(f"a {direction.value} comes after a mark of this engine, not after another's")
        self._driver.bind()
        pinned = self._pinned.is_pinned(slots).astype(np.uint8)
        path = Path.DMA
        if self._pinned.device_pointer_is_host_pointer:
            path = self.table.choose(direction, self._piece_bytes, len(slots) * self._runs)
        try:
            self._lanes[direction].copy(path, after.event, blocks, slots, pinned, check)
        except EngineLost:  # whoever let go of it would unmap what the device may still write
            _lost_engines.append(self)
            raise

    def _refuse(self, what: str, blocks: Ids, slots: Ids, targets: Ids, seen: NDArray[np.uint8]) -> None:
        outcome = self._check_ids(blocks, slots, self._num_blocks, self._num_slots, targets, seen)
        if outcome != OK:
            raise refusal(what, outcome, blocks, slots, self._num_blocks, self._num_slots)

    def _check_usable(self) -> None:
        if self._closed:
            raise CopyError("the copy engine is closed")
        for lane in self._lanes.values():
            if lane.lost is not None:
                raise CopyError(f"the GPU's copy engine is lost, nothing is copied any more: {lane.lost}")


def _close(what: str, close: Callable[[], None]) -> None:
    try:
        close()
    except CudaError as error:
        log.warning("not given back to the GPU", what=what, reason=str(error))
