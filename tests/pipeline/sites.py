"""One face for the servers behind the second tier: fake, Valkey, InfiniStore; what may befall each."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

import pytest
import redis
from tests.infinistore import raw
from tests.infinistore.server import InfiniStoreServer
from tests.pipeline.proxy import Proxy, Way

from kvoffload.config import L2Settings
from kvoffload.errors import UnsupportedError
from kvoffload.l2.infinistore_wire import new_nonces, pack_pointer, parse_pointer, value_key
from kvoffload.l2.ring import NodeAddress
from kvoffload.testing.fake_node import FakeNode, FakeStore, Kind, NodeFault
from kvoffload.testing.valkey import ValkeyServer, free_port

T = TypeVar("T")

WAIT_S = 20.0
"""A bound for what takes milliseconds, or a breaker's pause; only a failing test waits for it."""


class Place(Protocol):
    """What an engine must know of its nodes."""

    backend: str

    @property
    def port(self) -> int:
        """Where engines find it: a proxy, where the server is real."""

    def make(self, address: NodeAddress, settings: L2Settings, value_bytes: int) -> FakeNode | None:
        """The client; None for a real one."""


class Site(Place, Protocol):
    """One node, empty at first. Methods block, and are for the test's thread."""

    def kill(self) -> None: ...
    def restart(self, *, elsewhere: bool = False) -> None:
        """Empty; ``elsewhere``: at another `port`, and nobody answers at the old one."""

    def freeze(self) -> None: ...
    def thaw(self) -> None: ...
    def slow(self, bytes_per_s: float | None) -> None: ...
    def hold(self, way: Way) -> None:
        """Stop the next transfer this way in its middle: `wait_held`, `release`."""

    def wait_held(self) -> None: ...
    def release(self) -> None: ...
    def flap(self, *, resets: bool) -> None:
        """Connections are reset again and again, in the middle of transfers."""

    def get(self, name: str) -> bytes | None: ...
    def put(self, name: str, value: bytes) -> None:
        """Whatever it had under this name is replaced."""

    def check(self) -> None:
        """Nobody ended it but the test."""

    def close(self) -> None: ...


class FakeSite:
    """A client per engine, on that engine's loop; what they have in common is the values, and what a test does to all."""

    backend = "redis"

    def __init__(self, port: int = 6379) -> None:
        self.port = port
        self.values: dict[str, bytes] = {}
        self.nodes: list[tuple[asyncio.AbstractEventLoop, FakeNode]] = []
        self.bytes_per_s: float | None = None
        self.kind: type[FakeNode] = FakeNode
        self.settle_s: float | None = None
        self._is_up, self._is_frozen = True, False

    def make(self, address: NodeAddress, settings: L2Settings, value_bytes: int) -> FakeNode:
        is_here = urlsplit(address.url).port == self.port
        store = FakeStore(self.values if is_here else {}, is_up=self._is_up and is_here, is_frozen=self._is_frozen)
        node = self.kind(address.name, store, latency_s=(0.0, 0.001), settle_s=self.settle_s, seed=len(self.nodes))
        node.bytes_per_s = self.bytes_per_s
        self.nodes.append((asyncio.get_running_loop(), node))
        return node

    def each(self, act: Callable[[FakeNode], T]) -> list[T]:
        """On every client, on its loop."""
        answers: list[T] = []
        for loop, node in self.nodes:
            done: Future[T] = Future()
            try:
                loop.call_soon_threadsafe(lambda node=node, done=done: done.set_result(act(node)))  # type: ignore[misc]
            except RuntimeError:  # its engine was closed
                continue
            answers.append(done.result(WAIT_S))
        return answers

    def fail(self, kind: Kind, fault: NodeFault) -> None:
        """Every call of this kind, until NONE."""
        self.each(lambda node: node.fail_always(kind, fault))

    def kill(self) -> None:
        self._is_up = self._is_frozen = False
        self.each(lambda node: node.store.kill())

    def restart(self, *, elsewhere: bool = False) -> None:
        self.kill()
        self._is_up = True
        if elsewhere:
            self.port += 1
            self.values = {}
        else:
            self.each(lambda node: node.store.restart())

    def revive(self) -> None:
        """Up, and not frozen, with whatever it has."""
        if not self._is_up:
            self.restart()
        self.thaw()

    def freeze(self) -> None:
        self._is_frozen = True
        self.each(lambda node: node.store.freeze())

    def thaw(self) -> None:
        self._is_frozen = False
        self.each(lambda node: node.store.thaw())

    def slow(self, bytes_per_s: float | None) -> None:
        self.bytes_per_s = bytes_per_s
        self.each(lambda node: setattr(node, "bytes_per_s", bytes_per_s))

    def hold(self, way: Way) -> None:
        self.each(lambda node: node.hold("read" if way == "get" else "write"))

    def wait_held(self) -> None:
        waiting = threading.Event()
        for _ in range(int(WAIT_S / 0.002)):
            if any(self.each(lambda node: node._waiting["read"] + node._waiting["write"])):
                return
            waiting.wait(0.002)
        raise AssertionError("nothing came to be held")

    def release(self) -> None:
        self.each(lambda node: node.release())

    def flap(self, *, resets: bool) -> None:
        def reset(node: FakeNode) -> None:
            node.store.epoch += 1
            node.store.tell()
            node.latency_s = (0.0, 0.02) if resets else (0.0, 0.001)
            node.fail_always("write", NodeFault.ERROR if resets else NodeFault.NONE)

        self.each(reset)

    def get(self, name: str) -> bytes | None:
        return self.values.get(name)

    def put(self, name: str, value: bytes) -> None:
        self.values[name] = value

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass


