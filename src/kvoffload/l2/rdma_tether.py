"""The child's own TCP connection to the server: what does it have, and does it live? The native client can tell neither in time."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Sequence

from kvoffload.errors import PeerError
from kvoffload.l2.infinistore_wire import Code, exist_request

MOST_ASKED = 512
"""Questions sent at once: their answers, 4 KiB, fit into the server's send buffer even when nobody reads them any more."""

_ANSWER = struct.Struct("<ii")


class Tether:
    """Asks whether keys exist, all in one round trip, by the server's TCP protocol; `lost` is set when the server hangs up.

    A native client that loses its server never says so: what it has begun just never ends.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._asking = asyncio.Lock()
        self._watching = asyncio.create_task(self._watch())
        self._answers: asyncio.Queue[bytes] = asyncio.Queue()
        self.lost = asyncio.Event()

    @classmethod
    async def connect(cls, address: str, port: int, timeout_s: float) -> Tether:
        """Raises PeerError."""
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_connection(address, port)
        except TimeoutError as error:
            raise PeerError(f"{address}:{port} did not accept a connection within {timeout_s} s") from error
        except OSError as error:
            raise PeerError(f"cannot connect to {address}:{port}: {error}") from error
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(reader, writer)

    async def exist(self, keys: Sequence[bytes]) -> list[bool]:
        """Raises PeerError when the server is gone, or makes no sense; waits for as long as it says nothing."""
        found: list[bool] = []
        async with self._asking:
            for start in range(0, len(keys), MOST_ASKED):
                asked = keys[start : start + MOST_ASKED]
                self._writer.write(b"".join(map(exist_request, asked)))
                found += [_is_there(await self._answers.get()) for _ in asked]
        return found

    def close(self) -> None:
        """For whoever does not end with it."""
        self._watching.cancel()
        self._writer.close()

    async def _watch(self) -> None:
        """Everything that comes is an answer; when nothing comes any more, the server is gone."""
        try:
            while True:
                self._answers.put_nowait(await self._reader.readexactly(_ANSWER.size))
        except (OSError, asyncio.IncompleteReadError):
            self.lost.set()
            self._answers.put_nowait(b"")


def _is_there(answer: bytes) -> bool:
    if not answer:
        raise PeerError("the server hung up")
    code, absent = _ANSWER.unpack(answer)
    if code != Code.FINISHED or absent not in (0, 1):
        raise PeerError(f"the server answered {code}, {absent} to the question whether it has a key: is this its data port?")
    return not absent
