"""The second tier: ``kvoffload bench l2``.

Transfers are measured against a real InfiniStore server, which is to be named, and against its native client; the rest needs a
Valkey or Redis server to start, and vLLM for first tokens.
"""

from __future__ import annotations

import asyncio

from kvoffload.bench import l2_busy, l2_engine, l2_envelope, l2_loop, l2_transfers
from kvoffload.bench.figures import Figure, not_measured
from kvoffload.bench.l2_rivals import InfiniStore

NO_SERVER = "it needs a real server: kvoffload bench l2 --infinistore HOST:PORT"


def run(quick: bool = False, infinistore: InfiniStore | None = None) -> list[Figure]:
    """All figures. ``infinistore`` is a server that nobody needs: 4 MiB values may freeze it, whoever's client reads them."""
    figures = [*l2_envelope.measure(quick=quick), *l2_loop.run(infinistore, quick=quick), *l2_engine.run(quick=quick)]
    if infinistore is None:
        what = ("transfers to and from InfiniStore", "several"), ("transfers beside a busy engine", "no target")
        return figures + [not_measured(f"l2: {name}", target, NO_SERVER) for name, target in what]
    return figures + asyncio.run(_transfers(infinistore, quick=quick))


async def _transfers(server: InfiniStore, *, quick: bool) -> list[Figure]:
    beside = await l2_busy.measure(server, quick=quick)  # first: the largest values may freeze the server
    return [*beside, *await l2_transfers.measure(server, quick=quick)]
