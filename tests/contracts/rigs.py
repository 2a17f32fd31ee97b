"""One face for the servers behind the nodes, and what tests of all nodes have in common."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import lru_cache
from typing import Protocol

import anyio
from tests.contracts.arena import arena
from tests.infinistore.server import InfiniStoreServer

from kvoffload.l2.infinistore_rdma import InfiniStoreRdmaNode, RdmaSettings
from kvoffload.l2.node import Item, L2Node, Outcome
from kvoffload.l2.redis import RedisNode
from kvoffload.testing.fake_node import FakeNode, FakeStore
from kvoffload.testing.rdma_server import RdmaServer, stand_in
from kvoffload.testing.valkey import ValkeyServer

SLACK_S = 2.0
"""How much later than its deadline a call may return here: the machine may be busy with anything."""

PATTERN = 0xA5
CONNECT_S = 0.5


class Rig(Protocol):
    """A server, and how to make clients of it."""

    where: str
    """What the text of an error must name."""

    @property
    def is_alive(self) -> bool: ...
    def node(self, *, connections: int = 3) -> L2Node: ...
    def kill(self) -> None: ...
    def restart(self) -> None: ...
    def freeze(self) -> None: ...
    def thaw(self) -> None: ...


class FakeRig:
    def __init__(self) -> None:
        # Slow enough for something to happen in the middle of a call.
        self._store = FakeStore()
        self._made = 0
        self.where = "fake"
        self.is_alive = True

    def node(self, *, connections: int = 3) -> L2Node:
        self._made += 1
        return FakeNode("fake", self._store, latency_s=(0.0, 0.001), bytes_per_s=2e9, seed=self._made)

    def kill(self) -> None:
        self._store.kill()

    def restart(self) -> None:
        self._store.restart()

    def freeze(self) -> None:
        self._store.freeze()

    def thaw(self) -> None:
        self._store.thaw()


class RedisRig:
    def __init__(self, server: ValkeyServer) -> None:
        self._server = server
        self.was_killed = False
        self.where = str(server.port)

    @property
    def is_alive(self) -> bool:
        return self._server.is_alive

    def node(self, *, connections: int = 3) -> L2Node:
        return RedisNode("n", self._server.url, value_bytes=1 << 20, connections=connections, connect_timeout_s=CONNECT_S)

    def kill(self) -> None:
        self.was_killed = True
        self._server.kill()

    def restart(self) -> None:
        self._server.restart()
        self.was_killed = False

    def freeze(self) -> None:
        self._server.freeze()

    def thaw(self) -> None:
        self._server.thaw()


class InfiniStoreRig:
    def __init__(self, server: InfiniStoreServer) -> None:
        self._server = server
        self.where = str(server.port)

    @property
    def is_alive(self) -> bool:
        return self._server.is_alive

    def node(self, *, connections: int = 3) -> L2Node:
        from kvoffload.l2.infinistore_tcp import InfiniStoreTcpNode

        return InfiniStoreTcpNode(
            "n", "127.0.0.1", self._server.port, value_bytes=1 << 20, connections=connections, connect_timeout_s=CONNECT_S
        )

    def kill(self) -> None:
        self._server.kill()

    def restart(self) -> None:
        self._server.restart()

    def freeze(self) -> None:
        self._server.stop()

    def thaw(self) -> None:
        self._server.cont()


class RdmaRig:
    """The real child process; the native client in it, and the server, are stand-ins."""

    def __init__(self, server: RdmaServer) -> None:
        self._server = server
        self.where = str(server.port)

    @property
    def is_alive(self) -> bool:
        return self._server.is_alive

    def node(self, *, connections: int = 3) -> L2Node:
        settings = RdmaSettings(connect_timeout_s=CONNECT_S, patience_s=0.5, silence_s=1.0, start_timeout_s=5.0)
        return InfiniStoreRdmaNode(
            "n", "127.0.0.1", self._server.port, value_bytes=1 << 20, segments=[arena().segment], settings=settings, spawn=stand_in()
        )

    def kill(self) -> None:
        self._server.kill()

    def restart(self) -> None:
        self._server.restart()

    def freeze(self) -> None:
        self._server.freeze()

    def thaw(self) -> None:
        self._server.thaw()


@asynccontextmanager
async def opened(rig: Rig, count: int = 1, *, connections: int = 3) -> AsyncIterator[list[L2Node]]:
    """So many clients, closed at the end, when nothing of them may be left: no task, thread or descriptor."""
    arena()  # it stays
    tasks, threads, files = asyncio.all_tasks(), set(threading.enumerate()), open_files()
    async with AsyncExitStack() as stack:
        nodes = [rig.node(connections=connections) for _ in range(count)]
        for node in nodes:
            stack.push_async_callback(node.close)
        yield nodes

    def leftovers() -> list[object]:
        # The loop's own executor is no client's, and ends with the loop.
        alive = [thread for thread in threading.enumerate() if thread not in threads and not thread.name.startswith("asyncio_")]
        return [*alive, *(asyncio.all_tasks() - tasks), *range(open_files() - files)]

    assert await eventually(lambda: not leftovers()), f"left behind: {leftovers()}"


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


async def eventually(is_so: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    """Whether it becomes so in time."""
    with anyio.move_on_after(timeout_s):
        while not is_so():  # noqa: ASYNC110  (a thread's or a process' end sets no event)
            await anyio.sleep(0.005)
    return is_so()


def soon(seconds: float = 20.0) -> float:
    """A deadline that far away."""
    return time.monotonic() + seconds


@lru_cache(256)
def value_of(name: str, size: int) -> bytes:
    """The only right value of this name and length."""
    return random.Random(f"{name} {size}").randbytes(size)


def full(names: Sequence[str], size: int) -> list[Item]:
    """What is to be written."""
    items = empty(names, size)
    for item in items:
        item.buffer[:] = value_of(item.name, size)
    return items


def empty(names: Sequence[str], size: int) -> list[Item]:
    """To be read into."""
    return [Item(name, arena().take(size)) for name in names]


def paint(items: Sequence[Item]) -> None:
    for item in items:
        item.buffer[:] = bytes([PATTERN]) * item.buffer.nbytes


def is_painted(items: Sequence[Item]) -> bool:
    return all(bytes(item.buffer) == bytes([PATTERN]) * item.buffer.nbytes for item in items)


def are_right(items: Sequence[Item], outcomes: Sequence[Outcome]) -> bool:
    """Whether every DONE one is what was written under its name, whole."""
    done = [item for item, outcome in zip(items, outcomes, strict=True) if outcome is Outcome.DONE]
    return all(bytes(item.buffer) == value_of(item.name, item.buffer.nbytes) for item in done)


async def serves(node: L2Node, name: str, size: int = 1000, within_s: float = 15.0) -> bool:
    """Whether a value can be written and read again in time; outcomes until then are of no interest, exceptions are."""
    with anyio.move_on_after(within_s):
        while True:
            written = await node.write(full([name], size), soon(2.0))
            items = empty([name], size)
            outcomes = await node.read(items, soon(2.0))
            assert are_right(items, outcomes)
            if written == outcomes == [Outcome.DONE]:
                return True
            await anyio.sleep(0.02)
    return False


async def timed(call: Awaitable[object]) -> float:
    """Seconds that it took."""
    started = time.monotonic()
    await call
    return time.monotonic() - started
