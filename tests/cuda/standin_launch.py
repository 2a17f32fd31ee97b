"""The kernels of the wheel, launched by hand."""

from __future__ import annotations

import ctypes
from importlib.resources import files
from typing import Any

import numpy as np
from tests.cuda.standin_rig import Gpu


def fatbin() -> bytes:
    return files("kvoffload.cuda").joinpath("kv_copy.fatbin").read_bytes()


def load_kernel(gpu: Gpu, name: str = "kv_scatter") -> tuple[int, Any]:
    image = fatbin()
    module = gpu.do("cuModuleLoadData", image)
    gpu.undo(lambda: gpu.driver.cuModuleUnload(module))
    return gpu.do("cuModuleGetFunction", module, name.encode()), image


class Launch:
    """One item: slot 1 into block 2, in one run of 64 bytes."""

    def __init__(self, gpu: Gpu, **changes: int) -> None:
        self.kv, self.slots, tables = gpu.device(), gpu.pinned(), gpu.pinned()
        self.tables = tables.view(np.uint64)
        self.tables[0:4] = (self.kv.ctypes.data, 256, 64, 64)
        self.tables[8], self.tables[16] = 2, 1
        base = tables.ctypes.data
        self.values = dict(runs=base, num_runs=1, blocks=base + 64, slots=base + 128, count=1, num_blocks=8, num_slots=4)
        self.values.update(slot_base=self.slots.ctypes.data, slot_bytes=1024)
        self.values.update(changes)
        self.types = [ctypes.c_uint64 if name not in ("num_runs", "count") else ctypes.c_uint32 for name in self.values]
        self.gpu, self.function, self.image = gpu, *load_kernel(gpu)

    def __call__(self, stream: int, *, grid: int = 1, block: int = 32, shared: int = 0) -> int:
        parameters = (tuple(self.values.values()), tuple(self.types))
        return self.gpu.call("cuLaunchKernel", self.function, grid, 1, 1, block, 1, 1, shared, stream, parameters, 0)[0]
