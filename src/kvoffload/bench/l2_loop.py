"""What the second tier costs the hub's loop: part of ``kvoffload bench l2``.

One hub writes prompts, another, whose L1 is empty, matches them.
"""

from __future__ import annotations

import asyncio
import gc
import secrets
import statistics
from collections.abc import Coroutine, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from kvoffload.bench.figures import Figure, not_measured
from kvoffload.bench.l2_hub import Engine, TimedLoop
from kvoffload.bench.l2_rivals import InfiniStore, PlainClient
from kvoffload.config import Config, L2Settings
from kvoffload.errors import PeerError, UnsupportedError
from kvoffload.l2.infinistore_tcp import InfiniStoreTcpNode
from kvoffload.l2.node import Item, L2Node, Outcome
from kvoffload.l2.nodes import make_node
from kvoffload.l2.ring import NodeAddress
from kvoffload.messages import BlockKey
from kvoffload.runtime.l2 import MakeNode
from kvoffload.testing.valkey import ValkeyServer

BLOCKS = 250
CPU_TARGET_US, SLICE_TARGET_MS = 5.0, 2.0


@dataclass(frozen=True, slots=True)
class Times:
    """Of matches of `BLOCKS` blocks: seconds, processor seconds of the loop, its slices."""

    walls: list[float]
    cpus: list[float]
    slices: list[float]


def run(infinistore: InfiniStore | None, *, quick: bool) -> list[Figure]:
    """On Valkey, and on InfiniStore where there is one."""
    rounds = 3 if quick else 25
    figures = []
    try:
        with ValkeyServer() as server:
            figures += _cost("Valkey", _run(_measure([server.url], "redis", rounds)))
    except (UnsupportedError, PeerError) as error:
        figures += _no_cost("Valkey", error)
    if infinistore is not None:
        try:
            # A server keeps 64 KiB for each value, however small, and as much for its pointer.
            figures += _cost("InfiniStore", _run(_on_infinistore(infinistore, min(rounds, 5))))
        except (PeerError, OSError) as error:
            figures += _no_cost("InfiniStore", error)
    return figures


def _run(main: Coroutine[Any, Any, Times]) -> Times:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()  # collections are the process's, whatever it holds
    try:
        with asyncio.Runner(loop_factory=TimedLoop) as runner:
            return runner.run(main)
    finally:
        if was_enabled:
            gc.enable()


async def _measure(
    nodes: Sequence[str],
    backend: str,
    rounds: int,
    make: MakeNode = make_node,
) -> Times:
    """Write prompts, then match them: every second one for its time, the others for the slices that they take."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, TimedLoop)
    extra = {"l2": {"backend": backend, "nodes": list(nodes), "min_tokens": 0, "load_or_compute": False}}
    config, prompts = Config.load(extra, {}), [chain() for _ in range(2 * rounds + 2)]
    slots = (len(prompts) + 4) * BLOCKS
    times, slices = Times([], [], []), list[float]()
    async with Engine(config, slots, make).running() as writer:
        loop.slices = slices
        for prompt in prompts:
            await writer.save(prompt)
            await writer.written()
        await _stop_slices(loop)
    async with Engine(config, slots, make).running() as reader:
        for number, prompt in enumerate(prompts):
            loop.slices = slices if number % 2 else None
            wall, cpu = await reader.match(prompt)
            await _stop_slices(loop)
            if number > 1 and number % 2 == 0:  # the first ones connect
                times.walls.append(wall)
                times.cpus.append(cpu)
    times.slices.extend(slices)
    return times


async def _stop_slices(loop: TimedLoop) -> None:
    """What this task does next is not the hub's."""
    loop.slices = None
    await asyncio.sleep(0)


def chain() -> tuple[BlockKey, ...]:
    return tuple(secrets.token_bytes(24) for _ in range(BLOCKS))


class _Recording(InfiniStoreTcpNode):
    """Knows what it wrote, so that it can be deleted."""

    def __init__(self, written: list[str], server: InfiniStore, value_bytes: int, connections: int) -> None:
        super().__init__("bench", server.host, server.port, value_bytes=value_bytes, connections=connections)
        self._written = written

    async def write(self, items: Sequence[Item], deadline: float) -> list[Outcome]:
        self._written += [item.name for item in items]
        return await super().write(items, deadline)


async def _on_infinistore(server: InfiniStore, rounds: int) -> Times:
    written: list[str] = []

    def make(address: NodeAddress, settings: L2Settings, value_bytes: int) -> L2Node:
        return _Recording(written, server, value_bytes, settings.connections)

    with closing(await PlainClient.connect(server)) as plain:
        try:
            return await _measure([server.address], "infinistore", rounds, make)
        finally:
            await plain.forget(written)


# ---------------------------------------------------------------- figures


def _cost(backend: str, times: Times) -> list[Figure]:
    cpu, wall = statistics.median(times.cpus) / BLOCKS * 1e6, statistics.median(times.walls)
    worst = max(times.slices) * 1e3
    return [
        Figure(
            _COST.format(backend),
            cpu,
            "us/block",
            f"<= {CPU_TARGET_US:g}",
            cpu <= CPU_TARGET_US,
            f"processor time of the loop's thread from the match to its answer, {BLOCKS} blocks found, fetched and verified, "
            f"median of {len(times.cpus)}; best {min(times.cpus) / BLOCKS * 1e6:.1f}; {wall * 1e3:.1f} ms by the clock",
        ),
        Figure(
            _SLICE.format(backend),
            worst,
            "ms",
            f"<= {SLICE_TARGET_MS:g}",
            worst <= SLICE_TARGET_MS,
            f"processor time of any of {len(times.slices):,} callbacks while {BLOCKS} blocks at a time were written and fetched",
        ),
    ]


_COST, _SLICE = "l2: the loop's time for a fetch, {}", "l2: the loop's longest slice, {}"


def _no_cost(backend: str, error: Exception) -> list[Figure]:
    targets = ((_COST, f"<= {CPU_TARGET_US:g}"), (_SLICE, f"<= {SLICE_TARGET_MS:g}"))
    return [not_measured(name.format(backend), target, str(error)) for name, target in targets]
