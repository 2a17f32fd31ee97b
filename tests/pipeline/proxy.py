"""A TCP proxy before a real server that slows, holds and resets what goes through it."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Literal, Self

Way = Literal["get", "put"]
"""The direction of a transfer's bytes: of reads from the server, of writes to it."""

CHUNK = 16 << 10
"""Large enough for a whole pointer: what is sent in one piece arrives in one piece."""
_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """Listens on ``port`` of 127.0.0.1 for a server on ``target``, which may change. Handles are for any thread.

    An engine that hangs up hangs up on the server too. Where the proxy itself resets a connection, the server hears nothing of it, and
    what it has still to say is read to the end: a network that fails may be what ends a server, and is not what is tested here.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.bytes_per_s: float | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._closed = threading.Event()
        self._pace = threading.Lock()
        self._lock = threading.Lock()
        self._pairs: set[_Pair] = set()
        self._threads: list[threading.Thread] = []
        self._hold: tuple[Way, int] | None = None
        self._reset_after: int | None = None
        self._passed = 0
        self._held, self._go_on = threading.Event(), threading.Event()
        self._begin(self._accept)

    def hold_after(self, way: Way, passed: int) -> None:
        """From the next bytes on, let so many pass that way, and then none until `release`."""
        self._held.clear()
        self._go_on.clear()
        with self._lock:
            self._passed, self._hold = 0, (way, passed)

    def wait_held(self, timeout_s: float) -> bool:
        """Whether bytes are being held."""
        return self._held.wait(timeout_s)

    def release(self) -> None:
        """Hold no more."""
        self._hold = None
        self._go_on.set()

    def reset_after(self, passed: int | None) -> None:
        """Reset each connection after so many bytes of both ways; None: no more."""
        self._reset_after = passed

    def reset(self) -> None:
        """Reset all connections."""
        for pair in list(self._pairs):
            pair.reset()

    def close(self) -> None:
        self._closed.set()
        self.release()
        self._listener.close()
        for pair in list(self._pairs):
            pair.reset()
            pair.end()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------ inside

    def _begin(self, run: Callable[[], None]) -> None:
        thread = threading.Thread(target=run, name="proxy", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        self._listener.settimeout(0.05)
        while not self._closed.is_set():
            try:
                client = self._listener.accept()[0]
            except TimeoutError:
                continue
            except OSError:
                return
            self._join(client)

    def _join(self, client: socket.socket) -> None:
        client.settimeout(None)
        try:
            server = socket.create_connection(("127.0.0.1", self.target), timeout=5)
        except OSError:
            _reset(client)
            return
        server.settimeout(None)
        for side in (client, server):
            side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pair = _Pair(client, server)
        self._pairs.add(pair)
        self._begin(lambda: self._pump(pair, client, server, "put"))
        self._begin(lambda: self._pump(pair, server, client, "get"))

    def _pump(self, pair: _Pair, source: socket.socket, sink: socket.socket, way: Way) -> None:
        try:
            while data := source.recv(CHUNK):
                if way == "get":
                    source.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
                self._let_pass(way, len(data))
                if not pair.is_reset:
                    with suppress(OSError):  # of a reset that came between
                        sink.sendall(data)
                    pair.passed += len(data)
                    if self._reset_after is not None and pair.passed >= self._reset_after:
                        pair.reset()
            if pair.is_reset and way == "put":
                return  # of our own doing: the server is not to know
            with suppress(OSError):
                sink.shutdown(socket.SHUT_RDWR)
        except OSError:
            if not (pair.is_reset and way == "put"):
                _reset(sink)
        finally:
            if way == "get":
                pair.end()
                self._pairs.discard(pair)

    def _let_pass(self, way: Way, count: int) -> None:
        with self._lock:
            self._passed += count * (self._hold is not None and self._hold[0] == way)
            is_held = self._hold is not None and self._hold[0] == way and self._passed > self._hold[1]
        if is_held:
            self._held.set()
            self._go_on.wait()
        rate = self.bytes_per_s
        if rate is not None:
            with self._pace:
                self._closed.wait(count / rate)


class _Pair:
    """The two connections of one client."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.is_reset = False
        self.passed = 0

    def reset(self) -> None:
        """The client's side alone."""
        self.is_reset = True
        _reset(self.client)

    def end(self) -> None:
        for side in (self.client, self.server):
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
            side.close()


def _reset(side: socket.socket) -> None:
    """RST instead of FIN, also under a thread that waits for bytes of it."""
    with suppress(OSError):
        side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        side.shutdown(socket.SHUT_RD)
    side.close()
