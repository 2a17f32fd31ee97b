"""A node that lost what it had gets it back from who still has it in L1: nobody has to save it again."""

from __future__ import annotations

from collections.abc import Iterator

import anyio
import pytest
from tests.pipeline.engines import COUNT, engine
from tests.pipeline.sites import WAIT_S, RedisSite, Site

pytestmark = pytest.mark.asyncio

KEPT, OTHER = 1, 2


@pytest.fixture
def valkey() -> Iterator[RedisSite]:
    site = RedisSite()
    try:
        yield site
        site.check()
    finally:
        site.close()


async def test_what_was_saved_before_a_restart_is_found_by_others_after_it(site: Site) -> None:
    async with engine(site) as writer:
        assert await writer.write(KEPT) == COUNT
        site.kill()
        await writer.until_left_alone(OTHER)
        site.restart()
        writer.probe_now()
        await writer.until(lambda: writer.remote.totals.offered_again >= COUNT, "all of it is offered again")
        async with engine(site) as other:
            await other.load_all(KEPT)
            await other.check()
        await writer.check()
        assert writer.remote.totals.lacking >= COUNT
        assert not writer.remote.catching_up


async def test_a_restart_so_quick_that_nothing_failed_is_noticed_as_well(site: Site) -> None:
    async with engine(site) as writer:
        assert await writer.write(KEPT) == COUNT
        site.kill()
        site.restart()
        assert await writer.write(OTHER) == COUNT, "over connections that went stale"
        assert not writer.is_left_alone
        async with engine(site) as other:
            await other.load_all(KEPT)
            await other.check()
        await writer.check()


async def test_what_was_saved_while_the_node_was_dead_is_found_by_others_when_it_is_back(site: Site) -> None:
    async with engine(site) as writer:
        site.kill()
        await writer.until_left_alone(OTHER)
        assert await writer.write(KEPT) == 0
        site.restart()
        writer.probe_now()
        async with engine(site) as other:
            with anyio.fail_after(WAIT_S):
                while await other.load(KEPT) < COUNT:
                    writer.probe_now()  # its writes' breaker as well: the pause is seconds
                    await anyio.sleep(0.05)
            await other.check()
        await writer.check()


async def test_a_node_that_was_full_gets_what_it_had_no_room_for(valkey: RedisSite) -> None:
    """It served reads all the time."""
    async with engine(valkey) as writer:
        valkey.server.command("CONFIG", "SET", "maxmemory", "3mb")
        prompts = range(10, 18)
        for prompt in prompts:
            await writer.write(prompt)
        assert writer.remote.totals.write_failed
        valkey.server.command("CONFIG", "SET", "maxmemory", "0")
        async with engine(valkey) as other:
            with anyio.fail_after(WAIT_S):
                for prompt in prompts:
                    while await other.load(prompt) < COUNT:
                        writer.probe_now()
                        await anyio.sleep(0.05)
            await other.check()
        await writer.check()
