"""Nodes as a real Redis names them, through whole engines: they move, come and go; and so does that Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import anyio
import pytest
from tests.pipeline.engines import COUNT, Engine, engine
from tests.pipeline.sites import WAIT_S, FakeSite, Site

from kvoffload.l2.nodes_table import TableNode, make_table, render_table
from kvoffload.testing.valkey import ValkeyServer, free_port

pytestmark = pytest.mark.asyncio

OLD = 1
TABLE = "kvcache_nodes"


@pytest.fixture
def members() -> Iterator[ValkeyServer]:
    server = ValkeyServer(port=free_port(), requirepass="hunter2secret")
    yield server
    server.stop()


def publish(members: ValkeyServer, version: int, *ports: int) -> None:
    nodes = [TableNode(f"kv-{index}", "127.0.0.1", port) for index, port in enumerate(ports)]
    assert members.command("SET", TABLE, render_table(make_table(version, nodes))) == b"+OK"


@asynccontextmanager
async def member(site: Site, members: ValkeyServer, url: str | None = None) -> AsyncIterator[Engine]:
    table = {"url": url or members.url, "poll_s": 0.05, "timeout_ms": 300}
    async with engine(site, membership=table) as made:
        yield made


async def knows(engine: Engine, nodes: int) -> None:
    await engine.until(lambda: len(engine.nodes) == nodes, f"it knows {nodes} nodes")


async def is_in_trouble(engine: Engine, words: str) -> None:
    await engine.until(lambda: words in (engine.membership.last_error or ""), f"{words!r} is what is the matter")


async def serves(writer: Engine, reader: Engine) -> None:
    with anyio.fail_after(WAIT_S):
        for prompt in range(1000, 10_000):
            if await writer.write(prompt) == COUNT:
                await reader.load_all(prompt)
                return
            await anyio.sleep(0.05)


async def test_a_node_that_moves(site: Site, members: ValkeyServer) -> None:
    """It dies, and is restarted empty somewhere else; the table says where. Who has its blocks still brings them there."""
    members.start()
    publish(members, 1, site.port)
    async with member(site, members) as writer, member(site, members) as reader:
        for each in (writer, reader):
            await knows(each, 1)
        assert await writer.write(OLD) == COUNT
        site.kill()
        assert await reader.load(OLD) == 0
        site.restart(elsewhere=True)
        assert await reader.load(OLD) == 0
        publish(members, 2, site.port)
        for each in (writer, reader):
            await each.until(lambda each=each: each.membership.version == 2, "the new table")  # type: ignore[misc]
        await reader.load_all(OLD)
        await serves(writer, reader)
        for each in (writer, reader):
            await each.check()


async def test_a_node_that_leaves_in_the_middle_of_transfers(site: Site, members: ValkeyServer) -> None:
    members.start()
    publish(members, 1, site.port)
    async with member(site, members) as writer, member(site, members) as reader:
        for each in (writer, reader):
            await knows(each, 1)
        assert await writer.write(OLD) == COUNT
        site.hold("get")
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(reader.load, OLD)
                await anyio.to_thread.run_sync(site.wait_held)
                publish(members, 2, free_port())
                await reader.until(lambda: reader.membership.version == 2, "the new table")
        finally:
            site.release()
        publish(members, 3, site.port)
        await reader.until(lambda: reader.membership.version == 3, "the newest table")
        await reader.load_all(OLD)
        for each in (writer, reader):
            await each.check()


async def test_redis_absent_then_there_then_gone_then_empty(members: ValkeyServer) -> None:
    site = FakeSite()
    async with member(site, members) as writer, member(site, members) as reader:
        await is_in_trouble(reader, "connect")
        assert (await writer.save(OLD)).stored_tokens, "L1 does not care"
        assert await writer.load(OLD) == COUNT
        assert await reader.load(OLD) == 0
        members.start()
        await is_in_trouble(reader, TABLE)
        publish(members, 1, site.port)
        for each in (writer, reader):
            await knows(each, 1)
        await serves(writer, reader)
        for spoil in (members.kill, members.start):
            spoil()
            await is_in_trouble(reader, "connect" if spoil == members.kill else TABLE)
            assert len(reader.nodes) == 1
            await serves(writer, reader)
        for each in (writer, reader):
            await each.check()


@pytest.mark.parametrize("spoilt", [b"{", b"[]", b'{"nodes": [], "version": 9}', b'{"nodes": [{"name": 7}], "version": 9}', b""])
async def test_malformed_tables(members: ValkeyServer, spoilt: bytes) -> None:
    """The last good one stays in force."""
    site = FakeSite()
    members.start()
    publish(members, 1, site.port)
    async with member(site, members) as writer, member(site, members) as reader:
        for each in (writer, reader):
            await knows(each, 1)
        assert members.command("SET", TABLE, spoilt) == b"+OK"
        await reader.until(lambda: reader.membership.last_error is not None, "it says so")
        await serves(writer, reader)
        publish(members, 2, site.port)
        await reader.until(lambda: reader.membership.last_error is None, "it has recovered")
        for each in (writer, reader):
            await each.check()


async def test_a_wrong_password(members: ValkeyServer) -> None:
    site = FakeSite()
    members.start()
    publish(members, 1, site.port)
    async with member(site, members, f"redis://:wrong@127.0.0.1:{members.port}") as made:
        await made.until(lambda: made.membership.failures > 1, "it was turned away")
        assert "wrong" not in (made.membership.last_error or "").replace("WRONGPASS", "")
        assert (await made.save(OLD)).stored_tokens
        assert await made.load(OLD) == COUNT
        assert not made.nodes
        await made.check()
