"""Virtual time for asyncio, and how both backends get it in tests: an hour's timeout passes at once, and nobody sleeps.

The rule on both: when nothing can run, the clock jumps to the next deadline. trio has this as `trio.testing.MockClock` with
``autojump_threshold=0``, which anyio takes as the backend option ``clock``; `VirtualLoop` is its counterpart, which anyio takes
as the backend option ``loop_factory``. `virtual_backend` gives either; a fixture ``anyio_backend`` that returns it makes every
test virtual.

Threads and other processes work in real time: while one of them works and every task waits, virtual deadlines pass. A test with
threads therefore runs on the real clock, or gives them ``grace_s``. Time is the loop's (`anyio.current_time`), not that of
`time.monotonic`.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

T = TypeVar("T")


class _JumpingSelector(selectors.BaseSelector):
    """Looks for I/O, and where there is none calls ``jump`` with the seconds that it was to wait."""

    def __init__(self, jump: Callable[[float], None], grace_s: float) -> None:
        self._real = selectors.DefaultSelector()
        self._jump = jump
        self._grace_s = grace_s

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:  # no deadline to jump to: only a thread or a file can bring the next event
            return self._real.select(None)
        ready = self._real.select(0)
        if ready or timeout <= 0:
            return ready
        if self._grace_s:
            ready = self._real.select(self._grace_s)
            if ready:
                return ready
        self._jump(timeout)
        return []

    def register(self, fileobj: FileDescriptorLike, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: FileDescriptorLike) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def modify(self, fileobj: FileDescriptorLike, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.modify(fileobj, events, data)

    def get_map(self) -> Mapping[FileDescriptorLike, selectors.SelectorKey]:
        return self._real.get_map()

    def close(self) -> None:
        self._real.close()


class VirtualLoop(asyncio.SelectorEventLoop):
    """An asyncio loop whose idle select advances `time`, which begins at 0.0 s.

    ``grace_s``: real seconds that I/O (and so threads, which wake the loop by I/O) gets before the clock jumps.
    """

    def __init__(self, grace_s: float = 0.0) -> None:
        self._now = 0.0
        super().__init__(_JumpingSelector(self.advance, grace_s))

    def time(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Move the clock on; what falls due runs when the loop next gets to it."""
        if seconds < 0:
            raise ValueError(f"time does not run backwards: {seconds} s")
        self._now += seconds


def virtual_backend(name: str, grace_s: float = 0.0) -> tuple[str, dict[str, Any]]:
    """anyio's name and options of the backend ``name`` ("asyncio" or "trio") with a virtual clock of its own, for one run."""
    if name == "trio":
        from trio.testing import MockClock

        return name, {"clock": MockClock(autojump_threshold=grace_s)}
    return name, {"loop_factory": partial(VirtualLoop, grace_s)}


def run_virtually(function: Callable[..., Awaitable[T]], *arguments: Any, backend: str = "asyncio") -> T:
    """`anyio.run` with a virtual clock: for scripts and property tests, which are not async themselves."""
    name, options = virtual_backend(backend)
    return anyio.run(function, *arguments, backend=name, backend_options=options)