class RedisSite:
    backend = "redis"

    def __init__(self, *, maxmemory_bytes: int | None = None) -> None:
        self._close = ExitStack()
        try:
            self.server = self._close.enter_context(ValkeyServer(maxmemory_bytes=maxmemory_bytes))
        except UnsupportedError as error:
            pytest.skip(str(error))
        self.proxy = self._close.enter_context(Proxy(self.server.port))
        self._is_killed = False

    @property
    def port(self) -> int:
        return self.proxy.port

    def make(self, address: NodeAddress, settings: L2Settings, value_bytes: int) -> None:
        return None

    def kill(self) -> None:
        self._is_killed = True
        self.server.kill()

    def restart(self, *, elsewhere: bool = False) -> None:
        self._is_killed = False
        self.server.restart(port=free_port() if elsewhere else None)
        if elsewhere:
            self.proxy.reset()
            self.proxy = self._close.enter_context(Proxy(self.server.port))

    def freeze(self) -> None:
        self.server.freeze()

    def thaw(self) -> None:
        self.server.thaw()

    def slow(self, bytes_per_s: float | None) -> None:
        self.proxy.bytes_per_s = bytes_per_s

    def hold(self, way: Way) -> None:
        self.proxy.hold_after(way, HELD_AFTER)

    def wait_held(self) -> None:
        assert self.proxy.wait_held(WAIT_S)

    def release(self) -> None:
        self.proxy.release()

    def flap(self, *, resets: bool) -> None:
        self.proxy.reset_after(HELD_AFTER if resets else None)

    def get(self, name: str) -> bytes | None:
        with closing(redis.Redis(port=self.server.port)) as client:
            return client.get(name)  # type: ignore[return-value]

    def put(self, name: str, value: bytes) -> None:
        with closing(redis.Redis(port=self.server.port)) as client:
            client.set(name, value)

    def check(self) -> None:
        assert self._is_killed or self.server.is_alive

    def close(self) -> None:
        self._close.close()


class InfiniStoreSite:
    backend = "infinistore"

    def __init__(self, server: InfiniStoreServer) -> None:
        self._close = ExitStack()
        self.server = server
        self.proxy = self._close.enter_context(Proxy(self.server.port))

    @property
    def port(self) -> int:
        return self.proxy.port

    def make(self, address: NodeAddress, settings: L2Settings, value_bytes: int) -> None:
        return None

    def kill(self) -> None:
        self.server.kill()

    def restart(self, *, elsewhere: bool = False) -> None:
        self.server.restart(same_port=not elsewhere)
        if elsewhere:
            self.proxy.reset()
            self.proxy = self._close.enter_context(Proxy(self.server.port))

    def freeze(self) -> None:
        self.server.stop()

    def thaw(self) -> None:
        self.server.cont()

    def slow(self, bytes_per_s: float | None) -> None:
        self.proxy.bytes_per_s = bytes_per_s

    def hold(self, way: Way) -> None:
        self.proxy.hold_after(way, HELD_AFTER)

    def wait_held(self) -> None:
        assert self.proxy.wait_held(WAIT_S)

    def release(self) -> None:
        self.proxy.release()

    def flap(self, *, resets: bool) -> None:
        self.proxy.reset_after(HELD_AFTER if resets else None)

    def get(self, name: str) -> bytes | None:
        with raw.connect(self.server) as connection:
            data = raw.value_of(connection, name)
            pointer = parse_pointer(data) if data is not None else None
            return raw.value_of(connection, value_key(name.encode(), pointer.nonce).decode()) if pointer is not None else None

    def put(self, name: str, value: bytes) -> None:
        [nonce] = new_nonces(1)
        with raw.connect(self.server) as connection:
            assert raw.stored(connection, value_key(name.encode(), nonce).decode(), value) == raw.STORED
            assert raw.stored(connection, name, pack_pointer(nonce, len(value))) == raw.STORED

    def check(self) -> None:
        self.server.check()

    def close(self) -> None:
        self._close.close()


HELD_AFTER = 150_000
"""Bytes, of transfers of a MiB: in the middle of a value of 64 KiB."""

KINDS = ("fake", "redis", "infinistore")


def open_site(request: pytest.FixtureRequest, *, is_mortal: bool) -> Iterator[Site]:
    """For a fixture with `KINDS` for its params: an empty node, which the test may kill and freeze, if ``is_mortal``. Nothing else may
    have ended it."""
    made: Site
    if request.param == "fake":
        made = FakeSite()
    elif request.param == "redis":
        made = RedisSite()
    else:
        made = InfiniStoreSite(request.getfixturevalue("infinistore_server" if is_mortal else "infinistore_shared"))
    try:
        yield made
        made.check()
    finally:
        made.close()
