"""KV caches in a GPU's memory without torch, each with a twin in ordinary memory; and a copy engine on them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvoffload.copy.cuda import CudaCopyEngine, Gpu
from kvoffload.copy.engine import CopyEngine, Ids
from kvoffload.cuda.driver import Driver
from kvoffload.cuda.kernels import upload
from kvoffload.cuda.pinned import PinnedSegment
from kvoffload.cuda.settings import GpuCopySettings
from kvoffload.cuda.streams import Stream
from kvoffload.doctor.gpu_layouts import Cache
from kvoffload.layout import BlockLayout
from kvoffload.ledger import Ledger
from kvoffload.segment import Crew, Segment

Bytes = NDArray[np.uint8]


class DeviceMemory:
    """``num_bytes`` of a GPU's memory. Raises CudaError, when it has no more among others."""

    def __init__(self, driver: Driver, num_bytes: int) -> None:
        driver.bind()
        self._driver, self.num_bytes = driver, num_bytes
        self.address = int(driver.call("cuMemAlloc", num_bytes))

    def write(self, content: Bytes) -> None:
        """All of it; done when this returns."""
        self._driver.bind()
        upload(self._driver, self.address, content)

    def read(self, into: Bytes) -> None:
        """All of it; done when this returns."""
        self._driver.bind()
        self._driver.call("cuMemcpyDtoH", into.ctypes.data, self.address, self.num_bytes)

    def fill_async(self, byte: int, stream: Stream) -> None:
        """Done in its place in ``stream``."""
        self._driver.bind()
        self._driver.call("cuMemsetD8Async", self.address, byte, self.num_bytes, stream.handle)

    def close(self) -> None:
        """Give it back. May be called twice."""
        address, self.address = self.address, 0
        if address:
            self._driver.bind()
            self._driver.call("cuMemFree", address)


@dataclass(frozen=True, slots=True)
class DeviceTensor:
    """Bytes in a GPU, as `BlockLayout` takes a tensor."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: str
    dtype: str = "uint8"

    def stride(self) -> tuple[int, ...]:
        return self.strides

    def element_size(self) -> int:
        return 1

    def data_ptr(self) -> int:
        return self.address


def device_layout(driver: Driver, memory: DeviceMemory, cache: Cache) -> BlockLayout:
    """Of ``cache`` in this memory. Raises LayoutError."""
    device = f"cuda:{driver.ordinal}"
    tensors = {tensor.name: DeviceTensor(memory.address + tensor.offset, tensor.shape, tensor.strides, device) for tensor in cache.tensors}
    return BlockLayout.from_tensors(tensors, cache.num_blocks)


class Twins:
    """One KV cache in a GPU, `memory`, and at the same places in ordinary memory, `host`. Raises CudaError and LayoutError."""

    def __init__(self, driver: Driver, cache: Cache) -> None:
        self.cache = cache
        self.host: Bytes = np.zeros(cache.num_bytes, np.uint8)
        self.views: dict[str, NDArray[Any]] = {
            tensor.name: np.lib.stride_tricks.as_strided(self.host[tensor.offset :], tensor.shape, tensor.strides)
            for tensor in cache.tensors
        }
        self.host_layout = BlockLayout.from_tensors(self.views, cache.num_blocks)
        with ExitStack() as undo:
            self.memory = DeviceMemory(driver, cache.num_bytes)
            undo.callback(self.memory.close)
            self.layout = device_layout(driver, self.memory, cache)
            undo.pop_all()

    def push(self) -> None:
        """The GPU's becomes what ordinary memory has."""
        self.memory.write(self.host)

    def pull(self) -> Bytes:
        """What the GPU's memory has."""
        found = np.empty_like(self.host)
        self.memory.read(found)
        return found

    def close(self) -> None:
        self.memory.close()


class Mirrored:
    """A `CopyEngine` for the proof, which looks at ordinary memory: bytes go to the GPU before each copy, and come back after it."""

    def __init__(self, engine: CopyEngine, twins: Twins) -> None:
        self._engine, self._twins = engine, twins
        self.name, self.block_bytes, self.segment = engine.name, engine.block_bytes, engine.segment
        self.use_ledger, self.prepare_slots, self.mark, self.close = engine.use_ledger, engine.prepare_slots, engine.mark, engine.close

    def save(self, blocks: Ids, slots: Ids, epochs: Ids, after: object) -> NDArray[np.bool_]:
        self._twins.push()
        flags = self._engine.save(blocks, slots, epochs, after)
        self._twins.host[:] = self._twins.pull()
        return flags

    def load(self, slots: Ids, blocks: Ids, after: object) -> None:
        self._twins.push()
        self._engine.load(slots, blocks, after)
        self._twins.host[:] = self._twins.pull()


class Rig:
    """A CUDA copy engine between ``layout`` and slots of its own, and the stream that plays the model's.

    `kvoffload.doctor.gpu_proof.obstacle` says whether it can copy as the settings ask. Raises what making an engine raises.
    """

    def __init__(self, ordinal: int, layout: BlockLayout, slots: int, settings: GpuCopySettings, crew: Crew | None = None) -> None:
        with ExitStack() as undo:
            self.segment = Segment.create(slots * layout.slot_bytes, layout.slot_bytes)
            undo.callback(self.segment.close)
            self.segment.populate_next(self.segment.num_bytes, crew)
            self.ledger = Ledger(layout.num_blocks)
            undo.callback(self.ledger.close)
            driver = Driver.open(ordinal)
            undo.callback(driver.close)
            driver.bind()
            self.stream = Stream(driver)
            undo.callback(self.stream.close)
            self.layout, self.driver = layout, driver
            self.pinned = PinnedSegment(driver, self.segment, piece_bytes=settings.pin_piece_bytes, pin=settings.pin)
            undo.callback(self.pinned.close)
            undo.callback(self.settle)
            self.pinned.prepare(slots)
            self._undo = undo.pop_all()

    def engine(self, settings: GpuCopySettings) -> CudaCopyEngine:
        """Several may be made, one after another or at once; to be closed before the rig. Raises CudaError, UnsupportedError."""
        driver = Driver.open(self.driver.ordinal)
        engine = CudaCopyEngine(self.layout, self.segment, self.ledger, Gpu(driver, _Lent(self.pinned), self._handle), settings)
        with ExitStack() as undo:
            undo.callback(engine.close)
            engine.prepare_slots(self.segment.slots, at_start=True)
            undo.pop_all()
        return engine

    def _handle(self) -> int:
        return self.stream.handle

    def settle(self) -> None:
        """Wait for what the stream still does: it may be at memory that goes next. Raises CudaError."""
        self.driver.bind()
        self.stream.synchronize()

    def close(self) -> None:
        """Raises the first CudaError; the rest is given back all the same."""
        self._undo.close()


class _Lent:
    """Pinned memory that outlives the engine."""

    def __init__(self, pinned: PinnedSegment) -> None:
        self._pinned = pinned
        self.device_pointer_is_host_pointer = pinned.device_pointer_is_host_pointer
        self.prepare: Callable[[int], int] = pinned.prepare
        self.is_pinned: Callable[[Ids], NDArray[np.bool_]] = pinned.is_pinned

    def close(self) -> None:
        """It is the rig's."""
