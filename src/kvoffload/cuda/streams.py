"""A stream of our own, and events that come back to a pool by themselves."""

from __future__ import annotations

from collections import deque

from kvoffload.cuda.driver import CudaError, Driver
from kvoffload.observe.logs import get_logger

log = get_logger("cuda")

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: not ordered with the legacy default stream
_EVENT_FLAGS = 1 | 2  # CU_EVENT_BLOCKING_SYNC: a waiting thread sleeps; CU_EVENT_DISABLE_TIMING: cheaper, and nobody asks
_NOT_READY = 600


class Event:
    """Returns to its pool when its last reference goes. ``handle`` is the CUevent."""

    __slots__ = ("handle", "pool")

    def __init__(self, handle: int, pool: EventPool) -> None:
        self.handle = handle
        self.pool = pool

    def __del__(self) -> None:
        # No call of the driver: a finalizer runs anywhere, and destroying an event may wait for the GPU with the interpreter lock held.
        self.pool.free.append(self.handle)


class EventPool:
    """Events for waits and nothing else. `take` from any thread with the context bound."""

    def __init__(self, driver: Driver, prepared: int = 16) -> None:
        self._driver = driver
        self.free: deque[int] = deque()
        self._all: list[int] = []
        self._recorded: set[int] = set()
        try:
            for _ in range(prepared):
                self.free.append(self._create())
        except CudaError:
            self.close()
            raise

    def take(self) -> Event:
        """An event to be recorded anew. Raises CudaError."""
        try:
            handle = self.free.popleft()
        except IndexError:
            handle = self._create()
        return Event(handle, self)

    def record(self, event: Event, stream: int) -> None:
        """``event`` happens when all that ``stream`` (a CUstream) has been given so far is done. Raises CudaError."""
        self._driver.call("cuEventRecord", event.handle, stream)
        self._recorded.add(event.handle)

    def close(self) -> None:
        """Destroy all, those that somebody still holds too: nothing may wait for one any more. Never raises.

        One that is recorded and still to come stays, as the driver may need it.
        """
        handles, self._all = self._all, []
        self.free.clear()
        for handle in handles:
            if handle in self._recorded and self._is_still_to_come(handle):
                log.debug("an event that is still to come is left to the driver")
                continue
            try:
                self._driver.call("cuEventDestroy", handle)
            except CudaError as error:
                log.warning("an event is not given back", reason=str(error))

    def _is_still_to_come(self, handle: int) -> bool:
        try:
            self._driver.call("cuEventQuery", handle)
        except CudaError as error:
            return error.code == _NOT_READY
        return False

    def _create(self) -> int:
        handle = int(self._driver.call("cuEventCreate", _EVENT_FLAGS))
        self._all.append(handle)
        return handle


class Stream:
    """Not ordered with any other, of the lowest priority: a kernel of the engine goes before one of ours."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        least, _ = driver.call("cuCtxGetStreamPriorityRange")
        self.handle = int(driver.call("cuStreamCreateWithPriority", _NON_BLOCKING, least))

    def wait(self, event: Event) -> None:
        """What is submitted from now on starts after what ``event`` was last recorded behind. Raises CudaError."""
        self._driver.call("cuStreamWaitEvent", self.handle, event.handle, 0)

    def record(self, event: Event) -> None:
        """``event`` happens when all submitted so far is done. Raises CudaError."""
        event.pool.record(event, self.handle)

    def synchronize(self) -> None:
        """Return when all submitted so far is done, interpreter lock released. Raises CudaError."""
        self._driver.call("cuStreamSynchronize", self.handle)

    def close(self) -> None:
        """Destroy it; what was submitted is still done. Raises CudaError. May be called twice."""
        handle, self.handle = self.handle, 0
        if handle:
            self._driver.call("cuStreamDestroy", handle)
