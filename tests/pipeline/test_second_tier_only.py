"""L1 off: whole engines that keep blocks on nodes alone, and whose slots are free whenever nothing is on its way."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import numpy as np
import pytest
from numpy.typing import NDArray

import kvoffload
from kvoffload.l1.states import State
from kvoffload.messages import ConnectorOff
from kvoffload.runtime.hub import HubRuntime, RankPort
from kvoffload.standalone import Runtime
from kvoffload.testing.valkey import ValkeyServer

pytestmark = pytest.mark.asyncio

BLOCK_SIZE, BLOCKS, PAGE = 4, 64, 4096
SLOT_BYTES = PAGE + 4096
TOKENS = list(range(16 * BLOCK_SIZE))
WAIT_S = 20.0


class Engine:
    """A runtime of one layer."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.kv: NDArray[np.uint8] = np.zeros((BLOCKS, PAGE), dtype=np.uint8)

    async def load(self, tokens: list[int], expected: NDArray[np.uint8]) -> int:
        """How many blocks there are; their bytes are compared."""
        async with self.runtime.match(tokens) as hit:
            places = list(range(hit.blocks))
            if hit.blocks:
                await self.runtime.load(hit, places)
            assert np.array_equal(self.kv[places], expected[places])
            return hit.blocks

    async def is_empty(self) -> None:
        """All slots are free, soon."""
        with anyio.fail_after(WAIT_S):
            while (slots := self.runtime.statistics()).slots[State.FREE] < slots.usable:  # noqa: ASYNC110
                await anyio.sleep(0.005)


@asynccontextmanager
async def engine(url: str, slots: int = 64, **l2: object) -> AsyncIterator[Engine]:
    settings = {
        "model": {"version": "test"},
        "l1": {"enabled": False, "capacity_bytes": slots * SLOT_BYTES, "reserve_bytes": 0},
        "l2": {
            "backend": "redis",
            "nodes": [url],
            "min_tokens": 1,
            "load_or_compute": False,
            "deadline_base_ms": 5000,
            "deadline_most_ms": 5000,
            "ingestion": "hot",
            **l2,
        },
    }
    async with kvoffload.open_runtime(kvoffload.Config.load(settings, {})) as runtime:
        made = Engine(runtime)
        await runtime.register({"layer": made.kv}, block_size=BLOCK_SIZE)
        with anyio.fail_after(WAIT_S):
            while runtime.statistics().usable < slots:  # noqa: ASYNC110
                await anyio.sleep(0.005)
        yield made


def random_blocks() -> NDArray[np.uint8]:
    return np.frombuffer(os.urandom(BLOCKS * PAGE), dtype=np.uint8).reshape(BLOCKS, PAGE)


async def test_what_one_engine_saved_another_loads_and_neither_keeps_a_slot() -> None:
    content = random_blocks()
    with ValkeyServer() as server:
        async with engine(server.url) as writer:
            writer.kv[:] = content
            await writer.runtime.save(TOKENS, list(range(16)))
            await writer.runtime.flush()
            await writer.is_empty()
            remote = writer.runtime.statistics().remote
            assert remote is not None
            assert remote.totals.written == 16
            # The first save looked for its blocks while they were being written: what the node said then may be old news by now.
            assert await writer.load(TOKENS, content) == 16, "from the node"
            before = writer.runtime.statistics().shared
            await writer.runtime.save(TOKENS, list(range(16)))
            assert writer.runtime.statistics().shared - before == 16, "the node has them"
            await writer.is_empty()
        async with engine(server.url) as reader:
            assert await reader.load(TOKENS, content) == 16
            await reader.is_empty()
            counts = []

            async def load() -> None:
                counts.append(await reader.load(TOKENS, content))

            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(load)
            assert counts == [16] * 3
            await reader.is_empty()


async def test_of_a_save_larger_than_the_staging_the_first_blocks_are_stored_and_later_the_rest() -> None:
    content = random_blocks()
    with ValkeyServer() as server:
        async with engine(server.url, slots=16) as writer:
            writer.kv[:] = content
            tokens = list(range(32 * BLOCK_SIZE))
            for round_number in range(1, 6):
                await writer.runtime.save(tokens, list(range(32)))
                await writer.runtime.flush()
                await writer.is_empty()
                remote = writer.runtime.statistics().remote
                assert remote is not None
                # Half of the slots at once; where a write ends while the rest is being offered, more.
                assert remote.totals.written >= min(32, 8 * round_number)
            assert await writer.load(tokens, content) == 8, "and half of them for loads"
            await writer.is_empty()
        async with engine(server.url) as reader:
            assert await reader.load(tokens, content) == 32


async def test_without_the_second_tier_the_connector_is_off() -> None:
    config = kvoffload.Config.load({"l1": {"enabled": False}, "l2": {"backend": "redis", "nodes": ["redis://127.0.0.1:1"]}}, {})
    hub = HubRuntime(config)
    told: list[object] = []
    hub.open(16, [RankPort(told.append)], asyncio.get_running_loop().call_soon_threadsafe, None)
    assert hub.off_reason == "l1.enabled is false, and there is no L2: blocks must stay in this engine"
    assert told == [ConnectorOff(hub.off_reason)] == list(hub.take())
    assert not hub.is_live
