"""What our client is compared with: the native client, a raw socket, a client in plain asyncio."""

from __future__ import annotations

import asyncio
import json
import os
import select
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from kvoffload.errors import PeerError
from kvoffload.l2.addresses import host_port, static_nodes
from kvoffload.l2.infinistore_wire import GET, POINTER, PUT, Code, delete_request, parse_pointer, payload_template

HERE = Path(__file__).parent
ANSWER_S = 60.0
MOST_DELETED = 256
"""Keys in one request: of thousands the server deletes none."""
_ANSWER_BYTES = 8


@dataclass(frozen=True, slots=True)
class InfiniStore:
    """The server to measure with. ``client``: the command of a Python that has the native client."""

    host: str
    port: int
    client: tuple[str, ...]

    @property
    def address(self) -> str:
        return host_port(self.host, self.port)

    @classmethod
    def parse(cls, address: str, client: str | None = None) -> Self:
        """``address``: host:port; ``client``: as in a shell, None for this Python. Raises ConfigError."""
        (node,) = static_nodes("infinistore", [address])
        parts = urlsplit(node.url)
        assert parts.hostname is not None
        assert parts.port is not None
        return cls(parts.hostname, parts.port, tuple(shlex.split(client)) if client else (sys.executable,))


class NativeClient:
    """In a child process. Raises PeerError where there is none, where it fails, and when it does not answer."""

    def __init__(self, server: InfiniStore) -> None:
        address = socket.getaddrinfo(server.host, server.port, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]  # it takes no names
        command = (*server.client, str(HERE / "l2_native_child.py"), str(address), str(server.port))
        environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0, env=environ
            )
        except OSError as error:
            raise PeerError(f"the native client does not start: {error}") from error
        try:
            self._answer()
        except PeerError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def put(self, tag: str, size: int, count: int) -> float:
        """Seconds."""
        return self._call("put", tag, size, count)

    def get(self, tag: str, size: int, count: int) -> float:
        """Seconds."""
        return self._call("get", tag, size, count)

    def delete(self, tag: str, count: int) -> None:
        self._call("delete", tag, 1, count)

    def _call(self, *what: str | int) -> float:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(what).encode() + b"\n")
        except OSError as error:
            raise PeerError("the native client's process ended, as it does when its server hangs up") from error
        return self._answer()

    def _answer(self) -> float:
        assert self._process.stdout is not None
        until, line = time.monotonic() + ANSWER_S, b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise PeerError(f"the native client did not answer within {ANSWER_S:.0f} s: it, or the server, hangs")
            piece = self._process.stdout.read(4096)
            if not piece:
                raise PeerError(f"the native client's process ended with status {self._process.wait()}")
            line += piece
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(f"the native client: {answer['error']}")
        seconds: float = answer["seconds"]
        return seconds

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class RawSocket:
    """A server that does nothing but send, in a child process, and one blocking connection to it."""

    def __init__(self, most_bytes: int) -> None:
        self._process = subprocess.Popen([sys.executable, str(HERE / "l2_raw_child.py"), str(most_bytes)], stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        port = int(self._process.stdout.readline())
        self._connection = socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S)
        self._connection.settimeout(None)  # with one, Python asks for one piece at a time, whatever MSG_WAITALL says
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def read(self, buffers: Sequence[memoryview]) -> float:
        """Seconds to fill these, one after another."""
        begun = time.perf_counter()
        for buffer in buffers:
            self._connection.sendall(buffer.nbytes.to_bytes(8, "little"))
            if self._connection.recv_into(buffer, 0, socket.MSG_WAITALL) != buffer.nbytes:
                raise PeerError("the raw socket hung up")
        return time.perf_counter() - begun


def least_read(server: InfiniStore, name: str, count: int) -> list[float]:
    """Seconds of each of ``count`` reads of one short value of `InfiniStoreTcpNode`, pointer and value, by a thread that does nothing
    else: two round trips of the server and no hand-over, which is the least that a read can take."""
    key = name.encode()
    took: list[float] = []
    with socket.create_connection((server.host, server.port), timeout=ANSWER_S) as connection:
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def get(wanted: bytes) -> bytes:
            connection.sendall(payload_template(GET, len(wanted), 0).fill(wanted))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            code = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "little")
            if code != Code.FINISHED:
                raise PeerError(f"the server has no {wanted!r}: {code}")
            return connection.recv(int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "little"), socket.MSG_WAITALL)

        for _ in range(count):
            begun = time.perf_counter()
            pointer = parse_pointer(get(key))
            if pointer is None:
                raise PeerError(f"what the server has under {name} is no pointer")
            get(pointer.keys(key)[0])
            took.append(time.perf_counter() - begun)
    return took


class PlainClient:
    """A client of the same server as anybody would write it in asyncio: values under their own names, one at a time, on the loop."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    @classmethod
    async def connect(cls, server: InfiniStore) -> Self:
        connection = await asyncio.to_thread(socket.create_connection, (server.host, server.port), ANSWER_S)
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(connection)

    def close(self) -> None:
        self._connection.close()

    async def put(self, name: str, value: bytes) -> None:
        key = name.encode()
        await self._send(payload_template(PUT, len(key), len(value)).fill(key) + value)
        code = int.from_bytes(await self._receive(4), "little")
        if code != Code.FINISHED:
            raise PeerError(f"the server did not take {len(value)} bytes: {code}")

    async def get(self, name: str, buffer: memoryview) -> None:
        """Fill ``buffer``, of the value's length."""
        code, size = await self._ask_for(name)
        if code != Code.FINISHED or size != buffer.nbytes:
            raise PeerError(f"the server has {size} bytes under {name}, not {buffer.nbytes}: {code}")
        await self._fill(buffer)

    async def forget(self, names: Sequence[str]) -> None:
        """Delete what `InfiniStoreTcpNode` stored under these: pointers and values, all of them acknowledged."""
        keys: list[bytes] = []
        for name in names:
            code, size = await self._ask_for(name)
            if code != Code.FINISHED:
                continue
            pointer = parse_pointer(await self._receive(size)) if size == POINTER.size else None
            keys += (name.encode(), *(pointer.keys(name.encode()) if pointer is not None else ()))
        await self.delete(keys)

    async def delete(self, keys: Sequence[bytes]) -> None:
        for start in range(0, len(keys), MOST_DELETED):
            await self._send(delete_request(keys[start : start + MOST_DELETED]))
            await self._receive(_ANSWER_BYTES)

    async def _ask_for(self, name: str) -> tuple[int, int]:
        """The code, and the length of what follows."""
        key = name.encode()
        await self._send(payload_template(GET, len(key), 0).fill(key))
        code = int.from_bytes(await self._receive(4), "little")
        return code, int.from_bytes(await self._receive(4), "little") if code == Code.FINISHED else 0

    async def _send(self, data: bytes) -> None:
        async with asyncio.timeout(ANSWER_S):
            await asyncio.get_running_loop().sock_sendall(self._connection, data)

    async def _receive(self, count: int) -> bytes:
        received = bytearray(count)
        await self._fill(memoryview(received))
        return bytes(received)

    async def _fill(self, buffer: memoryview) -> None:
        loop, done = asyncio.get_running_loop(), 0
        async with asyncio.timeout(ANSWER_S):
            while done < buffer.nbytes:
                self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)  # not sticky
                got = await loop.sock_recv_into(self._connection, buffer[done:])
                if not got:
                    raise PeerError(f"the server hung up after {done} of {buffer.nbytes} bytes")
                done += got
