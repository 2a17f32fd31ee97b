"""What tests of copies share: KV caches of any layout in guarded memory, and an engine on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvoffload.copy.engine import CopyEngine
from kvoffload.copy.host import HostCopyEngine
from kvoffload.layout import BlockLayout
from kvoffload.ledger import Ledger
from kvoffload.segment import Segment

WAIT_S = 20.0
"""A bound for what takes milliseconds; only a failing test waits for it."""

GUARD = 64


def strided(order: str, sizes: dict[str, int], padding: Sequence[int], itemsize: int = 1) -> tuple[NDArray[Any], NDArray[Any]]:
    """Guarded random memory, and a view of it with axes L, B, H, N, C that lies as ``order`` says, outermost first.

    ``padding[i]`` elements follow each step of axis ``order[i]``.
    """
    strides: dict[str, int] = {}
    extent = 1
    for axis, pad in zip(reversed(order), reversed(padding), strict=True):
        strides[axis] = extent + pad
        extent = strides[axis] * sizes[axis]
    memory = np.frombuffer(np.random.default_rng(7).bytes((extent + 2 * GUARD) * itemsize), dtype=f"u{itemsize}").copy()
    view = np.lib.stride_tricks.as_strided(
        memory[GUARD:], shape=[sizes[axis] for axis in "LBHNC"], strides=[strides[axis] * itemsize for axis in "LBHNC"]
    )
    return memory, view


def layers_of(view: NDArray[Any]) -> dict[str, NDArray[Any]]:
    return {f"layers.{number}": view[number] for number in range(view.shape[0])}


@dataclass
class Rig:
    """``caches[layer]`` is (blocks, 2, 8, 16) uint8, each layer in a storage of its own."""

    caches: dict[str, NDArray[np.uint8]]
    layout: BlockLayout
    segment: Segment
    ledger: Ledger
    engine: CopyEngine

    @classmethod
    def make(cls, blocks: int = 8, slots: int = 8, layers: int = 3) -> Rig:
        random = np.random.default_rng(1)
        caches = {f"layers.{number}": random.integers(0, 256, (blocks, 2, 8, 16), dtype=np.uint8) for number in range(layers)}
        return cls.on(caches, blocks, slots)

    @classmethod
    def on(cls, caches: dict[str, NDArray[Any]], blocks: int, slots: int) -> Rig:
        layout = BlockLayout.from_tensors(caches, blocks)
        segment = Segment.create(slots * layout.slot_bytes, layout.slot_bytes)
        ledger = Ledger(blocks)
        return cls(caches, layout, segment, ledger, HostCopyEngine(layout, segment, ledger))

    def block(self, number: int) -> bytes:
        return b"".join(cache[number].tobytes() for cache in self.caches.values())

    def slot(self, number: int) -> bytes:
        """The payload of a slot."""
        return self.segment.slot(number)[64 : 64 + self.layout.payload_bytes].tobytes()

    def close(self) -> None:
        self.engine.close()
        self.segment.close()
        self.ledger.close()


def ids(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, dtype=np.int64)
