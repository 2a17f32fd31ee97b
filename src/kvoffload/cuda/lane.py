"""One direction of copies: its stream, its descriptors, and what happens when the driver says no."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvoffload.copy.engine import Ids
from kvoffload.cuda import sequence
from kvoffload.cuda.batch import BatchEntry, Order
from kvoffload.cuda.dispatch import Direction, Path
from kvoffload.cuda.driver import CudaError, Driver
from kvoffload.cuda.kernels import GATHER, SCATTER, Kernels
from kvoffload.cuda.settings import GpuCopySettings
from kvoffload.cuda.streams import Event, EventPool, Stream
from kvoffload.errors import EngineLost, UnsupportedError
from kvoffload.observe.logs import get_logger
from kvoffload.segment import Segment

log = get_logger("cuda")

_NOTHING = np.zeros(0, dtype=np.uint64)
_NO_FLAGS = np.zeros(0, dtype=np.bool_)


@dataclass(frozen=True, slots=True)
class Check:
    """What a save compares when its last byte was read: the ledger at ``address`` with ``epochs``, into ``flags``."""

    address: int
    epochs: NDArray[np.uint64]
    flags: NDArray[np.bool_]


class Lane:
    """Copies of one direction, one call at a time. Only ``settings.inflight_bytes`` are under way at once, or one piece.

    Saves are read in the order of the stream, as the engine may still be writing when they are submitted. Loads are read from leased
    slots, which nobody writes until the call has ended: at any time.
    """

    def __init__(
        self,
        direction: Direction,
        driver: Driver,
        batch: BatchEntry,
        events: EventPool,
        plan: NDArray[np.uint64],
        segment: Segment,
        settings: GpuCopySettings,
    ) -> None:
        self.lost: CudaError | None = None
        """Why nothing may be copied any more: it is not known that an earlier copy has ended."""
        self._to_slots = direction is Direction.SAVE
        self._driver, self._batch, self._plan = driver, batch, plan
        self._segment_address, self._slot_bytes = np.uint64(segment.address), np.uint64(segment.slot_bytes)
        self._copy = sequence.compile_sequence()
        self._calls = _addresses(driver)
        self._descriptors = np.empty((2, 3, settings.descriptors_per_call), dtype=np.uint64)
        self._attributes = batch.attributes(Order.STREAM if self._to_slots else Order.ANY)
        self._first_attribute = np.zeros(1, dtype=np.uint64)
        self._fail_index = np.zeros(1, dtype=np.uint64)
        self._window_events = (events.take(), events.take())
        self._words = np.zeros(sequence.LANE_WORDS, dtype=np.uint64)
        self._words[sequence.EVENT_0] = self._window_events[0].handle
        self._words[sequence.EVENT_1] = self._window_events[1].handle
        self._words[sequence.WINDOW_BYTES] = settings.inflight_bytes // 2
        self._words[sequence.ATTRIBUTES] = self._attributes.ctypes.data
        self._words[sequence.ATTRIBUTES_INDEX] = self._first_attribute.ctypes.data
        self._words[sequence.FAIL_INDEX] = self._fail_index.ctypes.data if batch.has_fail_index else 0
        self._kernel, self._parameters = np.zeros(sequence.KERNEL_WORDS, dtype=np.uint64), np.zeros((0, 2), dtype=np.uint64)
        self._parameter_addresses = _NOTHING
        self._items = np.zeros((2, 2, 0), dtype=np.uint64)
        self.has_kernel = False
        self._stream = Stream(driver)
        self._words[sequence.STREAM] = self._stream.handle

    def use_kernels(self, kernels: Kernels, settings: GpuCopySettings) -> None:
        """From now on `copy` can go by the kernel. Raises CudaError when there is no room for the ids."""
        self._items = kernels.allocate_items(settings.descriptors_per_call)
        self._parameters, self._parameter_addresses = kernels.parameters()
        self._kernel[sequence.KERNEL_FUNCTION] = kernels.function(GATHER if self._to_slots else SCATTER)
        self._kernel[sequence.KERNEL_GRID] = settings.kernel_blocks
        self._kernel[sequence.KERNEL_PARAMETERS] = self._parameter_addresses.ctypes.data
        self.has_kernel = True

    def copy(self, path: Path, mark: Event, blocks: Ids, slots: Ids, pinned: NDArray[np.uint8], check: Check | None = None) -> None:
        """Copy behind ``mark``; `Check` is for saves. When this returns or raises CudaError, nothing of it runs any more.

        Raises EngineLost where that cannot be known: then the device may still read and write these slots and blocks. Ids have been
        checked; ``pinned[i]`` is 1 where slot ``slots[i]`` is registered. The context must be bound in this thread.
        """
        check = check or Check(0, _NOTHING, _NO_FLAGS)
        while True:
            failure = self._copy(
                self._calls, self._words, self._descriptors, self._kernel, self._items, self._parameters, self._plan,
                self._segment_address, self._slot_bytes, self._to_slots, self._how(path), np.uint64(mark.handle),
                blocks, slots, pinned, np.uint64(check.address), check.epochs, check.flags,
            )  # fmt: skip
            if not failure:
                return
            error = self._error(*sequence.split_failure(failure))
            if unsettled := int(self._words[sequence.UNSETTLED]):
                self._lose(error, self._error(sequence.SETTLE, unsettled))
            if error.function == "cuLaunchKernel" and self.has_kernel:
                self.has_kernel = False
                log.warning("the copy kernel cannot be started: blocks are copied by DMA from now on", reason=str(error))
            if not self._batch.give_up(error):
                raise error

    def close(self) -> None:
        """Destroy the stream. Nothing may be running. Raises CudaError."""
        self._items = np.zeros((2, 2, 0), dtype=np.uint64)
        self._stream.close()

    def _how(self, path: Path) -> int:
        if path is Path.KERNEL and self.has_kernel:
            return sequence.BY_KERNEL
        self._calls[sequence.BATCH] = self._batch.entry
        return sequence.BY_BATCHES if self._batch.entry else sequence.BY_SINGLES

    def _error(self, function: int, code: int) -> CudaError:
        name, detail = sequence.NAMES[function], ""
        if function == sequence.BATCH and self._batch.has_fail_index and self._fail_index[0] < len(self._descriptors[0, 0]):
            detail = f" at copy {int(self._fail_index[0])} of a batch"
        return self._driver.error(name, code, detail)

    def _lose(self, error: CudaError, then: CudaError) -> None:
        """It is not known that all of a call that failed has ended, so its slots and blocks may not be used for anything else."""
        self.lost = error
        log.error("the GPU does not say whether a copy has ended: nothing is copied any more", reason=str(error), then=str(then))
        raise EngineLost(f"it is not known whether a copy has ended: {error}") from error


def _addresses(driver: Driver) -> NDArray[np.uint64]:
    """Of all that the sequence calls but the batch, which it is told for each call. Compiled code would jump to an address of 0."""
    found = {name: driver.address(name, sequence.SINCE) for name in sequence.NAMES if name != sequence.NAMES[sequence.BATCH]}
    if missing := [name for name, address in found.items() if not address]:
        raise UnsupportedError(f"this driver does not have {', '.join(missing)}: update it")
    return np.array([found.get(name, 0) for name in sequence.NAMES], dtype=np.uint64)
