"""Transfers beside an engine that keeps the interpreter lock busy: part of ``kvoffload bench l2``.

Who wants the lock then waits up to 5 ms each time. A client that takes it for every piece of a value pays for each.
"""

from __future__ import annotations

import asyncio
import secrets
import statistics
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial

import numpy as np

from kvoffload.bench.figures import Figure, not_measured
from kvoffload.bench.l2_rivals import InfiniStore, PlainClient
from kvoffload.config import L2Settings
from kvoffload.errors import PeerError
from kvoffload.l2.infinistore_tcp import InfiniStoreTcpNode
from kvoffload.l2.node import Item, Outcome, value_name

SIZE = 1 << 20
TIMEOUT_S = 60.0
OURS, PLAIN = "l2: 1 MiB read beside a busy engine, ours", "l2: 1 MiB read beside a busy engine, plain asyncio"


@contextmanager
def spinning() -> Iterator[None]:
    """Meanwhile a thread of this process runs Python and nothing else."""
    stop = threading.Event()

    def spin() -> None:
        count = 0
        while not stop.is_set():
            for _ in range(1000):
                count += 1

    thread = threading.Thread(target=spin, name="busy-engine", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


async def measure(server: InfiniStore, *, quick: bool) -> list[Figure]:
    """Time per value of both, in turn, the machine idle and the lock busy."""
    count, rounds = (4, 2) if quick else (32, 5)
    try:
        async with asyncio.timeout(10 * TIMEOUT_S):
            return await _measure(server, count, rounds)
    except (PeerError, OSError, TimeoutError) as error:
        return [not_measured(name, "no target", str(error)) for name in (OURS, PLAIN)]


async def _measure(server: InfiniStore, count: int, rounds: int) -> list[Figure]:
    node = InfiniStoreTcpNode("bench", server.host, server.port, value_bytes=SIZE, connections=L2Settings().connections)
    names = [value_name("bench", secrets.token_bytes(24), 0) for _ in range(count)]
    value = np.random.default_rng(1).integers(0, 256, SIZE, np.uint8).tobytes()
    places = [np.ones(SIZE, np.uint8).data for _ in range(count)]
    with closing(await PlainClient.connect(server)) as plain:
        try:
            outcomes = await node.write([Item(name, memoryview(value)) for name in names], time.monotonic() + TIMEOUT_S)
            if set(outcomes) != {Outcome.DONE}:
                raise PeerError(f"values could not be written: {[outcome.name for outcome in outcomes]}")
            for name in names:
                await plain.put(f"plain:{name}", value)
            clients: dict[str, Callable[[], Awaitable[None]]] = {
                OURS: partial(_read_ours, node, names, places),
                PLAIN: partial(_read_plain, plain, names, places),
            }
            idle, busy = await _times(clients, count, rounds)
        finally:
            await plain.forget(names)
            await plain.delete([f"plain:{name}".encode() for name in names])
            await node.close()
    figures = []
    for name, took in busy.items():
        alone = statistics.median(idle[name])
        detail = f"{alone * 1e3:.2f} ms with the lock free; median of {rounds} rounds of {count} values, the two in turn"
        figures.append(Figure(name, statistics.median(took) * 1e3, "ms/value", "no target", True, detail))
    return figures


async def _times(
    clients: dict[str, Callable[[], Awaitable[None]]], count: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds per value by client: alone, and beside the thread."""
    idle: dict[str, list[float]] = {name: [] for name in clients}
    busy: dict[str, list[float]] = {name: [] for name in clients}
    for number in range(-1, rounds):
        for name, read in clients.items():
            begun = time.perf_counter()
            await read()
            between = time.perf_counter()
            with spinning():
                started = time.perf_counter()
                await read()
                ended = time.perf_counter()
            if number >= 0:  # the first warms up
                idle[name].append((between - begun) / count)
                busy[name].append((ended - started) / count)
    return idle, busy


async def _read_ours(node: InfiniStoreTcpNode, names: list[str], places: list[memoryview]) -> None:
    items = [Item(name, place) for name, place in zip(names, places, strict=True)]
    outcomes = await node.read(items, time.monotonic() + TIMEOUT_S)
    if set(outcomes) != {Outcome.DONE}:
        raise PeerError(f"values could not be read: {[outcome.name for outcome in outcomes]}")


async def _read_plain(plain: PlainClient, names: list[str], places: list[memoryview]) -> None:
    for name, place in zip(names, places, strict=True):
        await plain.get(f"plain:{name}", place)
