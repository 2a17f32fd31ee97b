"""The gather and scatter kernels of cuda/kv_copy.cu, as the package ships them, and what they read besides KV."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvoffload.cuda.driver import CudaError, Driver
from kvoffload.errors import UnsupportedError
from kvoffload.layout import MAX_ALIGNMENT, BlockLayout
from kvoffload.segment import Segment

GATHER, SCATTER = "kv_gather", "kv_scatter"
_IMAGE = "kv_copy.fatbin"
_HOST_FLAGS = 1  # CU_MEMHOSTALLOC_PORTABLE
_DEFAULT_STREAM = 0  # the legacy one, in which calls without a stream run


def upload(driver: Driver, address: int, content: NDArray[Any]) -> None:
    """Write ``content`` to the device; done when this returns. Not while any graph is captured. Raises CudaError.

    From pageable memory cuMemcpyHtoD returns when the bytes are staged ("API synchronization behavior" in CUDA's manual), and streams
    of our own do not come after the default one.
    """
    driver.call("cuMemcpyHtoD", address, content.ctypes.data, content.nbytes)
    try:
        driver.call("cuStreamSynchronize", _DEFAULT_STREAM)
    except CudaError:
        with suppress(CudaError):  # it may have told of an older error: whoever gives the memory back needs to know that it is over
            driver.call("cuStreamSynchronize", _DEFAULT_STREAM)
        raise


class Kernels:
    """The kernels in the driver's context, and on the device the table of runs. Made before any graph is captured.

    Raises UnsupportedError where this layout cannot use them, and CudaError; nothing is left then.
    """

    def __init__(self, driver: Driver, layout: BlockLayout, plan: NDArray[np.uint64], segment: Segment) -> None:
        if layout.alignment < MAX_ALIGNMENT:
            raise UnsupportedError(f"the kernels move 16 bytes at a time, this layout is aligned to {layout.alignment} only")
        self._driver = driver
        self._device_memory: list[int] = []
        self._host_memory: list[int] = []
        self._module: Any = None
        try:
            self._module = driver.call("cuModuleLoadData", load_image())
            # Asked for now, as a function may be loaded when it is first asked for, which allocates and synchronizes.
            self._functions = {name: driver.call("cuModuleGetFunction", self._module, name.encode()) for name in (GATHER, SCATTER)}
            runs = int(driver.call("cuMemAlloc", plan.nbytes))
            self._device_memory.append(runs)
            # kv_run of kv_copy.cu has the columns of the plan.
            upload(driver, runs, plan)
        except BaseException:
            self.close()
            raise
        #          runs, num_runs, blocks, slots, count, ...: the three in the middle are set for each launch
        self._constants = (runs, len(plan), 0, 0, 0, layout.num_blocks, segment.slots, segment.address, segment.slot_bytes)

    def parameters(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """The kernel's arguments, and their addresses as cuLaunchKernel wants them; good while both are held.

        An argument is the first word of a row, shape (9, 2): what it takes of it, four bytes or eight, the driver knows. (Nothing
        follows it closely, so that nobody can take the rows for arguments packed by their sizes.)
        """
        values = np.zeros((len(self._constants), 2), dtype=np.uint64)
        values[:, 0] = self._constants
        return values, np.uint64(values.ctypes.data) + np.arange(len(values), dtype=np.uint64) * np.uint64(values.strides[0])

    def function(self, name: str) -> int:
        """The CUfunction of `GATHER` or `SCATTER`."""
        return int(self._functions[name])

    def allocate_items(self, items: int) -> NDArray[np.uint64]:
        """Pinned room for the ids of two windows, shape (2 windows, blocks and slots, items). Raises CudaError when there is none.

        The kernel reads them from there: each once, and by one access for all threads that copy a piece.
        """
        words = 2 * 2 * items
        address = int(self._driver.call("cuMemHostAlloc", words * 8, _HOST_FLAGS))
        self._host_memory.append(address)
        return np.ctypeslib.as_array((ctypes.c_uint64 * words).from_address(address)).reshape(2, 2, items)

    def close(self) -> None:
        """Give all of it back; nothing of it may be running. Raises the first CudaError. May be called twice."""
        errors = []
        device, self._device_memory = self._device_memory, []
        host, self._host_memory = self._host_memory, []
        module, self._module = self._module, None
        give_back = [("cuMemFree", address) for address in device] + [("cuMemFreeHost", address) for address in host]
        if module is not None:
            give_back.append(("cuModuleUnload", module))
        for function, argument in give_back:
            try:
                self._driver.call(function, argument)
            except CudaError as error:
                errors.append(error)
        if errors:
            raise errors[0]


def load_image() -> bytes:
    """The fatbin of the package. Raises UnsupportedError when it is not there."""
    try:
        return resources.files("kvoffload.cuda").joinpath(_IMAGE).read_bytes()
    except OSError as error:
        raise UnsupportedError(f"the package was installed without {_IMAGE}: {error}") from error
