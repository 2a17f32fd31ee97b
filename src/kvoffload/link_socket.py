"""The unix socket under the link: a meeting place that leaves nothing behind, peers that are checked, descriptors that never leak.

The worker half listens before its address goes into vLLM's handshake metadata; the hub connects. Either end checks that the other
runs as the same user, and the hub that it is the process that it was told of; the hub proves that it was told the token.

The socket's name is an abstract one (unix(7)): it lives in no file system, so it goes with the socket however the process ends. A file
in a directory of its own, which keeps others out by its mode, stays behind when the process is killed before the hub has come.
"""

from __future__ import annotations

import array
import errno
import hmac
import os
import secrets
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock

import anyio
from anyio.lowlevel import checkpoint

from kvoffload.errors import PeerError, UnsupportedError
from kvoffload.link_frames import HEADER_BYTES, Goodbye, Knock, decode, encode, frame_bytes
from kvoffload.observe.logs import get_logger

log = get_logger("link")

LINK_VERSION = 1
_KNOCK_TIMEOUT_S = 5.0
_MOST_DESCRIPTORS = 4
_UCRED = struct.Struct("3i")  # pid, uid, gid: SO_PEERCRED in unix(7)


@dataclass(frozen=True, slots=True)
class LinkAddress:
    """Where a worker half listens; plain values, for vLLM's handshake metadata. The token is a secret: not in the repr."""

    name: str
    pid: int
    token: bytes = field(repr=False)


class RawConnection:
    """A connected stream socket, non-blocking, which it owns. What does I/O raises `PeerError` when the peer is gone."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock

    def close(self) -> None:
        """Idempotent; nobody may be waiting on it."""
        self._socket.close()

    @property
    def is_closed(self) -> bool:
        return self._socket.fileno() < 0

    def peer(self) -> tuple[int, int]:
        """The pid and uid that the other process had when it connected, or listened."""
        pid, uid, _ = _UCRED.unpack(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        return pid, uid

    async def receive(self, most: int) -> bytes:
        """At least one byte, at most ``most``. Descriptors that come along are not taken: the kernel closes them."""
        while True:
            await anyio.wait_readable(self._socket)
            try:
                data = self._socket.recv(most)
            except BlockingIOError:
                continue
            except OSError as error:
                raise _lost(error) from error
            if not data:
                raise PeerError("the peer closed the connection, or died")
            return data

    async def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """All of ``data``; the descriptors (duplicated for the peer; ours stay open) go with its first byte."""
        view = memoryview(data)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        while view:
            try:
                # Python ignores SIGPIPE, but the host program may have changed that.
                sent = self._socket.sendmsg([view], rights, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                await anyio.wait_writable(self._socket)
                continue
            except OSError as error:
                raise _lost(error) from error
            view, rights = view[sent:], []
        await checkpoint()

    def send_nowait(self, data: bytes) -> bool:
        """For last words: True if all of it went into the socket's buffer at once."""
        try:
            return self._socket.send(data, socket.MSG_NOSIGNAL) == len(data)
        except OSError:
            return False

    async def receive_message(self, descriptors: int = 0) -> tuple[object, list[int]]:
        """One message of the handshake, not a byte more, and exactly so many descriptors: close-on-exec, and the caller's."""
        received: list[int] = []
        try:
            header = await self._receive_exactly(HEADER_BYTES, received)
            payload = await self._receive_exactly(frame_bytes(header), received)
            message = decode(header[4], payload)
            if isinstance(message, Goodbye):
                raise PeerError(f"the peer refused: {message.reason}")
            if len(received) != descriptors:
                raise PeerError(f"{len(received)} descriptors came with {type(message).__name__}, and not {descriptors}")
        except BaseException:
            close_descriptors(received)
            raise
        return message, received

    async def _receive_exactly(self, count: int, descriptors: list[int]) -> bytes:
        data = b""
        while len(data) < count:
            await anyio.wait_readable(self._socket)
            try:
                piece, ancillary, flags, _ = self._socket.recvmsg(
                    count - len(data), socket.CMSG_SPACE(4 * _MOST_DESCRIPTORS), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                continue
            except OSError as error:
                raise _lost(error) from error
            for level, kind, rights in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    descriptors += array.array("i", rights[: len(rights) - len(rights) % 4])
            if flags & socket.MSG_CTRUNC:
                raise PeerError(f"more than {_MOST_DESCRIPTORS} descriptors in one message on the link, or no room for them here")
            if not piece:
                raise PeerError("the peer closed the connection during the handshake, or died")
            data += piece
        return data


def close_descriptors(descriptors: Sequence[int]) -> None:
    """Close each; one that is closed already is no error."""
    for descriptor in descriptors:
        try:
            os.close(descriptor)
        except OSError as error:
            if error.errno != errno.EBADF:
                log.warning("close_failed", descriptor=descriptor, error=repr(error))


class Listener:
    """A listening socket under a random abstract name. For one connection."""

    def __init__(self, sock: socket.socket, address: LinkAddress) -> None:
        sock.setblocking(False)
        self.address = address
        self._socket = sock
        self._lock = Lock()
        self._is_open = True
        self._is_accepting = False

    def close(self) -> None:
        """Stop listening, at once. Idempotent, from any thread: a waiting `accept` ends."""
        with self._lock:
            if self._is_open:
                self._is_open = False
                # One that waits must be the one that closes: the number of a closed descriptor is soon somebody else's.
                with suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
            if not self._is_accepting:
                self._socket.close()

    async def accept(self, timeout_s: float | None) -> RawConnection:
        """The first peer of this user that knows the token; others are turned away. Then, and on every error, the listener closes.

        Raises `PeerError` when nobody came in time (None: wait for ever), and when it is closed.
        """
        with self._lock:
            if not self._is_open:
                raise PeerError("nobody can connect any more: the listener is closed")
            self._is_accepting = True
        try:
            with anyio.fail_after(timeout_s):
                while True:
                    connection = await self._accept()
                    if await self._knows_token(connection):
                        return connection
        except TimeoutError as error:
            raise PeerError(f"the hub did not connect to {self.address.name} within {timeout_s} s") from error
        finally:
            with self._lock:
                self._is_accepting = False
            self.close()

    async def _accept(self) -> RawConnection:
        while True:
            await anyio.wait_readable(self._socket)
            # Asked first: on Linux a socket that was shut down is readable for ever, and accept still says "try again".
            if not self._is_open:
                raise PeerError("nobody can connect any more: the listener was closed")
            try:
                return RawConnection(self._socket.accept()[0])
            except (BlockingIOError, ConnectionAbortedError):
                continue
            except OSError as error:
                raise PeerError(f"nobody can connect: {error}") from error

    async def _knows_token(self, connection: RawConnection) -> bool:
        try:
            check_user(connection)
            with anyio.fail_after(_KNOCK_TIMEOUT_S):
                knock, _ = await connection.receive_message()
            if not isinstance(knock, Knock) or not hmac.compare_digest(knock.token, self.address.token):
                raise PeerError("it does not know the token")
            if knock.version != LINK_VERSION:
                connection.send_nowait(encode(Goodbye(f"this worker speaks version {LINK_VERSION} of the link, not {knock.version}")))
                raise PeerError(f"it speaks version {knock.version} of the link, and this process version {LINK_VERSION}")
        except (PeerError, TimeoutError) as error:
            connection.close()
            log.warning("link_peer_turned_away", reason=str(error) or "it said nothing")
            return False
        except BaseException:
            connection.close()
            raise
        return True


def listen() -> Listener:
    """Make a meeting place. Raises `UnsupportedError` when no socket can be made."""
    name = f"kvoffload-{secrets.token_hex(16)}"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)  # close-on-exec, as all of Python's
    try:
        sock.bind(_abstract(name))
        sock.listen(8)
    except OSError as error:
        sock.close()
        raise UnsupportedError(f"no unix socket can be made for the link: {error}") from error
    return Listener(sock, LinkAddress(name, os.getpid(), secrets.token_bytes(32)))


