"""A node without room loses its writes, which are counted, and serves reads; and is written to again when there is room."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import anyio
import pytest
from tests.infinistore import raw
from tests.infinistore.server import InfiniStoreServer
from tests.pipeline.engines import COUNT, Engine, engine
from tests.pipeline.sites import WAIT_S, FakeSite, InfiniStoreSite, RedisSite

from kvoffload.l2.breaker import BreakerState
from kvoffload.l2.node import Outcome
from kvoffload.testing.fake_node import NodeFault

pytestmark = pytest.mark.asyncio

OLD = 1
MOST = 40
"""Prompts, of a MiB each: more than fit."""


async def fill(writer: Engine) -> int:
    """Write until the node says that it is full; the last prompt that it has whole."""
    assert await writer.write(OLD) == COUNT
    for prompt in range(OLD + 1, MOST):
        if await writer.write(prompt) < COUNT:
            return prompt - 1
    raise AssertionError("the node was never full")


async def is_full_and_serves_reads(writer: Engine, reader: Engine) -> None:
    last = await fill(writer)
    assert last >= OLD
    assert writer.node.writes.outcomes[Outcome.FULL]
    assert writer.node.writing.state is BreakerState.OPEN
    assert writer.node.writing.reason == "the node is full"
    assert writer.node.reading.state is BreakerState.CLOSED
    for prompt in (OLD, last):
        await reader.load_all(prompt)
    assert await reader.load(MOST) == 0
    for each in (writer, reader):
        await each.check()


async def is_written_again(writer: Engine, reader: Engine) -> None:
    """A full node is left alone for some ten seconds."""
    with anyio.fail_after(2 * WAIT_S):
        for prompt in range(1000, 10_000):
            if await writer.write(prompt) == COUNT:
                await reader.load_all(prompt)
                return
            await anyio.sleep(0.2)


@pytest.fixture
def redis_site() -> Iterator[RedisSite]:
    with contextlib.closing(RedisSite(maxmemory_bytes=8 << 20)) as site:
        yield site
        site.check()


@pytest.fixture
def fake_site() -> FakeSite:
    return FakeSite()


async def test_a_fake_that_is_full(fake_site: FakeSite) -> None:
    async with engine(fake_site) as writer, engine(fake_site) as reader:
        fake_site.each(lambda node: setattr(node.store, "capacity_bytes", 5 << 20))
        await is_full_and_serves_reads(writer, reader)


async def test_redis_out_of_memory(redis_site: RedisSite) -> None:
    async with engine(redis_site) as writer, engine(redis_site) as reader:
        await is_full_and_serves_reads(writer, reader)


@pytest.mark.slow
async def test_a_fake_that_gets_room(fake_site: FakeSite) -> None:
    async with engine(fake_site) as writer, engine(fake_site) as reader:
        fake_site.fail("write", NodeFault.FULL)
        assert await writer.write(OLD) == 0
        fake_site.fail("write", NodeFault.NONE)
        await is_written_again(writer, reader)


@pytest.mark.slow
async def test_redis_that_gets_room(redis_site: RedisSite) -> None:
    async with engine(redis_site) as writer, engine(redis_site) as reader:
        await fill(writer)
        assert redis_site.server.command("FLUSHALL") == b"+OK"
        await is_written_again(writer, reader)


# ---------------------------------------------------------------- InfiniStore, whose least pool is a GiB


def leak_all(site: InfiniStoreSite) -> None:
    """Values that are begun and never ended take room, and are never evicted: all of it, but for 64 KiB."""
    for exponent in range(29, 15, -1):
        with raw.connect(site.server) as connection:
            connection.sendall(raw.request(b"L", raw.payload(f"leak-{exponent}", 1 << exponent, "P")) + b"x")


async def test_infinistore_says_507(infinistore_server: InfiniStoreServer) -> None:
    """Its pool is taken by values that were never ended: there is nothing to evict."""
    with contextlib.closing(InfiniStoreSite(infinistore_server)) as site:
        async with engine(site) as writer, engine(site) as reader:
            leak_all(site)
            for prompt in range(OLD, MOST):
                assert await writer.write(prompt) < COUNT
                await reader.load(prompt)
            assert writer.node.writes.outcomes[Outcome.FULL]
            assert writer.node.writing.reason == "the node is full"
            assert writer.node.reading.state is reader.node.reading.state is BreakerState.CLOSED
            for each in (writer, reader):
                await each.check()
            site.check()
            site.restart()
            writer.probe_now()
            await is_written_again(writer, reader)


@pytest.mark.slow
async def test_infinistore_evicts_what_is_old(infinistore_server: InfiniStoreServer) -> None:
    """1.3 GiB into a pool of one. What is evicted is a miss; of what is there, each byte is right."""
    with contextlib.closing(InfiniStoreSite(infinistore_server)) as site:
        async with engine(site) as writer, engine(site) as reader:
            prompts = 1300
            for prompt in range(prompts):
                await writer.write(prompt)
                if prompt % 10 == 0:
                    await reader.load(prompt * 7919 % (prompt + 1))
            await reader.load_all(prompts - 1)
            found = [await reader.load(prompt) for prompt in range(0, prompts, 25)]
            assert 0 in found
            assert COUNT in found
            for each in (writer, reader):
                await each.check()
        site.check()
