"""A CUDA copy engine on the stand-in: KV caches in what plays the GPU's memory, and the stream that the engine computes in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.copy.rigs import WAIT_S, Rig
from tests.cuda.standin import Standin

from kvoffload.copy.choose import make_engine
from kvoffload.copy.cuda import CudaCopyEngine
from kvoffload.cuda.settings import GpuCopySettings
from kvoffload.layout import BlockLayout
from kvoffload.ledger import Ledger
from kvoffload.segment import Segment

DMA = GpuCopySettings()
"""Of pieces that are few: `auto` takes the kernel from 16 on."""


@dataclass
class CudaRig(Rig):
    """As `Rig`, on the stand-in. ``stream`` plays torch's current stream; all slots are usable, and pinned where settings say so."""

    standin: Standin
    stream: int
    memory: list[NDArray[Any]]

    @classmethod
    def of(
        cls, standin: Standin, caches: dict[str, NDArray[Any]], slots: int, settings: GpuCopySettings = DMA, *, prepared: bool = True
    ) -> CudaRig:
        blocks = next(iter(caches.values())).shape[0]
        memory = {id(base): base for base in (_base_of(cache) for cache in caches.values())}
        for base in memory.values():
            standin.device_memory(base)
        layout = replace(BlockLayout.from_tensors(caches, blocks), device="cuda:0")
        segment = Segment.create(slots * layout.slot_bytes, layout.slot_bytes)
        ledger = Ledger(blocks)
        stream = standin.engine_stream()
        engine = make_engine(layout, segment, ledger, settings, lambda: stream)
        rig = cls(caches, layout, segment, ledger, engine, standin, stream, list(memory.values()))
        if prepared:
            while segment.populated_slots < segment.slots:
                segment.populate_next()
            assert engine.prepare_slots(segment.slots, at_start=True) == segment.slots
        return rig

    @classmethod
    def plain(
        cls, standin: Standin, settings: GpuCopySettings = DMA, *, blocks: int = 8, slots: int = 8, layers: int = 3,
        shape: tuple[int, ...] = (2, 8, 16), prepared: bool = True,
    ) -> CudaRig:  # fmt: skip
        """``caches[layer]`` is (blocks, *shape) uint8, random, each layer in an allocation of its own; addresses are aligned."""
        random = np.random.default_rng(1)
        caches = {f"layers.{number}": aligned((blocks, *shape)) for number in range(layers)}
        for cache in caches.values():
            cache[:] = random.integers(0, 256, cache.shape, dtype=np.uint8)
        return cls.of(standin, caches, slots, settings, prepared=prepared)

    def close(self) -> None:
        for state in self.standin.streams():
            self.standin.release(state.handle)  # where a test that failed has left them held
        self.standin.wait_idle(self.stream)  # a mark that is still to come keeps its event
        super().close()
        for array in self.memory:
            self.standin.forget(array)
        self.memory = []

    @property
    def cuda(self) -> CudaCopyEngine:
        assert isinstance(self.engine, CudaCopyEngine)
        return self.engine

    def lane(self, what: str) -> int:
        """Handle of the engine's own stream for "save" or "load": they are made in this order."""
        own = [state.handle for state in self.standin.streams() if not state.is_control]
        return own[("save", "load").index(what)]

    def write_block(self, number: int, byte: int) -> None:
        """A kernel of the engine, in its stream: every byte of the block becomes this."""
        for cache in self.caches.values():
            self.standin.write(self.stream, cache[number], np.full(cache[number].shape, byte, np.uint8))


def aligned(shape: tuple[int, ...], alignment: int = 4096) -> NDArray[np.uint8]:
    """Zeros at an address such as cudaMalloc gives. Its base holds more than it."""
    size = int(np.prod(shape))
    memory = np.zeros(size + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + size].reshape(shape)


def _base_of(array: NDArray[Any]) -> NDArray[Any]:
    """The memory that an array is a view of."""
    memory: Any = array
    while getattr(memory, "base", None) is not None:  # strided views have something in between that is no array
        memory = memory.base
    assert isinstance(memory, np.ndarray)
    return memory


class Running:
    """A call in a thread of its own, as the copy threads make it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:
            self._error = error

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> Any:
        """Wait for its end; raises what it raised."""
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive(), "still running"
        if self._error is not None:
            raise self._error
        return self._result
