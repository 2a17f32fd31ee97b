from __future__ import annotations

import threading
from collections.abc import Coroutine
from typing import Any

import anyio
import pytest
from anyio import wait_all_tasks_blocked

from kvoffload.errors import InternalError, PeerError
from kvoffload.mailbox import Reply
from kvoffload.testing.clock import run_virtually


@pytest.mark.anyio
async def test_an_answer_reaches_all_that_wait() -> None:
    reply: Reply[int] = Reply()
    answers: list[int] = []

    async def wait() -> None:
        answers.append(await reply.wait())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        tasks.start_soon(wait)
        await wait_all_tasks_blocked()
        assert reply.is_open
        reply.answer(7)
    assert answers == [7, 7]
    assert await reply.wait() == 7
    assert not reply.is_open


@pytest.mark.anyio
async def test_gone_is_an_error_for_those_who_wait_and_who_come_later() -> None:
    reply: Reply[int] = Reply()

    async def expect_gone() -> None:
        with pytest.raises(PeerError, match="gone"):
            await reply.wait()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(expect_gone)
        await wait_all_tasks_blocked()
        reply.gone()
    await expect_gone()
    with pytest.raises(PeerError, match="gone"):
        reply.wait_sync(0)


def test_it_is_answered_once() -> None:
    reply: Reply[int] = Reply()
    reply.answer(1)
    reply.gone()
    with pytest.raises(InternalError, match="twice"):
        reply.answer(2)
    assert reply.wait_sync(0) == 1


def test_an_answer_after_gone_is_ignored() -> None:
    reply: Reply[int] = Reply()
    reply.gone()
    reply.answer(1)
    with pytest.raises(PeerError, match="gone"):
        reply.wait_sync(0)


def test_a_thread_waits_for_at_most_its_timeout() -> None:
    reply: Reply[int] = Reply()
    assert reply.wait_sync(0.01) is None
    threading.Timer(0.02, reply.answer, [5]).start()
    assert reply.wait_sync(30) == 5


@pytest.mark.anyio
@pytest.mark.real_clock
async def test_a_thread_answers_a_task() -> None:
    reply: Reply[str] = Reply()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, reply.answer, "from a thread")
        with anyio.fail_after(30):
            assert await reply.wait() == "from a thread"


@pytest.mark.anyio
async def test_one_that_gave_up_waiting_is_forgotten() -> None:
    reply: Reply[int] = Reply()
    with anyio.move_on_after(3600) as scope:
        await reply.wait()
    assert scope.cancelled_caught
    reply.answer(1)
    assert await reply.wait() == 1


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_answer_for_a_loop_that_has_ended_is_no_error(backend: str) -> None:
    """A task that was left suspended when its loop died still waits, for ever; the thread that answers must not suffer."""
    reply: Reply[int] = Reply()
    left: list[Coroutine[Any, Any, int]] = []

    async def leave_a_task_behind() -> None:
        left.append(reply.wait())
        left[0].send(None)

    run_virtually(leave_a_task_behind, backend=backend)
    thread = threading.Thread(target=reply.answer, args=(1,))
    thread.start()
    thread.join()
    assert reply.wait_sync(30) == 1
    left[0].close()
