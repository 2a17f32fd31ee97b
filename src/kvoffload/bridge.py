"""Between vLLM's threads and the loop: the loop's own thread, its heartbeat, and the inbox by which answers come back.

Posts go in through `kvoffload.mailbox.ThreadSender`. This is one of the two places that know asyncio; actors know only anyio.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import Context
from threading import Event, Lock, Thread, current_thread
from typing import Any, Generic, TypeVar

from kvoffload.errors import InternalError, MisuseError
from kvoffload.observe.logs import get_logger

T = TypeVar("T")
RootCoroutine = Callable[[], Coroutine[Any, Any, None]]

BEAT_S = 0.1
log = get_logger("bridge")


class Heartbeat:
    """When the loop was last seen alive; read by hooks before each promise, so a read costs two attributes and a clock."""

    __slots__ = ("_clock", "beats", "last")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.beats = 0
        self.last = float("-inf")  # never, or no more

    def beat(self) -> None:
        self.beats += 1
        self.last = self._clock()

    def end(self) -> None:
        """There will be no more: stale at once, and not only after the limit."""
        self.last = float("-inf")

    def age_s(self) -> float:
        """Seconds since the last beat; infinite before the first and after the end."""
        return self._clock() - self.last

    def fresh(self, limit_s: float = 1.0) -> bool:
        """New promises may be made."""
        return self._clock() - self.last <= limit_s


class LoopThread:
    """One asyncio loop in one daemon thread, "kvoffload-<name>".

    ``on_crash`` gets, on the loop's thread and once for each, the exceptions that root coroutines end with.
    """

    def __init__(self, name: str, on_crash: Callable[[BaseException], None]) -> None:
        self.name = f"kvoffload-{name}"
        self.heartbeat = Heartbeat()
        self._on_crash = on_crash
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: Thread | None = None
        self._roots: set[asyncio.Task[None]] = set()
        self._is_stopping = False
        self._is_finishing = False
        self._lock = Lock()
        # By default each callback takes along a copy of the poster's context variables, and they are vLLM's.
        self._context = Context()

    def start(self) -> None:
        """Start the thread, once; returns before the loop's first turn. What was posted by then is not lost."""
        with self._lock:
            if self._thread is not None or self._is_stopping:
                raise MisuseError(f"the loop thread {self.name} can be started once only")
            self._loop = asyncio.new_event_loop()
            self._loop.set_exception_handler(self._callback_failed)
            self._thread = Thread(target=self._run, args=(self._loop,), name=self.name, daemon=True)
            self._thread.start()

    @property
    def is_alive(self) -> bool:
        """The thread runs; whether its loop gets on is the heartbeat's to say."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def is_current(self) -> bool:
        """The caller is on this loop's thread."""
        return current_thread() is self._thread

    def call_soon(self, function: Callable[[], object]) -> None:
        """Run ``function`` on the loop, from any thread. Raises RuntimeError when the loop is closed or was never started."""
        if self._loop is None:
            raise RuntimeError(f"the loop thread {self.name} was not started")
        self._loop.call_soon_threadsafe(function, context=self._context)

    def submit(self, root: RootCoroutine) -> None:
        """Run ``root()`` as a task, from any thread; its exception goes to ``on_crash``, and so does a cancellation not by `stop`.

        Raises RuntimeError when the loop is closed or was never started.
        """
        self.call_soon(lambda: self._begin(root))

    def stop(self, timeout_s: float) -> bool:
        """Cancel all tasks, wait for their cleanup and for the thread. Never raises; may be called from any thread, more than once.

        False when that is not over after ``timeout_s`` (a hung loop): the daemon thread is abandoned. Called on the loop's own
        thread it cannot wait, so it begins the stop and returns False.
        """
        with self._lock:
            self._is_stopping = True
            loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return True
        with suppress(RuntimeError):  # closed already: its thread is about to end, or has
            loop.call_soon_threadsafe(self._leave, context=self._context)
        if self.is_current:
            return False
        thread.join(max(0.0, timeout_s))
        if thread.is_alive():
            self.heartbeat.end()
            log.error("loop_thread_hung", thread=self.name, waited_s=timeout_s, beat_age_s=self.heartbeat.age_s())
            return False
        return True

    def _leave(self) -> None:
        # A second stop may arrive while the tasks' cleanup runs on the same loop: that goes on.
        if self._loop is not None and not self._is_finishing:
            self._loop.stop()

    def _begin(self, root: RootCoroutine) -> None:
        if self._is_stopping or self._loop is None:
            return
        task = self._loop.create_task(self._watch(root))
        self._roots.add(task)  # asyncio itself holds tasks weakly
        task.add_done_callback(self._roots.discard)

    async def _watch(self, root: RootCoroutine) -> None:
        try:
            await root()
        except asyncio.CancelledError as error:
            if not self._is_stopping:
                self._crashed(InternalError(f"a root coroutine of {self.name} was cancelled, and not by a stop: {error!r}"))
            raise
        except BaseException as error:
            # SystemExit and KeyboardInterrupt too: they would end the loop, and with it what vLLM was promised.
            self._crashed(error)

    def _crashed(self, error: BaseException) -> None:
        try:
            self._on_crash(error)
        except Exception:
            log.exception("crash_report_failed", thread=self.name, crash=repr(error))

    def _callback_failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        log.error("loop_callback_failed", thread=self.name, what=context.get("message"), exc_info=context.get("exception"))

    def _beat(self) -> None:
        assert self._loop is not None
        self.heartbeat.beat()
        self._loop.call_later(BEAT_S, self._beat)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.call_soon(self._beat)
            while not self._is_stopping:  # an exception out of a callback, or a stray loop.stop(), does not end it
                try:
                    loop.run_forever()
                except BaseException as error:
                    self._crashed(error)
            self._finish(loop)
        finally:
            self.heartbeat.end()
            asyncio.set_event_loop(None)
            loop.close()

    def _finish(self, loop: asyncio.AbstractEventLoop) -> None:
        """Cancel the roots and wait for their cleanup, then whatever is left.

        In this order: a root cancels its own tasks, and those can then tell an end from a cancellation that is a bug.
        """
        self._is_finishing = True
        try:
            while tasks := self._roots or asyncio.all_tasks(loop):
                for task in tasks:
                    task.cancel()
                loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            loop.run_until_complete(loop.shutdown_asyncgens())
        except BaseException:
            log.exception("loop_cleanup_failed", thread=self.name)


