"""A machine that has no thread left to hash in: blocks are misses and the actors live."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import anyio
import anyio.to_thread
import pytest
from tests.actors.l2_rigs import FAR, NODE, PrefetcherRig, WriterRig, keys

from kvoffload.errors import CapacityError
from kvoffload.l2.transfers import in_thread
from kvoffload.messages import FetchBlocks, FetchFinished, WriteBlocks, WriteFinished

pytestmark = pytest.mark.asyncio


@contextmanager
def no_new_threads() -> Iterator[None]:
    """No thread can be started, since there is no room for its stack; those that a test's loop had are not reused by the next one's."""
    before = threading.stack_size(1 << 46)
    try:
        yield
    finally:
        threading.stack_size(before)


async def test_none_can_be_started() -> None:
    limiter = anyio.CapacityLimiter(1)
    with no_new_threads(), pytest.raises(CapacityError, match="thread"):
        await in_thread(limiter, int, 3)
    assert await in_thread(limiter, int, 3) == 3
    with no_new_threads():
        assert await in_thread(limiter, int, "4") == 4, "one that there is will do"


async def test_what_the_function_raises_is_its_own() -> None:
    def fail() -> None:
        raise RuntimeError("can't start new thread")

    with pytest.raises(RuntimeError):
        await in_thread(anyio.CapacityLimiter(1), fail)


async def test_a_prefetcher() -> None:
    rig = PrefetcherRig(ranks=2)
    rig.store(0, 1)
    running = asyncio.create_task(rig.actor().run())
    with no_new_threads():
        rig.post(FetchBlocks(1, (0, 1, 2), keys(0, 1, 7), anyio.current_time() + FAR))
        await rig.until(lambda: len(rig.out) == 1)
    assert replace(rig.answer(), seconds=0.0) == FetchFinished(1, NODE, (), (2,), (0, 1))
    assert rig.is_clear(0)
    assert rig.is_clear(1)
    rig.post(FetchBlocks(2, (0, 1), keys(0, 1), anyio.current_time() + FAR))
    await rig.until(lambda: len(rig.out) == 2)
    again = rig.answers()[1]
    assert isinstance(again, FetchFinished)
    assert replace(again, seconds=0.0) == FetchFinished(2, NODE, (0, 1), (), ())
    rig.sender.close()
    await running
    rig.close()


async def test_a_writer() -> None:
    rig = WriterRig()
    rig.fill(0, 1)
    running = asyncio.create_task(rig.actor().run())
    with no_new_threads():
        rig.post(WriteBlocks(1, (0, 1), keys(0, 1)))
        await rig.until(lambda: len(rig.out) == 1)
    assert rig.out == [WriteFinished(1, NODE, (), (0, 1))]
    rig.post(WriteBlocks(2, (0, 1), keys(0, 1)))
    await rig.until(lambda: len(rig.out) == 2)
    assert rig.out[1] == WriteFinished(2, NODE, (0, 1), ())
    rig.sender.close()
    await running
    rig.close()
