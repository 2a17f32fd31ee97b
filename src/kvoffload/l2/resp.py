"""RESP2 over a blocking socket, of which values go straight from and into the caller's memory.

redis-py connects (URL, TLS, password, database); it does not move the values, since its clients take a lock acquisition per
64 KiB of a value and copy it three times. Here a value costs two system calls to read, without the interpreter lock for as long as
values are as expected (`kvoffload.l2.resp_native`), and a batch of writes one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import ssl
from array import array
from collections.abc import Callable, Sequence
from ctypes import addressof, c_char

from kvoffload.errors import PeerError, UnsupportedError
from kvoffload.l2 import resp_native as native
from kvoffload.observe.logs import get_logger

CRLF = b"\r\n"
_SCRATCH_BYTES = 4096  # replies' first lines, and as much of a value as arrives together with its own


class ProtocolError(PeerError):
    """The server sent what RESP2 does not allow here; the connection is of no use any more."""


class RespSocket:
    """A connected blocking socket, for one thread; only `shut` may be called from another.

    Everything raises OSError when the connection is lost or was shut, and `ProtocolError`. Either way it must be closed.
    """

    def __init__(self, sock: socket.socket, close: Callable[[], None]) -> None:
        self._socket = sock
        self.close = close
        self._is_tls = isinstance(sock, ssl.SSLSocket)
        self._memory = bytearray(_SCRATCH_BYTES)
        self._scratch = memoryview(self._memory)
        self._scratch_address = addressof(c_char.from_buffer(self._memory))
        self._control = array("q", bytes(8 * native.CONTROL_WORDS))
        self._start = self._end = 0
        self._trouble: Exception | None = None
        self._read_native = None if self._is_tls else compiled_reader()

    @property
    def is_clean(self) -> bool:
        """Whether nothing was received beyond what has been read."""
        return self._start == self._end

    def send(self, parts: Sequence[bytes | memoryview]) -> None:
        """Send all of these, at most 1024, in one call where the kernel takes them so."""
        if self._is_tls:
            for part in parts:
                self._socket.sendall(part)
            return
        left = list(parts)
        while left:
            left = _after(left, self._socket.sendmsg(left, (), socket.MSG_NOSIGNAL))

    def read_line(self) -> bytes:
        """A reply's first line, without its CRLF."""
        while (end := self._memory.find(CRLF, self._start, self._end)) < 0:
            self._fill()
        line = bytes(self._scratch[self._start : end])
        self._start = end + 2
        return line

    def read_lines(self, most: int) -> list[bytes]:
        """As many lines as have come, one at least and ``most`` at most."""
        lines = [self.read_line()]
        ready = self._memory.count(CRLF, self._start, self._end)
        if 0 < ready < most:
            end = self._memory.rindex(CRLF, self._start, self._end)
            lines += bytes(self._scratch[self._start : end]).split(CRLF)
            self._start = end + 2
        else:
            lines += [self.read_line() for _ in range(min(ready, most - 1))]
        return lines

    def read_values(self, buffers: Sequence[memoryview]) -> int:
        """Fill these with the values of the next answers, as far as those are values of just their lengths; how many were.

        Where it is fewer, the answer behind them is another one, or the next read raises what is the matter. 0 over TLS, and where numba
        cannot compile: `read_line` and `read_value` do it then.
        """
        if self._read_native is None or not buffers:
            return 0
        plan = array("q")
        for buffer in buffers:
            plan.append(addressof(c_char.from_buffer(buffer)))
            plan.append(len(buffer))
        control = self._control
        control[native.START], control[native.END], control[native.ITEM] = self._start, self._end, 0
        status = self._read_native(
            self._socket.fileno(),
            len(buffers),
            plan.buffer_info()[0],
            self._scratch_address,
            _SCRATCH_BYTES,
            control.buffer_info()[0],
        )
        self._start, self._end = control[native.START], control[native.END]
        if status == native.CLOSED:
            number = control[native.ERRNO]
            self._trouble = OSError(number, os.strerror(number)) if number else ConnectionResetError("the node closed the connection")
        elif status == native.NONSENSE:
            self._trouble = ProtocolError("a value is not followed by CRLF")
        return control[native.ITEM]

    def read_value(self, buffer: memoryview) -> None:
        """The bytes of a bulk string as long as ``buffer``, and the CRLF behind it."""
        ready = min(self._end - self._start, len(buffer))
        buffer[:ready] = self._scratch[self._start : self._start + ready]
        self._start += ready
        if ready < len(buffer):
            self._start, self._end = 0, 2
            self._receive([buffer[ready:], self._scratch[:2]])
        while self._end - self._start < 2:
            self._fill()
        if self._scratch[self._start : self._start + 2] != CRLF:
            raise ProtocolError("a value is not followed by CRLF")
        self._start += 2

    def skip_value(self, length: int) -> None:
        """Drop a bulk string of ``length`` bytes, and the CRLF behind it."""
        left = length + 2
        while left:
            if self.is_clean:
                self._fill()
            ready = min(self._end - self._start, left)
            self._start += ready
            left -= ready

    def shut(self) -> None:
        """Make every call on it fail, also one that another thread is in now."""
        with contextlib.suppress(OSError):  # it was closed, or lost, before
            socket.socket.shutdown(
                self._socket, socket.SHUT_RDWR
            )  # not SSLSocket's own, which takes the TLS state from under the other thread

    def _fill(self) -> None:
        """Receive something more into the scratch."""
        if self._trouble is not None:
            raise self._trouble
        if self._start:
            self._scratch[: self._end - self._start] = bytes(self._scratch[self._start : self._end])
            self._start, self._end = 0, self._end - self._start
        if self._end == len(self._scratch):
            raise ProtocolError("a reply's first line does not end")
        count = self._socket.recv_into(self._scratch[self._end :])
        if not count:
            raise ConnectionResetError("the node closed the connection")
        self._end += count

    def _receive(self, views: list[memoryview]) -> None:
        """Fill all of these: in one call, with the interpreter lock released, save over TLS, where each record is one."""
        left: list[bytes | memoryview] = list(views)
        while left:
            count = self._socket.recv_into(left[0]) if self._is_tls else self._socket.recvmsg_into(left, 0, socket.MSG_WAITALL)[0]
            if not count:
                raise ConnectionResetError("the node closed the connection")
            left = _after(left, count)