class Inbox(Generic[T]):
    """Messages from any thread to the one that takes them. Bounded by what may be owed to that one (credits, live requests)."""

    __slots__ = ("_arrived", "_is_awaited", "_messages")

    def __init__(self) -> None:
        self._messages: deque[T] = deque()
        self._arrived = Event()
        self._is_awaited = False

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: T) -> None:
        """From any thread; never waits. Wakes the taker if it is in `wait`."""
        self._messages.append(message)
        # In this order: either we see that it waits, or it sees the message.
        if self._is_awaited:
            self._arrived.set()

    def take(self) -> list[T]:
        """All that is there, oldest first; for one thread only."""
        messages = self._messages
        if not messages:
            return []
        # Others only append, so what was counted is there. No lock: hooks call this in every step.
        return [messages.popleft() for _ in range(len(messages))]

    def wait(self, timeout_s: float) -> bool:
        """Wait, with the interpreter lock released, until there is a message: True, at once if there is one. For the taker only."""
        if self._messages:
            return True
        deadline = time.monotonic() + timeout_s
        self._is_awaited = True
        try:
            while True:
                self._arrived.clear()
                if self._messages:
                    return True
                remaining_s = deadline - time.monotonic()
                # A `set` may be late, of a message long taken: then look again, and wait for the rest of the time.
                if remaining_s <= 0 or not self._arrived.wait(remaining_s):
                    return bool(self._messages)
        finally:
            self._is_awaited = False
