"""The second tier: ``kvoffload bench l2``.

Transfers are measured against a real InfiniStore server, which is to be named, and against its native client; the rest needs a
Valkey or Redis server to start, and vLLM for first tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from kvoffload.bench import l2_busy, l2_engine, l2_envelope, l2_far, l2_loop, l2_transfers
from kvoffload.bench.figures import Figure, not_measured
from kvoffload.bench.l2_rivals import InfiniStore

NO_SERVER = "it needs a real server: kvoffload bench l2 --infinistore HOST:PORT"


def run(quick: bool = False, infinistore: InfiniStore | None = None) -> Iterator[Figure]:
    """All figures. ``infinistore``: a server that nobody needs; the native client does not cut values, and may freeze it with 4 MiB."""
    yield from l2_envelope.measure(quick=quick)
    yield from l2_loop.run(infinistore, quick=quick)
    yield l2_far.run(quick=quick)
    if infinistore is not None:
        yield from asyncio.run(l2_busy.measure(infinistore, quick=quick))
        yield from asyncio.run(l2_transfers.measure(infinistore, quick=quick))  # the native client's largest values may freeze the server
    else:
        yield not_measured("l2: transfers to and from InfiniStore", "several", NO_SERVER)
        yield not_measured("l2: transfers beside a busy engine", "no target", NO_SERVER)
    yield from l2_engine.run(quick=quick)
