"""Threads that own a connection each, and calls that several of them work on at once.

Why threads: on a loop each 64 KiB or so of a value is a callback, and beside a thread that spins in Python (the engine, while it
waits for a load) each of those may wait a whole switch interval, 5 ms, for the interpreter lock. A thread in a blocking system
call waits once per call, for as much as the call moved.

What makes it safe to hand a thread the caller's memory: a call that is stopped shuts the connections that are in its buffers,
which ends those system calls at once, and is quiet only when the threads have said that they left.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from kvoffload.errors import PeerError
from kvoffload.l2.resp import ProtocolError, RespSocket

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0


class ConnectError(PeerError):
    """A connection could not be made; the text says where to, and what was the matter."""


class Piece(Protocol):
    """One connection's share of a call."""

    call: Call
    answered: int
    """How many of its questions have their answer."""
    is_probe: bool
    """Whether to connect even where that failed a moment ago."""

    def run(self, connection: RespSocket) -> None:
        """Ask what is not answered yet, and take down the answers. Raises OSError, or `ProtocolError`."""


class Call:
    """What a caller on the loop waits for: ``quiet`` is set when no thread works on it, and none will."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._left = 0
        self._inside: set[Lane] = set()
        self.quiet = asyncio.Event()
        self._waiter: asyncio.Future[None] | None = None
        self.is_stopped = False
        self.error: BaseException | None = None

    async def wait(self, timeout_s: float) -> bool:
        """Whether it was quiet within so many seconds. (A scope and an event would do as well, for three times the time.)"""
        if self.quiet.is_set():
            return True
        self._waiter = waiter = self._loop.create_future()
        timer = self._loop.call_later(max(0.0, timeout_s), _give_up, waiter)
        try:
            await waiter
        finally:
            timer.cancel()
        return self.quiet.is_set()

    def expect(self, pieces: int) -> None:
        """On the loop, before any of its pieces is handed out."""
        self._left = pieces
        if not pieces:
            self._become_quiet()

    def enter(self, lane: Lane) -> bool:
        """A thread is about to touch the buffers: may it?"""
        with self._lock:
            if not self.is_stopped:
                self._inside.add(lane)
            return not self.is_stopped

    def leave(self, lane: Lane) -> None:
        """It touches them no more."""
        with self._lock:
            self._inside.discard(lane)
            if self.is_stopped and not self._inside:
                self._tell()

    def finish(self, error: BaseException | None) -> None:
        """A piece is over, however it went; ``error`` is a bug, and raised to the caller."""
        with self._lock:
            self._left -= 1
            self.error = self.error or error
            if not self._left and not self._inside:
                self._tell()

    def stop(self) -> None:
        """On the loop: break off what runs, let nothing else begin. `quiet` says when that is so."""
        with self._lock:
            self.is_stopped = True
            for lane in self._inside:
                lane.shut()
            if not self._inside:
                self._become_quiet()

    def _tell(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed over it
            self._loop.call_soon_threadsafe(self._become_quiet)

    def _become_quiet(self) -> None:
        self.quiet.set()
        if self._waiter is not None:
            _give_up(self._waiter)


class Connector:
    """Makes connections to one server; after a failure only every so often (a pause that doubles up to 2 s, with jitter)."""

    def __init__(self, connect: Callable[[], RespSocket], clock: Callable[[], float]) -> None:
        """``connect`` raises `ConnectError`."""
        self._connect = connect
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._not_before = 0.0
        self.trouble = ""
        """The last failure of a connection, in words."""
        self.renewals = 0
        """How often a connection took the place of one that was lost."""

    def connect(self, is_probe: bool, is_renewal: bool = False) -> RespSocket:
        if not is_probe and self._clock() < self._not_before:
            raise ConnectError(self.trouble)
        try:
            connection = self._connect()
        except ConnectError as error:
            with self._lock:
                self.trouble = str(error)
                if self._clock() >= self._not_before:  # those that tried at the same time count as one
                    pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**self._failures) * random.uniform(0.5, 1.0)
                    self._failures = min(self._failures + 1, 10)
                    self._not_before = self._clock() + pause_s
            raise
        with self._lock:
            self._failures, self._not_before = 0, 0.0
            self.renewals += is_renewal
        return connection


class Lane:
    """A thread and its connection. Ends when its pool is closed."""

    def __init__(self, pool: Pool, connector: Connector, is_reserved: bool) -> None:
        self._pool = pool
        self._connector = connector
        self._is_reserved = is_reserved
        self._connection: RespSocket | None = None
        self._has_lost = False
        """The last connection, otherwise than by a caller who was out of time."""

    def run(self) -> None:
        try:
            while self._serve_next():
                pass
        finally:
            self._drop()
            self._pool.left()

    def shut(self) -> None:
        """From any thread, while inside a call: what it waits for on its connection fails now."""
        connection = self._connection
        if connection is not None:
            connection.shut()

    def _serve_next(self) -> bool:
        piece = self._pool.take(self._is_reserved)  # held by nothing else while this waits: it refers to the caller's memory
        if piece is None:
            return False
        error: BaseException | None = None
        try:
            self._serve(piece)
        except ConnectError:
            pass  # what is not answered has failed
        except BaseException as bug:
            self._drop()
            error = bug
        if piece.call.is_stopped:
            self._drop()  # it may have been shut
        piece.call.finish(error)
        return True

    def _serve(self, piece: Piece) -> None:
        """Do all of it over one connection; over a new one once more if the old had gone stale, or had to be given up on the way."""
        while not piece.call.is_stopped:
            was_open = self._connection is not None
            if self._connection is None:
                self._connection = self._connector.connect(piece.is_probe, self._has_lost)
                self._has_lost = False
            connection = self._connection
            if not piece.call.enter(self):
                return
            before = piece.answered
            trouble = ""
            try:
                piece.run(connection)
                if not connection.is_clean:
                    trouble = "the server said more than it was asked"
            except (OSError, ProtocolError) as error:
                trouble = str(error) or type(error).__name__
            finally:
                piece.call.leave(self)  # before it is closed: nobody shuts a descriptor that is another's by then
            if not trouble:
                return
            self._drop()
            self._has_lost = not piece.call.is_stopped
            self._connector.trouble = trouble
            if not was_open and piece.answered == before:
                return

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


class Pool:
    """The lanes to one server, and what waits for one. Urgent pieces go first; one lane of several takes nothing else."""

    def __init__(self, name: str, lanes: int, connector: Connector) -> None:
        self.connector = connector
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._urgent_work = threading.Condition(self._lock)
        self._urgent: deque[Piece] = deque()
        self._bulk: deque[Piece] = deque()
        self._is_closed = False
        self._alive = lanes
        self._when_empty: list[Callable[[], None]] = []
        for index in range(lanes):
            lane = Lane(self, connector, is_reserved=index == 0 and lanes > 1)
            threading.Thread(target=lane.run, name=f"kvoffload-{name}-{index}", daemon=True).start()

    def submit(self, pieces: Iterable[Piece], *, is_urgent: bool) -> None:
        with self._lock:
            queue = self._urgent if is_urgent else self._bulk
            before = len(queue)
            queue.extend(pieces)
            self._work.notify(len(queue) - before)
            if is_urgent:
                self._urgent_work.notify()

    def take(self, is_reserved: bool) -> Piece | None:
        """The next piece, as soon as there is one; None when the pool is closed."""
        with self._lock:
            while not self._is_closed:
                if self._urgent:
                    return self._urgent.popleft()
                if self._bulk and not is_reserved:
                    return self._bulk.popleft()
                (self._urgent_work if is_reserved else self._work).wait()
            return None

    def forget(self, call: Call) -> None:
        """Drop the pieces of a stopped call that nobody has taken."""
        with self._lock:
            self._urgent = deque(piece for piece in self._urgent if piece.call is not call)
            self._bulk = deque(piece for piece in self._bulk if piece.call is not call)

    def left(self) -> None:
        """A lane has ended."""
        with self._lock:
            self._alive -= 1
            callbacks = self._when_empty if not self._alive else []
        for callback in callbacks:
            callback()

    async def close(self, timeout_s: float) -> None:
        """End the lanes, and wait so long for them: one that is connecting ends after that."""
        loop, empty = asyncio.get_running_loop(), asyncio.Event()
        with self._lock:
            self._is_closed = True
            dropped = [*self._urgent, *self._bulk]
            self._urgent.clear()
            self._bulk.clear()
            if not self._alive:
                empty.set()
            self._when_empty.append(lambda: _set_soon(loop, empty))
            self._work.notify_all()
            self._urgent_work.notify_all()
        for piece in dropped:
            piece.call.finish(None)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(empty.wait(), timeout_s)


def _give_up(waiter: asyncio.Future[None]) -> None:
    """Whoever waits looks for itself."""
    if not waiter.done():
        waiter.set_result(None)


def _set_soon(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the loop was closed over it
        loop.call_soon_threadsafe(event.set)
