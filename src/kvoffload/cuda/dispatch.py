"""What copies the pieces of a call: the copy engines of the GPU, or a kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from kvoffload.cuda.settings import CopyMode, GpuCopySettings


class Direction(Enum):
    SAVE = "save"
    LOAD = "load"


class Path(Enum):
    DMA = "dma"
    KERNEL = "kernel"


class DispatchTable:
    """Kernels only for loads of many small pieces: there DMA was measured at 7 to 27 GB/s where the link gives 50 (vLLM, H100).

    Towards the host DMA has no such weakness, and a kernel always takes multiprocessors from the model.
    """

    def __init__(self, settings: GpuCopySettings) -> None:
        self.settings = settings
        self._always: Path | None = None
        self._has_kernels = True

    @contextmanager
    def always(self, path: Path) -> Iterator[None]:
        """Within this it is this path, whatever the pieces: for proofs, which have too few of them. Nothing else may be copied."""
        self._always = path
        try:
            yield
        finally:
            self._always = None

    def give_up_kernels(self) -> None:
        """From now on never a kernel."""
        self._has_kernels = False

    def choose(self, direction: Direction, piece_bytes: int, count: int) -> Path:
        """For ``count`` pieces of ``piece_bytes`` each, where the kernel could copy them."""
        if not self._has_kernels:
            return Path.DMA
        if self._always is not None:
            return self._always
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
