"""cuda/kv_copy.cu compiled by the host's C++ compiler: the kernels' own source, run on a CPU."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CUDA = Path(__file__).parents[3] / "cuda"
SOURCE = CUDA / "kv_copy.cu"
SHIM = CUDA / "host_shim.cpp"
KERNELS = ("kv_gather", "kv_scatter")

WARNINGS = ("-Wall", "-Wextra", "-Wconversion", "-Werror", "-Wno-unknown-pragmas")
SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")

Words = NDArray[np.uint64]


def build_shim(output_dir: Path, *, source: Path = SOURCE, flags: Sequence[str] = ("-O2", *WARNINGS)) -> Path:
    """Compile the kernels into a shared object in ``output_dir`` and return its path; RuntimeError with the compiler's words if it fails.

    It exports ``int kv_launch(const char* name, uint32_t grid, uint32_t block, void** params)``, ``params`` being cuLaunchKernel's
    kernelParams (0: done; 1: no such kernel; 2: a grid or a block that no GPU takes), and ``int kv_parameters(name, size_t bytes[16])``,
    the number of parameters and the size of each (-1: no such kernel). Threads run one after another in the calling thread.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    library = output_dir / "libkv_copy_host.so"
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, "-std=c++17", *flags, "-shared", "-fPIC", f'-DKV_SOURCE="{source}"', "-o", str(library), str(SHIM)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"{compiler} could not compile {source}:\n{run.stderr}")
    return library


@dataclass(frozen=True, slots=True)
class Launch:
    """The arguments of one launch; shapes: runs (num_runs, 4), blocks and slots (count,), all uint64."""

    runs: Words
    blocks: Words
    slots: Words
    num_blocks: int
    num_slots: int
    slot_base: int
    slot_bytes: int

    def parameters(self) -> list[Any]:
        """One ctypes value per parameter of the kernel, in its order."""
        return [
            ctypes.c_void_p(self.runs.ctypes.data),
            ctypes.c_uint32(len(self.runs)),
            ctypes.c_void_p(self.blocks.ctypes.data),
            ctypes.c_void_p(self.slots.ctypes.data),
            ctypes.c_uint32(len(self.blocks)),
            ctypes.c_uint64(self.num_blocks),
            ctypes.c_uint64(self.num_slots),
            ctypes.c_uint64(self.slot_base),
            ctypes.c_uint64(self.slot_bytes),
        ]


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a launch is spread over thread blocks, and in which order its threads run."""

    grid: int
    block: int
    reverse: bool = False


@dataclass(slots=True)
class Shim:
    """A library of `build_shim`. ``prefix`` names a mutant, where a library holds several."""

    library: ctypes.CDLL
    prefix: str = ""
    names: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.names = {name: self.prefix + name for name in KERNELS}

    def launch(self, kernel: str, launch: Launch, geometry: Geometry) -> tuple[int, int]:
        """Run to the end; the answer is how many 16-byte words of payload were loaded and stored. ValueError where a GPU would refuse."""
        self.library.kv_set_reverse(int(geometry.reverse))
        return self._run(self.library.kv_launch, kernel, launch, geometry)

    def count_thread(self, kernel: str, launch: Launch, geometry: Geometry, *, block: int, thread: int) -> tuple[int, int]:
        """How many words one thread of the launch would load and store; payload is not touched."""
        self.library.kv_set_only_count(1)
        try:
            return self._run(self.library.kv_launch_thread, kernel, launch, geometry, ctypes.c_uint32(block), ctypes.c_uint32(thread))
        finally:
            self.library.kv_set_only_count(0)

    def _run(self, function: Any, kernel: str, launch: Launch, geometry: Geometry, *where: ctypes.c_uint32) -> tuple[int, int]:
        values = launch.parameters()
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        name = self.names.get(kernel, kernel).encode()
        self.counters()
        code = function(name, ctypes.c_uint32(geometry.grid), ctypes.c_uint32(geometry.block), *where, pointers)
        if code != 0:
            raise ValueError(f"{kernel} was not launched with {geometry}: {code}")
        return self.counters()

    def counters(self) -> tuple[int, int]:
        loads, stores = ctypes.c_uint64(), ctypes.c_uint64()
        self.library.kv_take_counters(ctypes.byref(loads), ctypes.byref(stores))
        return loads.value, stores.value

    def parameter_bytes(self, kernel: str) -> list[int] | None:
        sizes = (ctypes.c_size_t * 16)()
        count = self.library.kv_parameters(kernel.encode(), sizes)
        return None if count < 0 else list(sizes[:count])
