"""A short transfer without its lane's thread: two hand-overs take longer than the server, and beside a busy engine ten times as long."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from kvoffload.l2 import infinistore_socket as wired
from kvoffload.l2.infinistore_lane import Lane
from kvoffload.l2.infinistore_transfers import Transfer


class Timer(Protocol):
    def cancel(self) -> None: ...


class Loop(Protocol):
    """What of asyncio's is used."""

    def call_later(self, delay: float, callback: Callable[[], None], /) -> Timer: ...
    def add_reader(self, fd: int, callback: Callable[[], None], /) -> None: ...
    def add_writer(self, fd: int, callback: Callable[[], None], /) -> None: ...
    def remove_reader(self, fd: int, /) -> bool: ...
    def remove_writer(self, fd: int, /) -> bool: ...


class Drive:
    """The loop's thread at a transfer, over the connection of a lane that is idle otherwise. It waits for nothing.

    What does not go as it mostly does, and what is stopped or late, is left to the lane's thread where it is: there are the rules of
    what is owed to the server, and there alone. From then on nothing here touches the caller's memory.
    """

    __slots__ = ("_awaited", "_fd", "_is_over", "_lane", "_left_s", "_loop", "_on_over", "_timer", "_transfer")

    def __init__(
        self,
        loop: Loop,
        lane: Lane,
        transfer: Transfer,
        left_s: Callable[[], float],
        on_over: Callable[[Lane, Transfer], None],
    ) -> None:
        """``transfer`` has been claimed. ``left_s``: seconds until its deadline. ``on_over``: it was done, and the lane is idle again."""
        self._loop = loop
        self._lane = lane
        self._transfer = transfer
        self._left_s = left_s
        self._on_over = on_over
        self._fd = lane.fd
        self._awaited: int | None = None
        self._is_over = False
        self._timer: Timer | None = None

    def start(self) -> bool:
        """Whether it is done at once; ``on_over`` is not called then."""
        try:
            self._transfer.begin(self._left_s(), may_wait=False)
        except BaseException as bug:
            self._transfer.error = bug
            self.leave(wired.EXPIRED)  # nothing was sent
            return False
        return self._is_done()

    def leave(self, status: int = wired.AWAITS_BYTES) -> None:
        """To the lane's thread, unless it was already. ``status`` is the transfer's last."""
        if not self._is_over:
            self._forget()
            self._lane.take_over(self._transfer, status)

    def _go_on(self) -> None:
        if not self._is_over and self._is_done():
            self._on_over(self._lane, self._transfer)

    def _is_done(self) -> bool:
        transfer = self._transfer
        try:
            status = transfer.transfer(self._fd)
            if status == wired.OK:
                transfer.conclude(status)
        except BaseException as bug:
            transfer.error = bug
            transfer.stop()
            status = wired.TOO_LONG
        if status == wired.OK and not transfer.is_unfinished:
            self._forget()
            return True
        if status not in (wired.AWAITS_BYTES, wired.AWAITS_ROOM) or not self._can_await(status):
            self.leave(status)
        return False

    def _can_await(self, status: int) -> bool:
        try:
            if self._timer is None:
                self._timer = self._loop.call_later(self._left_s(), self.leave)
            if status != self._awaited:
                self._unwatch()
                (self._loop.add_writer if status == wired.AWAITS_ROOM else self._loop.add_reader)(self._fd, self._go_on)
                self._awaited = status
        except (OSError, RuntimeError, NotImplementedError):  # no more may be watched; closed; a loop that cannot
            return False
        return True

    def _forget(self) -> None:
        """The connection is the lane's again."""
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()
        with suppress(RuntimeError):  # the loop was closed over it
            self._unwatch()

    def _unwatch(self) -> None:
        awaited, self._awaited = self._awaited, None
        if awaited is not None:
            (self._loop.remove_writer if awaited == wired.AWAITS_ROOM else self._loop.remove_reader)(self._fd)
