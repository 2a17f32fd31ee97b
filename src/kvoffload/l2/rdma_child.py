"""The process that has InfiniStore's native client in it, for one node: what hangs or crashes it does not reach the engine.

Started by `kvoffload.l2.rdma_process`; it speaks `kvoffload.l2.rdma_frames` over the socket that it is given. It ends when its parent
does, and by itself once the client or the server is beyond repair: the end of a process is what ends a network card's access to its memory.
"""

from __future__ import annotations

import array
import asyncio
import ctypes
import os
import signal
import socket
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from kvoffload.errors import CapacityError, KVOffloadError, PeerError
from kvoffload.l2.node import Outcome
from kvoffload.l2.rdma_devices import has_device
from kvoffload.l2.rdma_frames import (
    MAX_PACKET_BYTES,
    PROTOCOL_VERSION,
    Answer,
    Broken,
    Connect,
    Connected,
    Find,
    FromChild,
    Move,
    NotConnected,
    Setup,
    Withdraw,
    decode_to_child,
    encode,
)
from kvoffload.l2.rdma_session import Mapped, Session
from kvoffload.l2.rdma_tether import Tether

_PR_SET_PDEATHSIG = 1
_MOST_SEGMENTS = 128


class Child:
    """Owns: the segments' mappings, the connection, what is to be moved. Ends: never by itself, see `end`."""

    def __init__(self, sock: socket.socket, setup: Setup, segments: list[Mapped]) -> None:
        self._socket = sock
        self._setup = setup
        self._segments = segments
        self._session: Session | None = None
        self._tether: Tether | None = None
        self._reads: deque[Move] = deque()
        self._writes: deque[Move] = deque()
        self._work = asyncio.Event()
        self._withdrawn: dict[int, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until the process ends."""
        loop = asyncio.get_running_loop()
        self._socket.setblocking(False)
        loop.add_reader(self._socket, self._hear)
        self._start(self._connect())
        await self._move_all()

    def _start(self, coroutine: Any) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            end(self._socket, str(error) if isinstance(error, PeerError) else repr(error))

    # ------------------------------------------------------------ the parent

    def _hear(self) -> None:
        try:
            packet = self._socket.recv(MAX_PACKET_BYTES + 1)
        except BlockingIOError:
            return
        except OSError:
            os._exit(0)
        if not packet:
            os._exit(0)  # the parent is gone, and with it everybody who might ask
        match decode_to_child(packet):
            case Connect():
                self._start(self._connect())
            case Find() as find:
                self._start(self._find(find))
            case Move() as move:
                self._withdrawn[move.call] = asyncio.Event()
                (self._writes if move.is_write else self._reads).append(move)
                self._work.set()
            case Withdraw(call):
                self._withdraw(call)
            case Setup():
                end(self._socket, "set up twice")

    def _withdraw(self, call: int) -> None:
        """What waits is answered now, what runs when its batch is over."""
        event = self._withdrawn.get(call)
        if event is None:
            return  # answered already
        event.set()
        for queue in (self._reads, self._writes):
            for move in queue:
                if move.call == call:
                    queue.remove(move)
                    del self._withdrawn[call]
                    self._say(Answer(call, bytes([Outcome.LATE]) * len(move.names), ""))
                    return

    def _say(self, message: FromChild) -> None:
        """Answers are small, few and awaited: a parent that does not take them is as good as gone."""
        try:
            self._socket.send(encode(message))
        except OSError:
            os._exit(0)

    # ------------------------------------------------------------ the server

    async def _connect(self) -> None:
        setup = self._setup
        try:
            if setup.device and not has_device(setup.device, Path(setup.sysfs)):
                raise PeerError(f"this machine has no RDMA device {setup.device}: see {setup.sysfs}/class/infiniband, and l2.devices")
            address = await _ipv4(setup.host, setup.port)
            tether = await Tether.connect(address, setup.port, setup.connect_timeout_s)
        except PeerError as error:
            self._say(NotConnected(str(error)))
            return
        self._start(self._watch(tether))
        try:
            import infinistore
        except ImportError as error:
            raise PeerError(f"the native client cannot be loaded ({error}): pip install kvoffload[infinistore], libibverbs1") from error
        session = Session(setup, self._segments, infinistore)
        note = await session.connect(address)
        self._session, self._tether = session, tether
        self._say(Connected(note))

    async def _watch(self, tether: Tether) -> None:
        await tether.lost.wait()
        raise PeerError(f"the server at {self._setup.host}:{self._setup.port} hung up")

    async def _find(self, find: Find) -> None:
        if self._tether is None:
            raise PeerError("asked before it was connected")
        found = await self._tether.exist([name.encode() for name in find.names])
        self._say(Answer(find.call, bytes(found), ""))

    # ------------------------------------------------------------ values

    async def _move_all(self) -> None:
        """One at a time, reads first."""
        try:
            while True:
                await self._work.wait()
                self._work.clear()
                while self._reads or self._writes:
                    await self._move((self._reads or self._writes).popleft())
        except PeerError as error:
            end(self._socket, str(error))

    async def _move(self, move: Move) -> None:
        if self._session is None or self._tether is None:
            raise PeerError("asked before it was connected")
        outcomes, trouble = await self._session.move(move, self._tether, self._withdrawn[move.call])
        del self._withdrawn[move.call]
        self._say(Answer(move.call, bytes(outcomes), trouble[:1000]))


def end(sock: socket.socket, reason: str) -> NoReturn:
    """Say why, and end at once: no destructor of the client's gets the chance to hang."""
    sys.stderr.write(f"{reason}\n")
    sys.stderr.flush()
    with suppress(OSError, KVOffloadError):
        sock.send(encode(Broken(reason[:2000])))
    os._exit(3)


async def _ipv4(host: str, port: int) -> str:
    """The native client takes nothing else."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, family=socket.AF_INET, type=socket.SOCK_STREAM)
    except OSError as error:
        raise PeerError(f"{host} has no IPv4 address: {error}") from error
    return str(found[0][4][0])


def _set_up(sock: socket.socket) -> tuple[Setup, list[Mapped]]:
    """The first packet, and the segments. Raises KVOffloadError."""
    fds = array.array("i")
    packet, ancillary, _, _ = sock.recvmsg(MAX_PACKET_BYTES + 1, socket.CMSG_SPACE(4 * _MOST_SEGMENTS), socket.MSG_CMSG_CLOEXEC)
    for level, kind, rights in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(rights[: len(rights) - len(rights) % fds.itemsize])
    if not packet:
        os._exit(0)
    setup = decode_to_child(packet)
    if not isinstance(setup, Setup) or setup.version != PROTOCOL_VERSION or len(fds) != len(setup.regions):
        raise PeerError("not set up as expected: does the parent run another version of kvoffload?")
    segments = [Mapped(fd, num_bytes, region_bytes) for fd, (num_bytes, region_bytes) in zip(fds, setup.regions, strict=True)]
    for fd in fds:
        os.close(fd)
    return setup, segments


def main(fd: int, parent: int) -> None:
    """``fd`` is our end of the socket; ``parent`` the process that started us: if that is gone already, so are we."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # also when the native client hangs with the interpreter's lock
    if os.getppid() != parent:
        os._exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to everybody; ours comes by the end of the socket
    sock = socket.socket(fileno=fd)
    os.set_inheritable(fd, False)
    try:
        setup, segments = _set_up(sock)
    except (CapacityError, PeerError) as error:
        end(sock, str(error))
    asyncio.run(Child(sock, setup, segments).run())
