"""Times as a GPU takes them: two events in a stream."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from kvoffload.cuda.driver import Driver
from kvoffload.cuda.streams import Stream
from kvoffload.errors import UnsupportedError

_WITH_TIMING = 1  # CU_EVENT_BLOCKING_SYNC, and not CU_EVENT_DISABLE_TIMING
_ELAPSED_TIME = "cuEventElapsedTime"


class Clock:
    """Measures what lies between two moments of ``stream``. Raises CudaError. To be closed before the stream."""

    def __init__(self, driver: Driver, stream: Stream) -> None:
        # By its address as CUDA 12.0 has it: cuda-bindings of 12.9 ask for that of 12.8, which older drivers do not have.
        address = driver.address(_ELAPSED_TIME, 12000)
        if not address:
            raise UnsupportedError(f"this driver does not have {_ELAPSED_TIME}: update it")
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_float), ctypes.c_void_p, ctypes.c_void_p)
        self._elapsed_time = kind(address)
        driver.bind()
        self._driver, self._stream = driver, stream
        self._events: list[int] = []
        for _ in range(2):
            self._events.append(int(driver.call("cuEventCreate", _WITH_TIMING)))

    def seconds(self, work: Callable[[], object]) -> float:
        """From where the stream is before ``work`` to where it is behind it. Work that blocks is timed like work in the stream."""
        start, end = self._events
        self._driver.bind()
        self._driver.call("cuEventRecord", start, self._stream.handle)
        work()
        self._driver.bind()
        self._driver.call("cuEventRecord", end, self._stream.handle)
        self._driver.call("cuEventSynchronize", end)
        milliseconds = ctypes.c_float()
        if code := self._elapsed_time(ctypes.byref(milliseconds), start, end):
            raise self._driver.error(_ELAPSED_TIME, code)
        return max(milliseconds.value, 1e-4) / 1e3

    def close(self) -> None:
        """May be called twice."""
        self._driver.bind()
        while self._events:
            self._driver.call("cuEventDestroy", self._events.pop())
