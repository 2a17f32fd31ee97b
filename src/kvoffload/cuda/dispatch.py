"""What copies the pieces of a call: the copy engines of the GPU, or a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from kvoffload.cuda.settings import CopyMode, GpuCopySettings


class Direction(Enum):
    SAVE = "save"
    LOAD = "load"


class Path(Enum):
    DMA = "dma"
    KERNEL = "kernel"


@dataclass(frozen=True, slots=True)
class DispatchTable:
    """Kernels only for loads of many small pieces: there DMA was measured at 7 to 27 GB/s where the link gives 50 (vLLM, H100).

    Towards the host DMA has no such weakness, and a kernel always takes multiprocessors from the model.
    """

    settings: GpuCopySettings

    def choose(self, direction: Direction, piece_bytes: int, count: int) -> Path:
        """For ``count`` pieces of ``piece_bytes`` each, where the kernel could copy them."""
        match self.settings.copy:
            case CopyMode.KERNEL:
                return Path.KERNEL
            case CopyMode.AUTO if direction is Direction.LOAD:
                is_small = piece_bytes < self.settings.kernel_below_bytes
                return Path.KERNEL if is_small and count >= self.settings.kernel_min_pieces else Path.DMA
            case _:
                return Path.DMA

    def may_choose_kernel(self, direction: Direction, piece_bytes: int) -> bool:
        """For any number of such pieces: else the kernel need not be loaded."""
        return self.choose(direction, piece_bytes, 1 << 40) is Path.KERNEL
