"""A connection to an InfiniStore server, and the thread that it belongs to."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue

from kvoffload.l2 import infinistore_socket as wired
from kvoffload.l2.infinistore_transfers import Transfer
from kvoffload.observe.logs import get_logger

log = get_logger("l2")

LINGER_S = 60.0
_FINISH_ROUND_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Server:
    """Where it is, and how long connecting may take."""

    host: str
    port: int
    connect_timeout_s: float

    def connect(self) -> socket.socket:
        """Raises OSError. A name's addresses are tried in turn; looking the name up takes as long as the resolver takes."""
        until = time.monotonic() + self.connect_timeout_s
        error: OSError = OSError(f"{self.host} has no address")
        for family, kind, protocol, _, address in socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM):
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(max(0.001, until - time.monotonic()))
                connection.connect(address)
                connection.settimeout(None)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                # Connections are kept until they have their answers, however late: only a machine that is gone ends them.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 3)):
                    connection.setsockopt(socket.IPPROTO_TCP, option, value)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000)
            except OSError as trouble:
                connection.close()
                error = trouble
            else:
                return connection
        raise error


@dataclass(frozen=True, slots=True)
class Report:
    """From a lane, on its thread. ``released``: the caller of this transfer may have its answer and its memory."""

    lane: Lane
    released: Transfer | None = None
    is_idle: bool = False
    is_open: bool = False
    """Whether it has a connection."""
    has_failed: bool = False
    """It had no connection and has none now: the next should not be tried at once."""
    has_ended: bool = False
    connecting_for: Transfer | None = None
    """It connects anew for this one, which nobody has claimed meanwhile: who calls must see to the deadline."""


class Lane:
    """Serves one transfer at a time. Ends, with its connection, when told to and when the server owes it nothing."""

    def __init__(self, name: str, server: Server, clock: Callable[[], float], report: Callable[[Report], None]) -> None:
        self._server = server
        self._clock = clock
        self._report = report
        self._transfers: SimpleQueue[Transfer | None] = SimpleQueue()
        self._socket: socket.socket | None = None
        self._give_up_at = float("inf")
        self._has_lost = False
        self.renewals = 0
        """How often a connection took the place of one that was lost."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def give(self, transfer: Transfer) -> None:
        """From the loop, when idle."""
        self._transfers.put(transfer)

    def take_over(self, transfer: Transfer, status: int) -> None:
        """From the loop: go on with what its thread began over this connection; ``status`` is the last that came of it."""
        transfer.leave(status)
        self._transfers.put(transfer)

    @property
    def fd(self) -> int:
        """Of its connection. From the loop, when it is idle and has one: it stays open for as long as nothing is given to it."""
        assert self._socket is not None
        return self._socket.fileno()

    def end(self) -> None:
        """From the loop: after what it is at. An answer that has not come by `LINGER_S` from now is not waited for any longer."""
        self._give_up_at = time.monotonic() + LINGER_S
        self._transfers.put(None)

    def _run(self) -> None:
        try:
            while (transfer := self._transfers.get()) is not None:
                self._serve(transfer)
                del transfer  # it refers to the caller's memory
        finally:
            self._drop()
            self._report(Report(self, has_ended=True))

    def _serve(self, transfer: Transfer) -> None:
        was_new = self._socket is None
        try:
            status = self._attempt(transfer)
        except BaseException as bug:
            transfer.error, status = bug, wired.CLOSED
        released: Transfer | None = transfer
        if status in (wired.OK, wired.EXPIRED) and transfer.is_unfinished:
            self._report(Report(self, released=transfer))
            released = None
            status = self._finish(transfer)
        if status not in (wired.OK, wired.EXPIRED):
            self._drop(is_lost=status != wired.REFUSED)
        is_open = self._socket is not None
        self._report(Report(self, released=released, is_idle=True, is_open=is_open, has_failed=was_new and not is_open))

    def _attempt(self, transfer: Transfer) -> int:
        """Over the connection that there is, or a new one; if that there is has gone stale meanwhile, over a new one."""
        is_claimed, status = transfer.was_left, wired.CLOSED
        for is_last in (self._socket is None, True):
            if self._socket is None:
                try:
                    self._socket = self._server.connect()
                except (OSError, UnicodeError) as error:
                    transfer.trouble = f"cannot connect: {_words(error)}"
                    if is_claimed or transfer.claim():
                        transfer.conclude(wired.CLOSED)
                    return wired.CLOSED
                self.renewals += self._has_lost
                self._has_lost = False
            is_claimed = is_claimed or transfer.claim()
            if not is_claimed:
                return wired.OK
            status = transfer.run(self._socket.fileno(), transfer.deadline - self._clock())
            if status != wired.STALE:
                break
            self._drop()
            if is_last:
                transfer.trouble = "it hung up at once, or spoke first: is this the data port of an InfiniStore server?"
                transfer.conclude(wired.CLOSED)
                break
            # To connect may take longer than the caller has: until that is done it may be withdrawn.
            is_claimed = False
            transfer.give_back()
            self._report(Report(self, connecting_for=transfer))
        return status

    def _finish(self, transfer: Transfer) -> int:
        """Until the server owes nothing: see `Transfer` for why. A server may be frozen for long and be well afterwards."""
        assert self._socket is not None
        status = wired.EXPIRED
        while status == wired.EXPIRED and time.monotonic() < self._give_up_at:
            try:
                status = transfer.finish(self._socket.fileno(), time.monotonic_ns() + _FINISH_ROUND_NS)
            except BaseException as bug:  # nobody waits for it any more
                log.exception("could not finish a transfer", error=str(bug))
                return wired.CLOSED
        return wired.CLOSED if status == wired.EXPIRED else status

    def _drop(self, *, is_lost: bool = True) -> None:
        connection, self._socket = self._socket, None
        if connection is not None:
            self._has_lost = is_lost
            with suppress(OSError):
                connection.close()


def _words(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time: is it the right address, is it behind a firewall?"
    if isinstance(error, ConnectionRefusedError):
        return "refused: nothing listens there"
    return str(error) or type(error).__name__
