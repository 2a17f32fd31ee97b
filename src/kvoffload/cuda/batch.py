"""Many copies in one call of the driver: cuMemcpyBatchAsync, found by name and version, and what it is told about its sources."""

from __future__ import annotations

from enum import Enum

import numpy as np
from numpy.typing import NDArray

from kvoffload.cuda.driver import NOT_SUPPORTED, CudaError, Driver
from kvoffload.observe.logs import get_logger

log = get_logger("cuda")

_WITH_FAIL_INDEX, _WITHOUT_FAIL_INDEX = 12080, 13000
"""CUDA 12.8 has nine arguments, one of them where to write the index of a copy that failed; CUDA 13.0 has the other eight."""


class Order(Enum):
    """When the driver may read a copy's source: CUmemcpySrcAccessOrder."""

    STREAM = 1
    """In its place in the stream: for what a kernel before it may write."""
    ANY = 3
    """Any time after the call, before the copy is done: for what nobody writes meanwhile."""


class BatchEntry:
    """The driver's function for batches, `entry`; 0 where batches are not used, and pieces go one by one.

    Found as CUDA 12.8 has it wherever possible, which every later driver still offers: then one form of the call serves all.
    """

    def __init__(self, driver: Driver, *, use_batches: bool = True) -> None:
        self.entry, self.has_fail_index = 0, False
        self._attributes = {order: _attributes(order) for order in Order}
        if not use_batches:
            return
        for version in (_WITH_FAIL_INDEX, _WITHOUT_FAIL_INDEX):
            if entry := driver.address("cuMemcpyBatchAsync", version):
                self.entry, self.has_fail_index = entry, version == _WITH_FAIL_INDEX
                return
        log.warning(
            "this driver has no cuMemcpyBatchAsync, pieces are copied one by one: slower where they are small; CUDA 12.8 brings it",
            driver_version=driver.driver_version,
        )

    def attributes(self, order: Order) -> NDArray[np.uint32]:
        """One CUmemcpyAttributes for all copies of a call: uint32, shape (6,)."""
        return self._attributes[order]

    def give_up(self, error: CudaError) -> bool:
        """Whether ``error`` says that batches cannot be used here at all; from now on pieces go one by one."""
        if error.function != "cuMemcpyBatchAsync" or error.code != NOT_SUPPORTED:
            return False
        if self.entry:
            self.entry = 0
            log.warning("batches of copies do not work here, pieces are copied one by one: slower where they are small", reason=str(error))
        return True


def _attributes(order: Order) -> NDArray[np.uint32]:
    # {order, hint where the source is (type, id), hint where the destination is (type, id), flags}: hints are for managed memory only
    return np.array([order.value, 0, 0, 0, 0, 0], dtype=np.uint32)
