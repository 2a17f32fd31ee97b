"""A server that speaks InfiniStore's protocol as a test wants it spoken, for what the real one cannot be made to do."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import flatbuffers
from flatbuffers import number_types

from kvoffload.l2 import infinistore_wire as wire

Answer = Callable[[bytes, bytes, asyncio.StreamWriter], Awaitable[bool]]
"""Key and proper answer; whether the connection goes on."""


def answer_of(value: bytes) -> bytes:
    return struct.pack("<ii", wire.Code.FINISHED, len(value)) + value


def code(number: int) -> bytes:
    return struct.pack("<i", number)


def is_value(key: bytes) -> bool:
    """Keys of values have a nonce; the tests' names have no colon."""
    return b":" in key


class Liar:
    """Keeps values as it should, until it is told otherwise; records what came."""

    def __init__(self) -> None:
        self.store: dict[bytes, bytes] = {}
        self.puts: list[bytes] = []
        self.gets: list[bytes] = []
        self.arrivals: list[bytes] = []
        """What each read of the socket gave, at most 64 KiB: as much as the real server reads at a time."""
        self.connections = 0
        self._open: dict[asyncio.StreamWriter, asyncio.Task[object] | None] = {}
        self.hung_up = 0
        self.on_get: Answer = self.tell
        self.on_put: Answer = self.tell
        self.on_exist: Answer = self.tell
        self.may_read = asyncio.Event()
        """Clear: it stops reading in the middle of a value."""
        self.may_read.set()
        self.port = 0

    async def tell(self, key: bytes, answer: bytes, writer: asyncio.StreamWriter) -> bool:
        writer.write(answer)
        await writer.drain()
        return True

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._open[writer] = asyncio.current_task()
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                _, op, length = wire.HEADER.unpack(await self._take(reader, wire.HEADER.size))
                body = await self._take(reader, length)
                if not await self._handle(op, body, reader, writer):
                    break
        self.hung_up += reader.at_eof()
        del self._open[writer]
        writer.close()

    async def close(self) -> None:
        """Hang up on everybody."""
        self.may_read.set()
        for writer, task in list(self._open.items()):
            writer.transport.abort()
            if task is not None:
                await asyncio.wait([task], timeout=2)

    async def _handle(self, op: bytes, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if op == wire.EXIST:
            return await self.on_exist(body, struct.pack("<ii", wire.Code.FINISHED, body not in self.store), writer)
        table = flatbuffers.table.Table(body, flatbuffers.encode.Get(number_types.UOffsetTFlags.packer_type, body, 0))
        if op == wire.DELETE:
            vector = table.Offset(4)
            keys = [bytes(table.String(table.Vector(vector) + 4 * index)) for index in range(table.VectorLen(vector))]
            count = sum(self.store.pop(key, None) is not None for key in keys)
            return await self.tell(b"", struct.pack("<ii", wire.Code.FINISHED, count), writer)
        key = bytes(table.String(table.Offset(4) + table.Pos))
        if table.Get(number_types.Int8Flags, table.Offset(8) + table.Pos) == wire.GET[0]:
            self.gets.append(key)
            return await self.on_get(key, answer_of(self.store[key]) if key in self.store else code(wire.Code.ABSENT), writer)
        size = table.Get(number_types.Int32Flags, table.Offset(6) + table.Pos)
        self.puts.append(key)
        self.store[key] = await self._take(reader, size)
        return await self.on_put(key, code(wire.Code.FINISHED), writer)

    async def _take(self, reader: asyncio.StreamReader, count: int) -> bytes:
        got = bytearray()
        while len(got) < count:
            await self.may_read.wait()
            part = await reader.read(min(count - len(got), 1 << 16))
            if not part:
                raise asyncio.IncompleteReadError(bytes(got), count)
            got += part
        return bytes(got)


@asynccontextmanager
async def liar(port: int = 0) -> AsyncIterator[Liar]:
    made = Liar()
    # With small buffers everywhere a value does not vanish into the kernel.
    server = await asyncio.start_server(made.serve, "127.0.0.1", port, limit=1 << 12)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        await made.close()
