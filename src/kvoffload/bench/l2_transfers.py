"""Our InfiniStore client against the native one and a raw socket, on a real server: part of ``kvoffload bench l2``."""

from __future__ import annotations

import secrets
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from kvoffload.bench.figures import Figure, not_measured
from kvoffload.bench.l2_rivals import InfiniStore, NativeClient, PlainClient, RawSocket, least_read
from kvoffload.config import L2Settings
from kvoffload.errors import PeerError
from kvoffload.l2.infinistore_tcp import InfiniStoreTcpNode
from kvoffload.l2.node import Item, Outcome, value_name

NATIVE_TARGET, VALUE_TARGET, RAW_TARGET, SMALL_TARGET_US = 0.9, 1.0, 0.75, 200.0
SIZES = (256 << 10, 1 << 20, 2 << 20, 4 << 20)
SMALL_BYTES = 4096
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Effort:
    """``batch_bytes`` of values at a time, ``rounds`` times; ``small`` reads of small values."""

    batch_bytes: int
    rounds: int
    small: int


FULL = Effort(64 << 20, 11, 400)
QUICK = Effort(4 << 20, 2, 20)


@dataclass(slots=True)
class Times:
    """Seconds per value, by round; ``pointers``: of reads that stop at the pointer, ``shared``: over the usual number of connections."""

    count: int
    writes: list[float] = field(default_factory=list)
    native_writes: list[float] = field(default_factory=list)
    shared_writes: list[float] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)
    pointers: list[float] = field(default_factory=list)
    native_reads: list[float] = field(default_factory=list)
    raw_reads: list[float] = field(default_factory=list)
    shared_reads: list[float] = field(default_factory=list)


async def measure(server: InfiniStore, *, quick: bool) -> list[Figure]:
    """All sizes. What could not be measured says so in its figures."""
    effort = QUICK if quick else FULL
    figures = [await _small(server, effort)]
    try:
        with NativeClient(server) as native:
            for size in SIZES:
                figures += await _size(server, native, size, effort)
    except PeerError as error:
        # Without it, or from where it failed on: the rest by itself.
        measured = {figure.name for figure in figures if figure.is_measured}
        figures += [figure for size in SIZES for figure in await _rest(server, size, effort, str(error)) if figure.name not in measured]
    return figures


async def _rest(server: InfiniStore, size: int, effort: Effort, reason: str) -> list[Figure]:
    try:
        return await _size(server, None, size, effort, reason)
    except PeerError as error:
        return _figures(size, None, f"{reason}; {error}")


