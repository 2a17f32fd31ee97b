from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from kvoffload.errors import MisuseError
from kvoffload.testing.cancel import cancel_at_every_checkpoint

pytestmark = pytest.mark.anyio


async def test_every_checkpoint_is_hit_once_and_the_last_run_is_complete() -> None:
    steps: list[list[int]] = []

    def make_run() -> Coroutine[Any, Any, None]:
        log: list[int] = []
        steps.append(log)

        async def run() -> None:
            log.append(0)
            await checkpoint()
            log.append(1)
            await anyio.sleep(5)
            log.append(2)
            await checkpoint()
            log.append(3)

        return run()

    assert await cancel_at_every_checkpoint(make_run, lambda nth: None) == 3
    assert steps == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]


async def test_check_is_told_the_checkpoint_and_may_be_async() -> None:
    seen: list[int] = []

    async def check(nth: int) -> None:
        await checkpoint()
        seen.append(nth)

    assert await cancel_at_every_checkpoint(lambda: anyio.sleep(1), check) == 1
    assert seen == [1, 2]


async def test_it_finds_a_leak() -> None:
    held: set[str] = set()

    async def leaky() -> None:
        held.add("slot")
        await checkpoint()
        held.discard("slot")

    def check(nth: int) -> None:
        assert not held, held

    with pytest.raises(AssertionError, match="slot") as failure:
        await cancel_at_every_checkpoint(leaky, check)
    assert failure.value.__notes__ == ["after a cancellation at checkpoint 1"]


async def test_cleanup_runs_and_a_shielded_wait_is_passed() -> None:
    closed: list[str] = []

    async def run() -> None:
        try:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(1)
                closed.append("written")
            await checkpoint()
            closed.append("went on")
        finally:
            closed.append("closed")

    def check(nth: int) -> None:
        assert closed in (["written", "closed"], ["written", "went on", "closed"])
        closed.clear()

    assert await cancel_at_every_checkpoint(run, check) == 2


async def test_an_error_says_where() -> None:
    async def bad_cleanup() -> None:
        try:
            await checkpoint()
        except BaseException:
            raise RuntimeError("the cleanup failed") from None

    with pytest.raises(RuntimeError, match="cleanup failed") as failure:
        await cancel_at_every_checkpoint(bad_cleanup, lambda nth: None)
    assert failure.value.__notes__ == ["when cancelled at checkpoint 1"]


async def test_child_tasks_end_with_their_parent() -> None:
    running: set[int] = set()

    async def child(number: int) -> None:
        running.add(number)
        try:
            await anyio.sleep(number)
        finally:
            running.discard(number)

    async def run() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child, 1)
            tasks.start_soon(child, 2)
            await anyio.sleep(0.5)

    def check(nth: int) -> None:
        assert not running

    assert await cancel_at_every_checkpoint(run, check) >= 2


async def test_a_run_without_end_is_refused() -> None:
    async def stubborn() -> None:
        for _ in range(10):
            with anyio.CancelScope(shield=True):
                await checkpoint()

    with pytest.raises(MisuseError, match="did not end within 4"):
        await cancel_at_every_checkpoint(stubborn, lambda nth: None, most=4)
