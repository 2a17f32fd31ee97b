"""Where the copy kernel beats batched DMA: from measured calls to the two settings that say so."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

KERNEL_COSTS = 1.1
"""A kernel takes multiprocessors from the model: it has to be a tenth faster to be worth it."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One load of ``count`` pieces of ``piece_bytes`` each: seconds of the call by DMA and by the kernel."""

    piece_bytes: int
    count: int
    dma_s: float
    kernel_s: float

    @property
    def gain(self) -> float:
        """How many times faster the kernel is."""
        return self.dma_s / self.kernel_s

    @property
    def num_bytes(self) -> int:
        return self.piece_bytes * self.count


@dataclass(frozen=True, slots=True)
class Choice:
    """Loads of at least ``min_pieces`` pieces smaller than ``below_bytes`` go by the kernel."""

    below_bytes: int
    min_pieces: int

    def takes_kernel(self, cell: Cell) -> bool:
        return cell.piece_bytes < self.below_bytes and cell.count >= self.min_pieces

    def loss(self, cells: Iterable[Cell]) -> float:
        """How much slower loads are than with the better way for each: the geometric mean, 0.03 being 3 %."""
        excess = [math.log(cost / best) for cost, best in (self._costs(cell) for cell in cells)]
        return math.exp(math.fsum(excess) / len(excess)) - 1 if excess else 0.0

    def _costs(self, cell: Cell) -> tuple[float, float]:
        kernel = cell.kernel_s * KERNEL_COSTS
        return kernel if self.takes_kernel(cell) else cell.dma_s, min(kernel, cell.dma_s)


NEVER = Choice(below_bytes=0, min_pieces=1)


def best_choice(cells: Sequence[Cell]) -> Choice:
    """The one that loses least; of those that lose the same, the one with the least work for the kernel."""
    sizes = sorted({cell.piece_bytes for cell in cells})
    counts = sorted({cell.count for cell in cells})
    bounds = [*sizes[1:], *(2 * size for size in sizes[-1:])]
    candidates = [NEVER, *(Choice(below, count) for below in bounds for count in reversed(counts))]
    return min(candidates, key=lambda choice: round(choice.loss(cells), 9))