async def _size(server: InfiniStore, native: NativeClient | None, size: int, effort: Effort, reason: str = "") -> list[Figure]:
    bench = Bench(server, native, size, max(2, effort.batch_bytes // size))
    try:
        async with bench:
            for number in range(-1, effort.rounds):
                await bench.round(number)
    except PeerError as error:
        if native is not None:
            raise
        reason = f"{reason}; {error}"
        return _figures(size, None, reason)
    return _figures(size, bench.times, reason)


class Bench:
    """Values of one size on one server. Each round writes new ones, reads them by all means in turn, and deletes them."""

    def __init__(self, server: InfiniStore, native: NativeClient | None, size: int, count: int) -> None:
        self.times = Times(count)
        self._server = server
        self._native = native
        self._size = size
        self._source = np.random.default_rng(size).integers(0, 256, size, np.uint8).data.toreadonly()
        self._places = [np.ones(size, np.uint8).data for _ in range(count)]
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Bench:
        stack = self._stack
        self._single = await self._client(1)
        self._shared = await self._client(L2Settings().connections)
        self._plain = stack.enter_context(closing(await PlainClient.connect(self._server)))
        self._raw = stack.enter_context(RawSocket(self._size))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _client(self, connections: int) -> InfiniStoreTcpNode:
        client = InfiniStoreTcpNode("bench", self._server.host, self._server.port, value_bytes=self._size, connections=connections)
        self._stack.push_async_callback(client.close)
        return client

    async def round(self, number: int) -> None:
        """The first one warms up and is not counted; every second one goes the other way round."""
        times, tag = self.times, f"kvo1:bench-{secrets.token_hex(4)}"
        names = {client: self._names() for client in (self._single, self._shared)}
        single, shared, native, count = self._single, self._shared, self._native, self.times.count
        mine = names[single]
        parts: list[tuple[list[float], Callable[[], Awaitable[float]]]]
        parts = [
            (times.writes, partial(self._write, single, mine)),
            (times.shared_writes, partial(self._write, shared, names[shared])),
        ]
        if native is not None:
            parts.append((times.native_writes, partial(_called, native.put, tag, self._size, count)))
        await self._run(parts, number)
        parts = [
            (times.reads, partial(self._read, single, mine)),
            (times.pointers, partial(self._read, single, mine, stop_at_pointer=True)),
            (times.shared_reads, partial(self._read, shared, names[shared])),
            (times.raw_reads, partial(_called, self._raw.read, self._places)),
        ]
        if native is not None:
            parts.append((times.native_reads, partial(_called, native.get, tag, self._size, count)))
        await self._run(parts, number)
        for theirs in names.values():
            await self._plain.forget(theirs)
        if native is not None:
            native.delete(tag, count)

    async def _run(self, parts: Sequence[tuple[list[float], Callable[[], Awaitable[float]]]], number: int) -> None:
        for into, part in parts if number % 2 == 0 else reversed(parts):
            seconds = await part()
            if number >= 0:
                into.append(seconds / self.times.count)

    def _names(self) -> list[str]:
        return [value_name("bench", secrets.token_bytes(24), 0) for _ in self._places]

    async def _write(self, client: InfiniStoreTcpNode, names: Sequence[str]) -> float:
        items = [Item(name, self._source) for name in names]
        begun = time.perf_counter()
        outcomes = await client.write(items, time.monotonic() + TIMEOUT_S)
        seconds = time.perf_counter() - begun
        _check(outcomes, Outcome.DONE)
        return seconds

    async def _read(self, client: InfiniStoreTcpNode, names: Sequence[str], *, stop_at_pointer: bool = False) -> float:
        """Of a value that has another length than its reader expects no more than the pointer is read."""
        places = [place[:-1] for place in self._places] if stop_at_pointer else self._places
        items = [Item(name, place) for name, place in zip(names, places, strict=True)]
        begun = time.perf_counter()
        outcomes = await client.read(items, time.monotonic() + TIMEOUT_S)
        seconds = time.perf_counter() - begun
        _check(outcomes, Outcome.MALFORMED if stop_at_pointer else Outcome.DONE)
        if not stop_at_pointer and any(place != self._source for place in (self._places[0], self._places[-1])):
            raise PeerError("what was read is not what was written")
        return seconds


async def _called(function: Callable[..., float], *arguments: object) -> float:
    return function(*arguments)


def _check(outcomes: Sequence[Outcome], expected: Outcome) -> None:
    if any(outcome is not expected for outcome in outcomes):
        counted = ", ".join(f"{outcome.name} {count}" for outcome, count in Counter(outcomes).items())
        raise PeerError(f"{len(outcomes)} values, {counted}: is the server frozen, or too small for {len(outcomes)} values at a time?")


async def _small(server: InfiniStore, effort: Effort) -> Figure:
    """One small value at a time, as a user would see it."""
    name, target = f"l2: a read of {SMALL_BYTES >> 10} KiB", f"<= {SMALL_TARGET_US:.0f}"
    bench = Bench(server, None, SMALL_BYTES, 1)
    try:
        async with bench:
            names = bench._names()
            await bench._write(bench._single, names)
            took, least = [], []
            for _ in range(effort.small // 20):  # in turn
                took += [await bench._read(bench._single, names) * 1e6 for _ in range(20)]
                least += [seconds * 1e6 for seconds in least_read(server, names[0], 20)]
            await bench._plain.forget(names)
    except (PeerError, OSError) as error:
        return not_measured(name, target, str(error))
    value = statistics.median(took)
    detail = (
        f"pointer and value, median of {len(took)} one after another; worst {max(took):.0f} us; "
        f"the server's two round trips from a thread that does nothing else {statistics.median(least):.0f} us"
    )
    return Figure(name, value, "us", target, value <= SMALL_TARGET_US, detail)


# ---------------------------------------------------------------- figures


def _figures(size: int, times: Times | None, reason: str) -> list[Figure]:
    what = f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB"
    reads, writes = f"l2 reads of {what}", f"l2 writes of {what}"
    rows: list[tuple[str, float | None, list[float], list[float], str]] = []
    t = times or Times(0)
    pointer = f" (a pointer's round trip takes {statistics.median(t.pointers) * 1e6:.0f} us)" if t.pointers else ""
    values = [read - min(*t.pointers, read / 2) for read in t.reads]  # a pointer that takes longer than its value: somebody else did
    native, one = "the native client", "a connection each"
    rows.append((f"{reads}: ours / native", NATIVE_TARGET, t.native_reads, t.reads, f"pointers included{pointer}, {one}; {native}"))
    rows.append((f"{reads}, without pointers: ours / native", VALUE_TARGET, t.native_reads, values, f"{one}; {native}"))
    rows.append((f"{reads}: ours / raw socket", RAW_TARGET, t.raw_reads, t.reads, f"pointers included{pointer}, {one}; the raw socket"))
    rows.append((f"{writes}: ours / native", NATIVE_TARGET, t.native_writes, t.writes, f"pointers included, {one}; {native}"))
    connections = L2Settings().connections
    rows.append((f"{reads}: ours, {connections} connections / native", None, t.native_reads, t.shared_reads, native))
    rows.append((f"{reads}: ours, {connections} connections / raw socket", None, t.raw_reads, t.shared_reads, "the raw socket"))
    rows.append((f"{writes}: ours, {connections} connections / native", None, t.native_writes, t.shared_writes, native))
    return [_figure(size, t.count, reason, *row) for row in rows]


def _figure(
    size: int, count: int, reason: str, name: str, target: float | None, theirs: Sequence[float], ours: Sequence[float], against: str
) -> Figure:
    words = "no target" if target is None else f">= {target:g}"
    if not theirs or not ours:
        return not_measured(name, words, reason)
    ratio = statistics.median([their / our for their, our in zip(theirs, ours, strict=True)])
    our, their = statistics.median(ours), statistics.median(theirs)
    detail = (
        f"ours {our * 1e6:.0f} us a value, {size / our / 1e9:.2f} GB/s; {against} {their * 1e6:.0f} us, {size / their / 1e9:.2f} GB/s; "
        f"median ratio of {len(ours)} rounds of {count} values"
    )
    return Figure(name, ratio, "x", words, target is None or ratio >= target, detail)
