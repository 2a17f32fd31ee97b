"""The driver API as the tests of the stand-in call it: the real cuda.bindings, and ctypes where those have no word for a mistake."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.cuda.standin import Standin

STREAM, DURING_API_CALL, ANY = 1, 2, 3
NON_BLOCKING = 1
BLOCKING_SYNC, DISABLE_TIMING = 1, 2
PAGE = mmap.PAGESIZE


class Attributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = (
        ("order", ctypes.c_int),
        ("source_hint", ctypes.c_int * 2),
        ("target_hint", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


def pages(count: int) -> NDArray[np.uint8]:
    """Whole pages of ordinary memory, zero, at the start of one."""
    return np.frombuffer(mmap.mmap(-1, count * PAGE), np.uint8)


class Gpu:
    """A thread's view of device 0, and what one does to it. Every call answers its code; `do` insists on success."""

    def __init__(self, standin: Standin) -> None:
        from cuda.bindings import driver

        self.standin = standin
        self.lib = standin.lib
        self.driver: Any = driver
        self._made: list[Callable[[], Any]] = []
        self._streams: list[int] = []

    def call(self, name: str, *arguments: Any) -> tuple[int, Any]:
        """``cuda.bindings.driver.<name>``: the code, and what it answers."""
        code, *answer = getattr(self.driver, name)(*arguments)
        return int(code), answer[0] if len(answer) == 1 else tuple(answer)

    def do(self, name: str, *arguments: Any) -> Any:
        code, answer = self.call(name, *arguments)
        if code:
            raise AssertionError(f"{name} answered {code}")
        return answer

    def undo(self, how: Callable[[], Any]) -> None:
        """When this is closed."""
        self._made.append(how)

    def forget(self) -> None:
        """Everything is gone already."""
        self._made.clear()
        self._streams.clear()

    def open(self) -> Gpu:
        self.do("cuInit", 0)
        self.context = self.do("cuDevicePrimaryCtxRetain", self.do("cuDeviceGet", 0))
        self.bind()
        self._made.append(lambda: self.do("cuDevicePrimaryCtxRelease", 0))
        return self

    def bind(self) -> None:
        """In this thread."""
        self.do("cuCtxSetCurrent", self.context)

    def close(self) -> None:
        """Give everything back, last first, once nothing runs any more. After a broken context nothing has to succeed."""
        for stream in self._streams:
            self.driver.cuStreamSynchronize(stream)
        self._streams.clear()
        while self._made:
            self._made.pop()()

    def stream(self, flags: int = NON_BLOCKING) -> int:
        handle = int(self.do("cuStreamCreate", flags))
        self._streams.append(handle)
        self._made.append(lambda: self.driver.cuStreamDestroy(handle))
        return handle

    def event(self, flags: int = BLOCKING_SYNC | DISABLE_TIMING) -> int:
        handle = int(self.do("cuEventCreate", flags))
        self._made.append(lambda: self.driver.cuEventDestroy(handle))
        return handle

    def pinned(self, count: int = 4) -> NDArray[np.uint8]:
        """Whole pages, registered."""
        array = pages(count)
        self.do("cuMemHostRegister", array.ctypes.data, array.nbytes, 3)
        self._made.append(lambda: self.driver.cuMemHostUnregister(array.ctypes.data))
        return array

    def device(self, num_bytes: int = 4 * PAGE, value: int = 0) -> NDArray[np.uint8]:
        """Memory that plays a tensor of the engine."""
        array = np.full(num_bytes, value, np.uint8)
        self.standin.device_memory(array)
        return array

    def batch(
        self,
        stream: int,
        copies: list[tuple[NDArray[np.uint8] | int, NDArray[np.uint8] | int, int]],
        *,
        order: int = STREAM,
        orders: list[int] | None = None,
        indices: list[int] | None = None,
        count: int | None = None,
        flags: int = 0,
        form: int = 13000,
    ) -> int:
        """cuMemcpyBatchAsync of (target, source, bytes), as drivers of CUDA 13 have it, or of CUDA 12.8. Its code."""
        targets, sources, sizes = (np.array([_address(copy[i]) for copy in copies], np.uint64) for i in range(3))
        all_orders = orders or [order]
        attributes = (Attributes * len(all_orders))(*(Attributes(each, flags=flags) for each in all_orders))
        starts = np.array(indices or [0], np.uint64)
        arrays = [ctypes.c_void_p(array.ctypes.data) for array in (targets, sources, sizes)]
        size = ctypes.c_size_t
        rest = [size(len(copies) if count is None else count), attributes, ctypes.c_void_p(starts.ctypes.data), size(len(all_orders))]
        if form >= 13000:
            return int(self.lib.cuMemcpyBatchAsync_v2(*arrays, *rest, ctypes.c_void_p(stream)))
        self.failed_index = size(0)
        return int(self.lib.cuMemcpyBatchAsync(*arrays, *rest, ctypes.byref(self.failed_index), ctypes.c_void_p(stream)))

    def record(self, event: int, stream: int) -> None:
        self.do("cuEventRecord", event, stream)

    def wait(self, stream: int, event: int) -> None:
        self.do("cuStreamWaitEvent", stream, event, 0)


def _address(memory: NDArray[np.uint8] | int) -> int:
    return memory if isinstance(memory, int) else int(memory.ctypes.data)


@contextmanager
def running(work: Callable[[], Any]) -> Iterator[Outcome]:
    """``work`` in a thread of its own, over at the end of the block or the test fails."""
    outcome = Outcome()

    def run() -> None:
        try:
            outcome.value = work()
        except BaseException as error:
            outcome.error = error

    thread = threading.Thread(target=run, daemon=True)
    outcome.thread = thread
    thread.start()
    try:
        yield outcome
    finally:
        outcome.join()


class Outcome:
    """What a thread came to."""

    value: Any = None
    error: BaseException | None = None
    thread: threading.Thread

    def join(self, timeout_s: float = 20.0) -> Any:
        self.thread.join(timeout_s)
        if self.thread.is_alive():
            raise TimeoutError("the thread is still in its call")
        if self.error is not None:
            raise self.error
        return self.value


@contextmanager
def opened(standin: Standin) -> Iterator[Gpu]:
    """Device 0, current in this thread, and everything given back at the end."""
    gpu = Gpu(standin).open()
    try:
        yield gpu
    finally:
        gpu.close()
