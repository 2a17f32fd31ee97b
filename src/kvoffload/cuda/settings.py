"""How blocks are copied between a GPU and the slots: what section ``gpu`` of the settings says, as the engine takes it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from kvoffload.errors import ConfigError


class CopyMode(Enum):
    """How to copy. AUTO decides by the size of pieces; the others are for measuring, and a way out where one of them is broken."""

    AUTO = "auto"
    DMA = "dma"
    KERNEL = "kernel"
    SINGLE = "single"


@dataclass(frozen=True, slots=True)
class GpuCopySettings:
    """Bounds of one direction. `kernel_below_bytes` and `kernel_min_pieces` are where vLLM draws the line for its own kernel.

    ``descriptors_per_call``: more in one cuMemcpyBatchAsync were seen to hang a driver. ``inflight_bytes``: what may be under way at
    once, so that the engine's own copies find room.
    """

    copy: CopyMode = CopyMode.AUTO
    descriptors_per_call: int = 8192
    kernel_below_bytes: int = 28672
    kernel_min_pieces: int = 16
    kernel_blocks: int = 12
    inflight_bytes: int = 64 << 20
    pin: bool = True
    pin_piece_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        for name in ("descriptors_per_call", "kernel_blocks", "inflight_bytes", "pin_piece_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"gpu.{name} = {getattr(self, name)}: at least 1 is needed")
