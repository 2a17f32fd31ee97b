"""What befalls a node befalls nobody else: engines load right bytes or none, in time, lose nothing, and use the node again when it is
well. Each fault on the fake node, on a real Valkey and on a real InfiniStore server, without vLLM."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from tests.pipeline.engines import COUNT, DEADLINE_S, SLACK_S, Engine, engine
from tests.pipeline.proxy import Way
from tests.pipeline.sites import WAIT_S, Site

pytestmark = pytest.mark.asyncio

OLD, NEW = 1, 2
"""Prompts: one that the node has before anything happens, and one that is written while it does."""


@asynccontextmanager
async def engines(site: Site, deadline_s: float = DEADLINE_S, **l2: Any) -> AsyncIterator[tuple[Engine, Engine]]:
    """One that has written OLD, and one that has nothing in its L1. At the end nothing is under way, lost or held."""
    async with engine(site, deadline_s=deadline_s, **l2) as writer, engine(site, deadline_s=deadline_s, **l2) as reader:
        assert await writer.write(OLD) == COUNT
        yield writer, reader
        await writer.check()
        await reader.check()


async def serves(writer: Engine, reader: Engine) -> None:
    """What is saved from now on comes to be found by others, by itself. Of the first ones some may be lost."""
    with anyio.fail_after(WAIT_S):
        for prompt in range(1000, 10_000):
            if await writer.write(prompt) and await reader.load(prompt):
                return
            await anyio.sleep(0.05)


async def while_held(site: Site, way: Way, writer: Engine, reader: Engine, act: Callable[[], None]) -> None:
    """In the middle of a read of OLD, or a write of NEW."""
    site.hold(way)
    try:
        transfer = asyncio.create_task(reader.load(OLD) if way == "get" else writer.write(NEW))
        await asyncio.to_thread(site.wait_held)
        act()
    finally:
        site.release()
    await transfer


IN = pytest.mark.parametrize("way", ["get", "put"])


@IN
async def test_killed(site: Site, way: Way) -> None:
    async with engines(site) as (writer, reader):
        await while_held(site, way, writer, reader, site.kill)
        for prompt in (OLD, NEW):
            await reader.load(prompt)
            await writer.load(prompt)
        site.restart()
        await serves(writer, reader)


@IN
async def test_frozen_for_a_while(site: Site, way: Way) -> None:
    async with engines(site) as (writer, reader):
        await while_held(site, way, writer, reader, site.freeze)
        await reader.load(NEW)
        site.thaw()
        await serves(writer, reader)
        await reader.load_all(OLD)


@pytest.mark.slow
@IN
async def test_frozen_for_5_s(site: Site, way: Way) -> None:
    async with engines(site) as (writer, reader):
        await while_held(site, way, writer, reader, site.freeze)
        until = time.monotonic() + 5
        while time.monotonic() < until:
            await reader.load(NEW)
            await writer.save(NEW + 1)
            await anyio.sleep(0.1)
        site.thaw()
        await serves(writer, reader)
        await reader.load_all(OLD)


@pytest.mark.parametrize("way", ["get", pytest.param("put", marks=pytest.mark.slow)])
async def test_frozen_for_ever(site: Site, way: Way) -> None:
    """It costs a few deadlines, then nothing; and engines can end."""
    async with engines(site, 0.25, write_timeout_ms=300) as (writer, reader):
        await while_held(site, way, writer, reader, site.freeze)
        with anyio.fail_after(WAIT_S):
            while not reader.is_left_alone:
                await reader.load(OLD)
        begun = time.monotonic()
        for prompt in range(100, 110):
            assert await reader.load(prompt) == 0
            assert (await writer.save(prompt)).stored_tokens > 0
        assert time.monotonic() - begun < 2 * (0.25 + SLACK_S), "one of these may have been a probe"


@pytest.mark.parametrize("fault", ["restarted", "killed"])
async def test_restarted_empty(site: Site, fault: str) -> None:
    """Between two uses, with connections that have been idle; and seen dead before it comes back."""
    async with engines(site) as (writer, reader):
        assert await reader.load(OLD) == COUNT
        if fault == "killed":
            site.kill()
            for prompt in range(100, 110):
                assert await reader.load(prompt) == 0
        site.restart()
        assert await reader.load(NEW) == 0
        await serves(writer, reader)
        async with engine(site) as third:
            if fault == "killed":
                await third.load_all(OLD)  # the writer brought it back, and nobody saved it again


async def test_slow(site: Site) -> None:
    """A MiB per second: a prompt takes twice its deadline. What was late may still come for the next who asks."""
    async with engines(site) as (writer, reader):
        site.slow(1e6)
        for prompt in (OLD, OLD, NEW):
            await reader.load(prompt)
        await writer.write(NEW)
        await reader.load(NEW)
        assert reader.longest_s <= DEADLINE_S + SLACK_S
        assert reader.remote.totals.late
        site.slow(None)
        await serves(writer, reader)
        await reader.load_all(OLD)


async def test_reset_again_and_again(site: Site) -> None:
    async with engines(site) as (writer, reader):
        site.flap(resets=True)
        for prompt in range(NEW, NEW + 6):
            await writer.write(prompt)
            await reader.load(OLD)
            await reader.load(prompt)
        assert writer.remote.totals.write_failed, "no reset ever hit a write"
        site.flap(resets=False)
        await serves(writer, reader)
        await reader.load_all(OLD)
        for prompt in range(NEW, NEW + 6):
            await reader.load(prompt)


async def test_two_engines_write_and_read_the_same_at_once(site: Site) -> None:
    async with engine(site) as one, engine(site) as other, engine(site) as third:

        async def work(mine: Engine, offset: int) -> None:
            for number in range(24):
                prompt = (number + offset) % 8
                await mine.save(prompt) if number % 3 else await mine.load(prompt)

        async with anyio.create_task_group() as tasks:
            for mine in (one, other):
                for offset in (0, 0, 4):
                    tasks.start_soon(work, mine, offset)
            for prompt in range(8):
                await third.load(prompt)
        for each in (one, other):
            await each.check()
        for prompt in range(8):
            await third.load_all(prompt)
        await third.check()
        assert third.loaded >= 8 * COUNT
