"""The one-shot answer to a message, and how a thread gets a function run on a loop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from threading import Condition, Lock, get_ident
from typing import Any, Generic, TypeVar, cast

import anyio
from anyio.lowlevel import checkpoint, current_token

from kvoffload.errors import InternalError, PeerError

T = TypeVar("T")


def current_call_soon() -> Callable[[Callable[[], None]], None]:
    """A function that runs another one soon on the loop that is running now, asyncio's or trio's; it may be called from any thread.

    It raises RuntimeError once that loop is closed.
    """
    token: Any = current_token()
    token = getattr(token, "native_token", token)  # anyio before 4.11 gives the native one itself
    # asyncio's loop has the one, trio's token the other; either import would tie the actors to a backend.
    return cast("Callable[[Callable[[], None]], None]", getattr(token, "call_soon_threadsafe", None) or token.run_sync_soon)


class _State(Enum):
    OPEN = 0
    ANSWERED = 1
    GONE = 2


class _Waiter:
    """A task that waits for the answer, on the loop of the thread that made this."""

    __slots__ = ("_call_soon", "_thread", "event")

    def __init__(self) -> None:
        self.event = anyio.Event()
        self._call_soon = current_call_soon()
        self._thread = get_ident()

    def wake(self) -> None:
        if get_ident() == self._thread:
            self.event.set()
            return
        with suppress(RuntimeError):  # its loop is closed, and the task with it
            self._call_soon(self.event.set)


class Reply(Generic[T]):
    """An answer that is given exactly once, from any thread, and that tasks and threads may wait for.

    Whoever drops the message that carries it calls `gone`, so that nobody waits for ever.
    """

    __slots__ = ("_answered", "_lock", "_state", "_value", "_waiters")

    def __init__(self) -> None:
        self._lock = Lock()
        self._state = _State.OPEN
        self._value: T | None = None
        self._waiters: list[_Waiter] = []
        self._answered: Condition | None = None  # made by the first thread that waits: most replies never need it

    @property
    def is_open(self) -> bool:
        """Not answered yet, nor gone."""
        return self._state is _State.OPEN

    def answer(self, value: T) -> None:
        """Answer; ignored when it is gone, as the one who waits has been told so. A second answer raises `InternalError`."""
        if not self._settle(_State.ANSWERED, value) and self._state is _State.ANSWERED:
            raise InternalError(f"a reply was answered twice: first {self._value!r}, then {value!r}")

    def gone(self) -> None:
        """There will be no answer: who waits gets `PeerError`. Does nothing when the answer was given."""
        self._settle(_State.GONE, None)

    async def wait(self) -> T:
        """The answer. Raises `PeerError` when it is gone."""
        with self._lock:
            waiter = _Waiter() if self._state is _State.OPEN else None
            if waiter is not None:
                self._waiters.append(waiter)
        if waiter is None:
            await checkpoint()
            return self._result()
        try:
            await waiter.event.wait()
        finally:
            with self._lock:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
        return self._result()

    def wait_sync(self, timeout_s: float) -> T | None:
        """The answer, or None after ``timeout_s``. Holds up this thread: never a loop's. Raises `PeerError` when it is gone."""
        with self._lock:
            if self._state is _State.OPEN:
                if self._answered is None:
                    self._answered = Condition(self._lock)
                self._answered.wait_for(lambda: self._state is not _State.OPEN, timeout_s)
            if self._state is _State.OPEN:
                return None
        return self._result()

    def _settle(self, state: _State, value: T | None) -> bool:
        with self._lock:
            if self._state is not _State.OPEN:
                return False
            self._state, self._value = state, value
            waiters, self._waiters = self._waiters, []
            if self._answered is not None:
                self._answered.notify_all()
        for waiter in waiters:
            waiter.wake()
        return True

    def _result(self) -> T:
        if self._state is _State.GONE:
            raise PeerError("gone: the part that should have answered was closed before it did")
        return cast("T", self._value)
