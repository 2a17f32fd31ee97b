"""The link: mailboxes between a worker half and the hub in another process, over a unix socket.

Worker half: ``listen``, ``Listener.accept``, ``serve_worker``, ``Link.run``. Hub: ``connect``, ``join_hub``, ``Link.run``.
Halves that live in one process meet by ``register_half`` and ``find_half`` instead, and need none of this.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock, get_ident
from typing import TYPE_CHECKING, TypeVar

import anyio

from kvoffload.errors import MisuseError, PeerError, UnsupportedError
from kvoffload.link_frames import Beat, FrameDecoder, Goodbye, Hello, Welcome, encode
from kvoffload.link_socket import LINK_VERSION, LinkAddress, Listener, RawConnection, close_descriptors, connect, listen
from kvoffload.mailbox import EndOfMailbox, MailboxStatistics, OnFull, Receiver, Sender, current_call_soon, open_mailbox
from kvoffload.messages import BlocksFilled, ConnectorOff, LoadFinished, SegmentGrown, SlotGrant

if TYPE_CHECKING:
    from kvoffload.ledger import Ledger

__all__ = [
    "LINK_VERSION",
    "Hello",
    "JoinedWorker",
    "Link",
    "LinkAddress",
    "Listener",
    "RawConnection",
    "ToHub",
    "ToWorker",
    "Welcome",
    "connect",
    "find_half",
    "join_hub",
    "listen",
    "register_half",
    "serve_worker",
    "unregister_half",
    "wait_for_exit",
]

BEAT_S = 0.25
HANDSHAKE_TIMEOUT_S = 10.0
LAST_WORDS_S = 0.5
MAX_QUEUED_BYTES = 64 << 20
"""What may wait for a peer that does not read; beyond, it is given up."""

ToWorker = SlotGrant | ConnectorOff
ToHub = BlocksFilled | LoadFinished | SegmentGrown | ConnectorOff
LinkMessage = ToWorker | ToHub
_TO_WORKER = (SlotGrant, ConnectorOff)
_TO_HUB = (BlocksFilled, LoadFinished, SegmentGrown, ConnectorOff)
_BEAT = encode(Beat())
_READ_BYTES = 256 << 10

T = TypeVar("T")


class Link:
    """One end of a connected link.

    Owns: the connection. Receives: `send`, from any thread. Sends: what the peer sent, to ``deliver``. Ends: when the peer is
    lost, which ``on_lost`` is told; after `close`, once everything sent is on its way; or when cancelled.
    """

    def __init__(
        self,
        connection: RawConnection,
        name: str,
        accepts: tuple[type, ...],
        *,
        clock: Callable[[], float] = time.monotonic,
        beat_s: float = BEAT_S,
        most_queued_bytes: int = MAX_QUEUED_BYTES,
    ) -> None:
        """Within a running loop, which is the link's from then on. ``accepts``: what the peer may send, beside beats."""
        self._connection, self._accepts = connection, accepts
        self._clock, self._beat_s, self._most_queued_bytes = clock, beat_s, most_queued_bytes
        self._call_soon, self._thread = current_call_soon(), get_ident()
        # Beats are offered, and one that waits is enough; messages are answers, and owed.
        self._outgoing: Sender[bytes]
        self._frames: Receiver[bytes]
        self._outgoing, self._frames = open_mailbox(name, 1, OnFull.DROP_NEWEST, call_soon=self._call_soon, clock=clock)
        self._post = self._outgoing.threadsafe()
        self._lock = Lock()
        self._queued_bytes = 0
        self._heard_at = clock()
        self._scope: anyio.CancelScope | None = None
        self._is_closing = False
        self._failure: Exception | None = None
        self.peer_left = False
        """The peer said goodbye: it was lost on purpose."""

    def send(self, message: LinkMessage) -> None:
        """From any thread; never waits. Dropped once the link has ended. Raises `MisuseError` for what cannot cross."""
        frames = encode(message)
        with self._lock:
            self._queued_bytes += len(frames)
            is_too_much = self._queued_bytes > self._most_queued_bytes
        if is_too_much:
            self._on_loop(lambda: self._fail(PeerError(f"the peer does not read: {self._queued_bytes} bytes wait for it")))
        elif get_ident() == self._thread:
            self._outgoing.owe(frames)
        else:
            self._post.owe(frames)

    def peer_age_s(self) -> float:
        """Seconds since anything came from the peer, which beats 4 times a second. From any thread."""
        return self._clock() - self._heard_at

    def statistics(self) -> MailboxStatistics:
        """Of what waits to be written."""
        return self._frames.statistics()

    def close(self) -> None:
        """From any thread: write what was sent, say goodbye, and end `run`. Idempotent."""
        self._is_closing = True
        self._post.close()
        self._on_loop(self._outgoing.close)

    async def run(self, deliver: Callable[[T], None], on_lost: Callable[[str], None]) -> None:
        """Move messages, once, until the end. ``deliver`` gets them in order, on this loop; types are checked, numbers are not.

        ``on_lost`` is called once, at the end, and told why, if the peer is gone or broke the protocol, or if ``deliver`` raised.
        It is not called after `close` nor for a cancellation. Raises only what ``deliver`` raised.
        """
        if self._scope is not None:
            raise MisuseError("a link runs once")
        try:
            async with anyio.create_task_group() as tasks:
                self._scope = tasks.cancel_scope
                tasks.start_soon(self._guard, self._write)
                tasks.start_soon(self._guard, self._beat)
                tasks.start_soon(self._guard, lambda: self._read(deliver))
                if self._failure is not None:
                    tasks.cancel_scope.cancel()
        finally:
            self._frames.close()
            self._connection.send_nowait(encode(Goodbye("it was stopped")))
            self._connection.close()
            if self._failure is not None:
                on_lost(str(self._failure))
        if self._failure is not None and not isinstance(self._failure, PeerError):
            raise self._failure

    async def _guard(self, pump: Callable[[], Awaitable[None]]) -> None:
        try:
            await pump()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        # A peer that leaves while we do is no loss.
        if self._failure is None and not (self._is_closing and isinstance(error, PeerError)):
            self._failure = error
        if self._scope is not None:
            self._scope.cancel()

    async def _write(self) -> None:
        try:
            while True:
                data = b"".join(await self._frames.receive_burst())
                try:
                    await self._connection.send(data)
                except PeerError:
                    # The peer is gone; its last words may still be there to be read, and then they are the reason to report.
                    await anyio.sleep(LAST_WORDS_S)
                    raise
                with self._lock:
                    self._queued_bytes -= len(data)
        except EndOfMailbox:
            if self._scope is not None:
                self._scope.cancel()

    async def _beat(self) -> None:
        while True:
            with self._lock:
                self._queued_bytes += len(_BEAT) if self._outgoing.offer(_BEAT) else 0
            await anyio.sleep(self._beat_s)

    async def _read(self, deliver: Callable[[T], None]) -> None:
        decoder = FrameDecoder()
        while True:
            data = await self._connection.receive(_READ_BYTES)
            self._heard_at = self._clock()
            for message in decoder.feed(data):
                if isinstance(message, Beat):
                    continue
                if isinstance(message, Goodbye):
                    self.peer_left = True
                    raise PeerError(f"the peer closed the link: {message.reason}")
                if not isinstance(message, self._accepts):
                    raise PeerError(f"a {type(message).__name__} came the wrong way over the link")
                deliver(message)  # type: ignore[arg-type]

    def _on_loop(self, function: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop is closed, and the link with it
            self._call_soon(function)


@dataclass(frozen=True, slots=True)
class JoinedWorker:
    """What a worker half gave the hub. The descriptors are the caller's: map the segment, watch the process, then `close`."""

    hello: Hello
    segment_fd: int
    process_fd: int

    def close(self) -> None:
        close_descriptors([self.segment_fd, self.process_fd])


async def serve_worker(
    connection: RawConnection, hello: Hello, segment_fd: int, *, timeout_s: float = HANDSHAKE_TIMEOUT_S
) -> tuple[Link, int]:
    """The worker half's handshake: the link, and the ledger's descriptor, which is the caller's to close.

    ``segment_fd`` is duplicated. Raises `PeerError`, with the connection closed and nothing left open.
    """
    try:
        with anyio.fail_after(timeout_s):
            process_fd = _open_own_process()
            try:
                await connection.send(encode(hello), [segment_fd, process_fd])
            finally:
                os.close(process_fd)
            welcome, descriptors = await connection.receive_message(descriptors=1)
        if not isinstance(welcome, Welcome) or welcome.num_blocks != hello.num_blocks:
            close_descriptors(descriptors)
            raise _refusal(connection, f"the hub answered {welcome}, for an engine of {hello.num_blocks} blocks")
        return Link(connection, "link.to_hub", _TO_WORKER), descriptors[0]
    except TimeoutError as error:
        connection.close()
        raise PeerError(f"the hub did not finish the handshake within {timeout_s} s") from error
    except BaseException:
        connection.close()
        raise


async def join_hub(connection: RawConnection, ledger: Ledger, *, timeout_s: float = HANDSHAKE_TIMEOUT_S) -> tuple[Link, JoinedWorker]:
    """The hub's handshake: the link, and what the worker half gave.

    Raises `PeerError`, with the connection closed and nothing left open; the worker half is told why.
    """
    try:
        with anyio.fail_after(timeout_s):
            hello, descriptors = await connection.receive_message(descriptors=2)
            try:
                worker = _check_worker(connection, hello, descriptors, ledger.num_blocks)
                await connection.send(encode(Welcome(ledger.num_blocks)), [ledger.fd])
            except BaseException:
                close_descriptors(descriptors)
                raise
        return Link(connection, f"link.to_rank_{worker.hello.rank}", _TO_HUB), worker
    except TimeoutError as error:
        connection.close()
        raise PeerError(f"the worker did not finish the handshake within {timeout_s} s") from error
    except BaseException:
        connection.close()
        raise


def _check_worker(connection: RawConnection, hello: object, descriptors: list[int], num_blocks: int) -> JoinedWorker:
    if not isinstance(hello, Hello):
        raise _refusal(connection, f"the worker said {type(hello).__name__} where Hello was due")
    if hello.version != LINK_VERSION:
        raise _refusal(connection, f"the worker speaks version {hello.version} of the link, and the hub {LINK_VERSION}")
    if hello.num_blocks != num_blocks:
        raise _refusal(connection, f"the worker has {hello.num_blocks} engine blocks, and the scheduler {num_blocks}")
    if min(hello.rank, hello.payload_bytes, hello.capacity_slots) < 0 or hello.slot_bytes <= 0 or hello.payload_bytes > hello.slot_bytes:
        raise _refusal(connection, f"the worker's figures are impossible: {hello}")
    pid, _ = connection.peer()
    segment_fd, process_fd = descriptors
    # That this process has ended is the proof that nobody writes to its slots any more.
    if hello.pid != pid or _pid_of(process_fd) != pid:
        raise _refusal(connection, f"process {pid} sent the pid {hello.pid} and a pidfd of {_pid_of(process_fd)}")
    return JoinedWorker(hello, segment_fd, process_fd)


def _refusal(connection: RawConnection, reason: str) -> PeerError:
    connection.send_nowait(encode(Goodbye(reason)))
    return PeerError(reason)


def _open_own_process() -> int:
    try:
        return os.pidfd_open(os.getpid())
    except OSError as error:
        raise UnsupportedError(f"this kernel has no pidfd_open, which kvoffload needs across processes: {error}") from error


def _pid_of(pidfd: int) -> int | None:
    """The process of a pidfd; None if it is something else. -1 once the process is gone. From proc(5), fdinfo."""
    with open(f"/proc/self/fdinfo/{pidfd}") as lines:
        return next((int(line.split()[1]) for line in lines if line.startswith("Pid:")), None)


async def wait_for_exit(process_fd: int) -> None:
    """Wait until the process of this pidfd has ended. Does not close it."""
    await anyio.wait_readable(process_fd)


# The halves of one process find each other by the token of their address, whatever loads the connector's modules.
_halves: dict[bytes, object] = {}


def register_half(token: bytes, half: object) -> None:
    """Announce ``half`` to the other half, should it be in this process."""
    _halves[token] = half


def find_half(token: bytes) -> object | None:
    """The half of this process that announced itself with ``token``; None: it is in another process."""
    return _halves.get(token)


def unregister_half(token: bytes) -> None:
    """Idempotent."""
    _halves.pop(token, None)
