"""Posting from threads: nothing lost or doubled, one wake-up per drain, and a closed loop is told at once and never raises."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import anyio
import pytest

from kvoffload.errors import PeerError
from kvoffload.mailbox import EndOfMailbox, OnFull, Receiver, Reply, Sender, current_call_soon, open_mailbox


@dataclass(frozen=True)
class Question:
    reply: Reply[int]


def open_any(capacity: int, on_full: OnFull, call_soon: Callable[[Callable[[], None]], object]) -> tuple[Sender[Any], Receiver[Any]]:
    return open_mailbox("m", capacity, on_full, call_soon=call_soon)


class ManualLoop:
    """A loop that runs what it was given only when told to; every part of the wake-up is visible."""

    def __init__(self) -> None:
        self.scheduled: deque[Callable[[], None]] = deque()
        self.is_closed = False

    def call_soon(self, function: Callable[[], None]) -> None:
        if self.is_closed:
            raise RuntimeError("Event loop is closed")
        self.scheduled.append(function)

    def run(self) -> None:
        while self.scheduled:
            self.scheduled.popleft()()


def test_one_wake_up_per_drain() -> None:
    loop = ManualLoop()
    sender, receiver = open_any(100, OnFull.REFUSE, loop.call_soon)
    post = sender.threadsafe()
    for i in range(10):
        post.offer(i)
    post.owe(10)
    assert len(loop.scheduled) == 1
    loop.run()
    assert receiver.receive_nowait() == list(range(11))
    post.offer(11)
    assert not loop.scheduled, "a receiver that handles a burst comes back by itself"
    assert receiver.receive_nowait() == [11]
    assert receiver.receive_nowait() == []
    post.offer(12)
    assert len(loop.scheduled) == 1


def test_a_closed_loop_refuses_and_never_raises() -> None:
    loop = ManualLoop()
    sender, receiver = open_any(100, OnFull.REFUSE, loop.call_soon)
    post = sender.threadsafe()
    loop.is_closed = True
    assert not post.offer(1)
    post.owe(2)
    assert not post.offer(3)
    post.close()
    counted = receiver.statistics()
    assert (counted.depth, counted.accepted, counted.refused, counted.dropped) == (0, 0, 2, 1)


def test_an_answer_owed_to_a_closed_loop_is_dropped_and_its_reply_is_gone() -> None:
    loop = ManualLoop()
    sender, receiver = open_any(100, OnFull.REFUSE, loop.call_soon)
    loop.is_closed = True
    question = Question(Reply())
    sender.threadsafe().owe(question)
    with pytest.raises(PeerError, match="gone"):
        question.reply.wait_sync(0)
    assert receiver.statistics().dropped == 1


def test_closing_from_a_thread_wakes_the_receiver_once() -> None:
    loop = ManualLoop()
    sender, receiver = open_any(1, OnFull.REFUSE, loop.call_soon)
    post = sender.threadsafe()
    other = post.clone()
    sender.close()
    post.close()
    assert not loop.scheduled
    other.close()
    other.close()
    assert len(loop.scheduled) == 1
    assert not other.offer(1)
    with pytest.raises(EndOfMailbox):
        receiver.receive_nowait()


@pytest.mark.parametrize("policy", list(OnFull))
def test_the_bound_holds_from_threads(policy: OnFull) -> None:
    loop = ManualLoop()
    sender, receiver = open_any(3, policy, loop.call_soon)
    post = sender.threadsafe()
    start = threading.Barrier(4)

    def produce(first: int) -> None:
        start.wait()
        for i in range(first, first + 500):
            post.offer(i)

    threads = [threading.Thread(target=produce, args=(k * 500,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counted = receiver.statistics()
    assert counted.depth == counted.peak == 3
    if policy is OnFull.LATEST:
        assert (counted.accepted, counted.dropped, counted.refused) == (2000, 1997, 0)
    else:
        assert (counted.accepted, counted.dropped + counted.refused) == (3, 1997)


@pytest.mark.anyio
@pytest.mark.real_clock
async def test_nothing_is_lost_between_threads_and_the_loop() -> None:
    sender, receiver = open_any(64, OnFull.REFUSE, current_call_soon())
    per_thread, producers = 3000, 3
    finished = [sender.threadsafe() for _ in range(producers)]
    sender.close()
    accepted: list[list[tuple[int, int]]] = [[] for _ in range(producers)]

    def produce(number: int) -> None:
        with finished[number] as post:
            for i in range(per_thread):
                message = (number, i)
                if i % 3:
                    if post.offer(message):
                        accepted[number].append(message)
                else:
                    post.owe(message)
                    accepted[number].append(message)

    threads = [threading.Thread(target=produce, args=(number,)) for number in range(producers)]
    received: list[tuple[int, int]] = []
    for thread in threads:
        thread.start()
    with anyio.fail_after(50), suppress(EndOfMailbox):
        while True:
            received += await receiver.receive_burst(limit=50)
    for thread in threads:
        thread.join()
    for number in range(producers):
        assert [message for message in received if message[0] == number] == accepted[number]
    counted = receiver.statistics()
    assert counted.handled == len(received) == counted.accepted + counted.owed
    assert counted.refused == producers * per_thread - len(received)


@pytest.mark.anyio
@pytest.mark.real_clock
async def test_every_single_post_wakes_a_waiting_receiver() -> None:
    """Ping-pong with a thread: one lost wake-up, and it hangs."""
    call_soon = current_call_soon()
    sender, receiver = open_any(1, OnFull.REFUSE, call_soon)
    post = sender.threadsafe()
    turn = threading.Semaphore(0)

    def ping() -> None:
        for i in range(500):
            assert post.offer(i)
            assert turn.acquire(timeout=30)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, ping)
        with anyio.fail_after(50):
            for i in range(500):
                assert await receiver.receive_burst() == [i]
                turn.release()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_real_loop_that_has_closed(backend: str) -> None:
    async def make() -> Any:
        return open_any(1, OnFull.REFUSE, current_call_soon())

    sender, _ = anyio.run(make, backend=backend)
    assert not sender.threadsafe().offer(1)


def test_a_loop_that_closes_with_posts_pending() -> None:
    """The first post was accepted, and is lost with the loop; nothing raises, then or later."""
    loop = asyncio.new_event_loop()
    sender, receiver = open_any(2, OnFull.REFUSE, loop.call_soon_threadsafe)
    post = sender.threadsafe()
    assert post.offer(1)
    loop.close()
    assert post.offer(2)
    assert not post.offer(3)
    receiver.close()
    assert receiver.statistics().dropped == 2


def test_an_answer_owed_to_a_closed_mailbox_is_dropped_and_its_reply_is_gone() -> None:
    sender, receiver = open_any(4, OnFull.REFUSE, lambda function: None)
    posts = sender.threadsafe()
    receiver.close()
    for end in (sender, posts):
        question = Question(Reply())
        end.owe(question)
        assert not question.reply.is_open