def _abstract(name: str) -> str:
    return "\0" + name


async def connect(address: LinkAddress, timeout_s: float) -> RawConnection:
    """Connect to a listening worker half, check who it is, and knock. Raises `PeerError`."""
    connection = RawConnection(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    try:
        with anyio.fail_after(timeout_s):
            await _connect(connection, address.name)
            check_user(connection)
            pid, _ = connection.peer()
            if pid != address.pid:
                raise PeerError(f"process {pid} listens at {address.name}, and not {address.pid}, as the handshake said")
            await connection.send(encode(Knock(LINK_VERSION, address.token)))
    except TimeoutError as error:
        connection.close()
        raise PeerError(f"the worker at {address.name} did not accept within {timeout_s} s") from error
    except BaseException:
        connection.close()
        raise
    return connection


async def _connect(connection: RawConnection, name: str) -> None:
    while True:
        try:
            connection._socket.connect(_abstract(name))
        except BlockingIOError:  # the queue of the listener is full
            await anyio.sleep(0.01)
        except OSError as error:
            raise PeerError(f"the worker at {name} cannot be reached: {error}") from error
        else:
            return


def check_user(connection: RawConnection, uid: int | None = None) -> None:
    """Raises `PeerError` unless the peer runs as this user (or as ``uid``), and in a process that this one can see."""
    pid, theirs = connection.peer()
    if pid <= 0:
        # Abstract names are seen by all of a host's network namespace: this is another container's process.
        raise PeerError("the other end of the link is in another pid namespace")
    ours = os.geteuid() if uid is None else uid
    if theirs != ours:
        raise PeerError(f"process {pid} at the other end of the link runs as user {theirs}, and this one as {ours}")


def _lost(error: OSError) -> PeerError:
    return PeerError(f"the connection to the peer broke: {error}")
