"""How long a match takes on nodes that are far away: part of ``kvoffload bench l2``.

The servers run here; a child process delays what goes to and from them. What servers, delay and network take of a match is measured
beside it, by threads that do nothing but ask the same servers for the same.
"""

from __future__ import annotations

import asyncio
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier
from types import TracebackType
from typing import Self

from kvoffload.bench.figures import Figure, not_measured
from kvoffload.bench.l2_hub import SLOT_BYTES, Engine
from kvoffload.bench.l2_loop import BLOCKS, chain
from kvoffload.config import Config, L2Settings
from kvoffload.errors import PeerError, UnsupportedError
from kvoffload.l2.node import L2Node
from kvoffload.l2.redis import RedisNode
from kvoffload.l2.resp import RespSocket, commands
from kvoffload.l2.ring import NodeAddress
from kvoffload.testing.valkey import ValkeyServer

TARGET_MS = 2.0
NODES = 3
LATENCY_S = 0.010
"""A round trip to a server."""
CHILD = Path(__file__).parent / "l2_far_child.py"
_NAME = "l2: a match beyond two round trips"


def run(*, quick: bool) -> Figure:
    """A match of `BLOCKS` blocks on `NODES` nodes."""
    try:
        with ExitStack() as stack:
            servers = [stack.enter_context(ValkeyServer()) for _ in range(NODES)]
            far = stack.enter_context(FarAway([server.port for server in servers], LATENCY_S))
            bare = stack.enter_context(BareClients(far.urls))
            return _figure(asyncio.run(_measure([server.url for server in servers], far.urls, bare, 3 if quick else 25)))
    except (UnsupportedError, PeerError, OSError) as error:
        return not_measured(_NAME, f"<= {TARGET_MS:g}", str(error))


async def _measure(near: Sequence[str], far: Sequence[str], bare: BareClients, rounds: int) -> list[tuple[float, float]]:
    """Seconds of matches, and of bare clients for the same blocks after each. The servers are next door while they are written to."""
    nodes = [f"10.0.0.{number}:6379" for number in range(NODES)]
    config = Config.load({"l2": {"backend": "redis", "nodes": nodes, "min_tokens": 0, "load_or_compute": False}}, {})
    prompts = [chain() for _ in range(rounds + 2)]
    slots = (len(prompts) + 4) * BLOCKS
    asked: dict[str, Sequence[str]] = {}
    urls = dict(zip(nodes, near, strict=True))

    def make(address: NodeAddress, settings: L2Settings, value_bytes: int) -> L2Node:
        return _Listening(asked, address.name, urls[address.name], value_bytes=value_bytes, connections=settings.connections)

    async with Engine(config, slots, make).running() as writer:
        for prompt in prompts:
            await writer.save(prompt)
            await writer.written()
    urls.update(zip(nodes, far, strict=True))
    times: list[tuple[float, float]] = []
    async with Engine(config, slots, make).running() as reader:
        for prompt in prompts:
            asked.clear()
            seconds, _ = await reader.match(prompt)
            least = await asyncio.to_thread(bare.fetch, [list(asked[node]) for node in nodes])
            times.append((seconds, least))
    return times[2:]  # the first ones connect


class _Listening(RedisNode):
    """Notes what it is asked for."""

    def __init__(self, asked: dict[str, Sequence[str]], name: str, url: str, *, value_bytes: int, connections: int) -> None:
        super().__init__(name, url, value_bytes=value_bytes, connections=connections)
        self._asked = asked

    async def find(self, names: Sequence[str], deadline: float) -> list[bool] | None:
        self._asked[self.name] = names
        return await super().find(names, deadline)


class FarAway:
    """Servers on these ports of 127.0.0.1, at ``urls``, a round trip of ``round_trip_s`` away; a context manager."""

    def __init__(self, ports: Sequence[int], round_trip_s: float) -> None:
        """Raises PeerError."""
        command = (sys.executable, str(CHILD), str(round_trip_s / 2), *map(str, ports))
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        lines = [self._process.stdout.readline() for _ in ports]
        if not all(lines):
            self._end()
            raise PeerError("the child process that delays what servers say did not start")
        self.urls = [f"redis://127.0.0.1:{int(line)}" for line in lines]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


class BareClients:
    """Connections to each of these servers, as many as a node has, and a thread for each; a context manager."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._servers = len(urls)
        self._sockets: list[RespSocket] = []
        for url in [*urls] * L2Settings().connections:
            host, _, port = url.removeprefix("redis://").partition(":")
            connection = socket.create_connection((host, int(port)))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets.append(RespSocket(connection, connection.close))
        self._threads = ThreadPoolExecutor(len(self._sockets))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._threads.shutdown()
        for connection in self._sockets:
            connection.close()

    def fetch(self, names: Sequence[Sequence[str]]) -> float:
        """Seconds to ask each server which of its names it has, and, when all have answered, for their values. Raises PeerError."""
        step = self._servers
        lanes = len(self._sockets) // step
        shares = [[name.encode() for name in names[at % step][at // step :: lanes]] for at in range(len(self._sockets))]
        places = [[memoryview(bytearray(SLOT_BYTES)) for _ in share] for share in shares]
        together = Barrier(len(self._sockets))

        def ask(connection: RespSocket, share: list[bytes], buffers: list[memoryview]) -> tuple[float, float]:
            together.wait()
            begun = time.perf_counter()
            connection.send([commands(b"EXISTS", share)])
            there = 0
            while there < len(share):
                there += len(connection.read_lines(len(share) - there))
            together.wait()
            connection.send([commands(b"GET", share)])
            if connection.read_values(buffers) < len(share):
                raise PeerError("a server lacks what was written to it")
            return begun, time.perf_counter()

        begun, ended = zip(*self._threads.map(ask, self._sockets, shares, places), strict=True)
        return float(max(ended) - min(begun))


def _figure(times: Sequence[tuple[float, float]]) -> Figure:
    beyond = [(seconds - least) * 1e3 for seconds, least in times]
    value = statistics.median(beyond)
    walls, least = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
    detail = (
        f"{BLOCKS} blocks on {NODES} Valkey servers {LATENCY_S * 1e3:.0f} ms away, found and fetched: {walls:.1f} ms; two round trips of "
        f"threads that do nothing else, for the same, {least:.1f}; median of {len(times)}, worst {max(beyond):.1f}"
    )
    return Figure(_NAME, value, "ms", f"<= {TARGET_MS:g}", value <= TARGET_MS, detail)
