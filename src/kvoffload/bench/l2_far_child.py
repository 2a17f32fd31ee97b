"""Servers that are far away: what goes to and from each arrives as much later as light would take, in order and at full bandwidth.

``python l2_far_child.py SECONDS PORT...`` prints a port of 127.0.0.1 for each PORT. ``SECONDS`` are of one way. Imports nothing of the
project.
"""

from __future__ import annotations

import asyncio
import socket
import sys


class Way(asyncio.Protocol):
    """One end of a connection: what arrives here leaves at ``other`` later."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._early: list[bytes] = []
        self.other: Way | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._transport = transport
        transport.writelines(self._early)

    def data_received(self, data: bytes) -> None:
        assert self.other is not None
        self._loop.call_later(self._seconds, self.other.send, data)

    def connection_lost(self, error: Exception | None) -> None:
        if self.other is not None and self.other._transport is not None:
            self.other._transport.close()

    def send(self, data: bytes) -> None:
        if self._transport is None:
            self._early.append(data)
        elif not self._transport.is_closing():
            self._transport.write(data)


async def main(seconds: float, ports: list[int]) -> None:
    loop = asyncio.get_running_loop()
    connecting: set[asyncio.Task[object]] = set()

    def far(port: int) -> Way:
        near, there = Way(seconds), Way(seconds)
        near.other, there.other = there, near
        task: asyncio.Task[object] = loop.create_task(loop.create_connection(lambda: there, "127.0.0.1", port))
        connecting.add(task)
        task.add_done_callback(connecting.discard)
        return near

    for port in ports:
        server = await loop.create_server(lambda port=port: far(port), "127.0.0.1", 0)  # type: ignore[misc]
        sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await loop.run_in_executor(None, sys.stdin.read)  # until who started it is gone


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]), [int(port) for port in sys.argv[2:]]))