@functools.cache
def compiled_reader() -> Callable[..., int] | None:
    """`kvoffload.l2.resp_native.read_values`, or None where numba cannot compile. The first call takes a while."""
    try:
        return native.read_values()
    except UnsupportedError as error:
        get_logger("l2").warning("values are read with the interpreter lock, which is slower", reason=str(error))
        return None


def command(*words: bytes) -> bytes:
    """A request."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


def commands(word: bytes, names: Sequence[bytes]) -> bytes:
    """`command` of ``word`` and each of these, one after another."""
    if len(set(map(len, names))) > 1:
        return b"".join([command(word, name) for name in names])
    between = b"\r\n*2\r\n$%d\r\n%b\r\n$%d\r\n" % (len(word), word, len(names[0]) if names else 0)
    return between[2:] + between.join(names) + CRLF if names else b""


def bulk_length(line: bytes) -> int | None:
    """The length of the bulk string that ``line`` announces; None for a nil. Raises `ProtocolError` where it announces none."""
    if line == b"$-1":
        return None
    if line[:1] != b"$" or not line[1:].isdigit():
        raise ProtocolError(f"not what was asked for: {line[:80]!r}")
    return int(line[1:])


def _after(parts: list[bytes | memoryview], count: int) -> list[bytes | memoryview]:
    """What is left of ``parts`` after its first ``count`` bytes."""
    for index, part in enumerate(parts):
        if count < len(part):
            return [memoryview(part)[count:], *parts[index + 1 :]]
        count -= len(part)
    return []
