"""The address plan: a layout's runs as the table of numbers that a native call walks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvoffload.layout import HEADER_BYTES, BlockLayout

ADDRESS, BLOCK_STRIDE, SIZE, SLOT_OFFSET = range(4)
"""Columns of the table."""


def plan_of(layout: BlockLayout) -> NDArray[np.uint64]:
    """One row per run: address in block 0, block stride, size, offset in the slot; uint64, shape (runs, 4)."""
    plan = np.empty((len(layout.runs), 4), dtype=np.uint64)
    offset = HEADER_BYTES
    for row, run in enumerate(layout.runs):
        plan[row] = (run.address, run.block_stride, run.size, offset)
        offset += run.size
    return plan
