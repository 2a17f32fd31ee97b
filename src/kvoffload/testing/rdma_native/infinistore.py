"""A stand-in for InfiniStore's native client, for machines without RDMA: the same names, and the same way to treat memory.

It is put first on a child's path, in place of the real module. "RDMA" is a thread that copies between registered memory and
`kvoffload.testing.rdma_server`, which also says what is to go wrong: at which call, and how.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import os
import queue
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

TYPE_RDMA = "RDMA"
TYPE_TCP = "TCP"
LINK_ETHERNET = "Ethernet"
LINK_IB = "IB"

_HEADER = struct.Struct("<IcI")
_LENGTH = struct.Struct("<I")


class InfiniStoreException(Exception):
    pass


class InfiniStoreKeyNotFound(InfiniStoreException):
    pass


class ClientConfig:
    def __init__(self, **kwargs: Any) -> None:
        self.connection_type = kwargs["connection_type"]
        self.host_addr = kwargs["host_addr"]
        self.service_port = kwargs["service_port"]
        self.dev_name = kwargs.get("dev_name", "mlx5_1")
        self.ib_port = kwargs.get("ib_port", 1)
        self.link_type = kwargs.get("link_type", "IB")  # as in 0.2.35: nothing is known of hint_gid_index


class InfinityConnection:
    """One connection. Answers are given to the oldest request, whichever they are meant for, as the real client does."""

    def __init__(self, config: ClientConfig) -> None:
        self.config = config
        self.semaphore: Any = asyncio.BoundedSemaphore(128)
        self._regions: dict[int, int] = {}
        self._socket: socket.socket | None = None
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._in_flight = 0
        self._most_in_flight = 0

    def connect(self) -> None:
        self._socket = socket.create_connection((self.config.host_addr, self.config.service_port))
        settings = {name: getattr(self.config, name) for name in ("dev_name", "ib_port", "link_type")}
        self._misbehave(self._ask({"op": "connect", **settings})[0], [])
        threading.Thread(target=self._work, daemon=True).start()

    def register_mr(self, ptr: int, size: int) -> int:
        self._misbehave(self._ask_apart({"op": "register", "size": size}), [])
        if ptr in self._regions:
            raise Exception("registered already")
        self._regions[ptr] = size
        return 0

    async def rdma_read_cache_async(self, blocks: Sequence[tuple[str, int]], block_size: int, ptr: int) -> int:
        return await self._transfer("read", blocks, block_size, ptr)

    async def rdma_write_cache_async(self, blocks: Sequence[tuple[str, int]], block_size: int, ptr: int) -> int:
        return await self._transfer("write", blocks, block_size, ptr)

    async def _transfer(self, op: str, blocks: Sequence[tuple[str, int]], block_size: int, ptr: int) -> int:
        if ptr not in self._regions:
            raise Exception(f"Failed to {op} to infinistore, ret = -1")
        if any(offset < 0 or offset + block_size > self._regions[ptr] for _, offset in blocks):
            os.abort()  # the card would refuse, and the connection be lost
        await self.semaphore.acquire()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[int] = loop.create_future()
        self._in_flight += 1
        self._most_in_flight = max(self._most_in_flight, self._in_flight)

        def finish(answer: Callable[[], None]) -> None:
            self._in_flight -= 1  # before the caller hears of it: it may ask again at once
            answer()

        def work() -> None:
            answer: Callable[[], None]
            try:
                answer = functools.partial(future.set_result, self._move(op, blocks, block_size, ptr))
            except Exception as error:
                answer = functools.partial(future.set_exception, error)
            self.semaphore.release()
            loop.call_soon_threadsafe(finish, answer)

        self._jobs.put(work)
        code = await future
        if code == 404:
            raise InfiniStoreKeyNotFound("some keys not found")
        if code != 200:
            raise Exception(f"Failed to {op} to infinistore, ret = {code}")
        return code

    def _work(self) -> None:
        while True:
            self._jobs.get()()

    def _move(self, op: str, blocks: Sequence[tuple[str, int]], block_size: int, ptr: int) -> int:
        places = [(ptr + offset, block_size) for _, offset in blocks]
        request = {"op": op, "keys": [key for key, _ in blocks], "size": block_size, "most_in_flight": self._most_in_flight}
        sent = b"" if op == "read" else b"".join(ctypes.string_at(*place) for place in places)
        try:
            answer, values = self._ask(request, sent)
        except OSError:
            threading.Event().wait()  # a client that has lost its server says nothing any more
            raise
        code = self._misbehave(answer, places)
        if answer["code"] == 200 and code == 200 and op == "read":
            at = 0
            for (address, _), size in zip(places, answer["sizes"], strict=True):
                ctypes.memmove(address, values[at : at + size], size)
                at += size
        return int(answer["code"]) if code == 200 else code

    def _misbehave(self, answer: dict[str, Any], places: Sequence[tuple[int, int]]) -> int:
        """What the server says is to happen now. A code other than 200 is what the call is to end with."""
        what, _, value = str(answer.get("do", "")).partition(":")
        match what:
            case "segv":
                os.kill(os.getpid(), signal.SIGSEGV)
                time.sleep(10)
            case "exit":
                os._exit(1)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "hang":
                threading.Event().wait()
            case "late":
                time.sleep(float(value))
            case "scribble":
                while True:
                    for address, size in places:
                        ctypes.memset(address, 0xEE, size)
                    time.sleep(0.001)
            case "raise":
                raise Exception(value)
            case "code":
                return int(value)
        return 200

    def _ask_apart(self, request: dict[str, Any]) -> dict[str, Any]:
        """Over a connection of its own: a transfer may be using ours."""
        with socket.create_connection((self.config.host_addr, self.config.service_port)) as connection:
            return ask(connection, request)[0]

    def _ask(self, request: dict[str, Any], payload: bytes = b"") -> tuple[dict[str, Any], bytes]:
        assert self._socket is not None
        return ask(self._socket, request, payload)


def ask(connection: socket.socket, request: dict[str, Any], payload: bytes = b"") -> tuple[dict[str, Any], bytes]:
    """One request to the stand-in server, and its answer. Raises OSError."""
    body = msgspec.msgpack.encode(request | {"payload": len(payload)})
    connection.sendall(_HEADER.pack(0xDEADBEEF, b"Z", len(body)) + body + payload)
    (length,) = _LENGTH.unpack(_receive(connection, _LENGTH.size))
    answer: dict[str, Any] = msgspec.msgpack.decode(_receive(connection, length))
    return answer, _receive(connection, int(answer["payload"]))


def _receive(connection: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        received = connection.recv_into(view)
        if not received:
            raise ConnectionResetError("the server hung up")
        view = view[received:]
    return bytes(data)
