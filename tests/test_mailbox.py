"""Mailboxes on one loop; from threads: test_mailbox_threads.py, over random histories: properties/test_mailbox_histories.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import anyio
import pytest
from anyio import wait_all_tasks_blocked
from anyio.lowlevel import checkpoint

from kvoffload.errors import MisuseError, PeerError
from kvoffload.mailbox import EndOfMailbox, OnFull, Receiver, Reply, Sender, open_mailbox
from kvoffload.testing.cancel import cancel_at_every_checkpoint

pytestmark = pytest.mark.anyio


def open_any(capacity: int, on_full: OnFull, clock: Callable[[], float] = anyio.current_time) -> tuple[Sender[Any], Receiver[Any]]:
    return open_mailbox("m", capacity, on_full, clock=clock)


@dataclass(frozen=True)
class Question:
    reply: Reply[int]


async def test_a_burst_is_in_order_and_limited() -> None:
    sender, receiver = open_any(10, OnFull.REFUSE)
    assert all(sender.offer(i) for i in range(5))
    assert await receiver.receive_burst(limit=3) == [0, 1, 2]
    assert await receiver.receive_burst(limit=3) == [3, 4]
    assert receiver.receive_nowait() == []


async def test_a_waiting_receiver_is_woken_by_offer_and_by_owe() -> None:
    sender, receiver = open_any(1, OnFull.REFUSE)
    got: list[list[str]] = []

    async def receive_two_bursts() -> None:
        got.append(await receiver.receive_burst())
        got.append(await receiver.receive_burst())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive_two_bursts)
        await wait_all_tasks_blocked()
        sender.offer("offered")
        await wait_all_tasks_blocked()
        sender.owe("owed")
    assert got == [["offered"], ["owed"]]


@pytest.mark.parametrize(("policy", "refused", "dropped"), [(OnFull.REFUSE, 1, 0), (OnFull.WAIT, 1, 0), (OnFull.DROP_NEWEST, 0, 1)])
async def test_a_full_mailbox_keeps_what_it_has(policy: OnFull, refused: int, dropped: int) -> None:
    sender, receiver = open_any(2, policy)
    assert [sender.offer(i) for i in range(3)] == [True, True, False]
    counted = receiver.statistics()
    assert (counted.refused, counted.dropped, counted.accepted, counted.depth) == (refused, dropped, 2, 2)
    assert receiver.receive_nowait() == [0, 1]
    assert sender.offer(3)


async def test_the_latest_replaces_the_newest_that_waits() -> None:
    sender, receiver = open_any(2, OnFull.LATEST)
    assert all(sender.offer(i) for i in range(5))
    assert receiver.receive_nowait() == [0, 4]
    assert receiver.statistics().dropped == 3


async def test_the_latest_never_replaces_an_answer() -> None:
    sender, receiver = open_any(1, OnFull.LATEST)
    sender.offer("old")
    sender.owe("answer")
    sender.offer("new")
    assert receiver.receive_nowait() == ["answer", "new"]


async def test_a_replaced_question_is_told_gone() -> None:
    sender, receiver = open_any(1, OnFull.LATEST)
    first, second = Question(Reply()), Question(Reply())
    sender.offer(first)
    sender.offer(second)
    with pytest.raises(PeerError, match="gone"):
        await first.reply.wait()
    assert second.reply.is_open
    receiver.close()
    assert not second.reply.is_open


async def test_answers_are_always_taken_and_take_no_room() -> None:
    sender, receiver = open_any(1, OnFull.REFUSE)
    for i in range(3):
        sender.owe(i)
    assert sender.offer("request")
    assert not sender.offer("too much")
    counted = receiver.statistics()
    assert (counted.owed, counted.accepted, counted.refused, counted.depth, counted.peak) == (3, 1, 1, 4, 4)
    assert receiver.receive_nowait(limit=3) == [0, 1, 2]
    assert not sender.offer("still too much")
    assert receiver.receive_nowait() == ["request"]
    assert sender.offer("room again")


async def test_send_waits_for_room_first_come_first_served() -> None:
    sender, receiver = open_any(1, OnFull.WAIT)
    sender.offer(0)
    async with anyio.create_task_group() as tasks:
        for i in (1, 2, 3):
            tasks.start_soon(sender.send, i)
            await wait_all_tasks_blocked()
        for expected in range(4):
            assert await receiver.receive_burst() == [expected]
            assert not sender.offer("room is kept for the one that waits") or expected == 3


async def test_send_to_a_mailbox_that_refuses_is_misuse() -> None:
    sender, _ = open_any(1, OnFull.REFUSE)
    with pytest.raises(MisuseError, match="REFUSE"):
        await sender.send(1)


async def test_a_cancelled_send_was_not_accepted() -> None:
    sender, receiver = open_any(1, OnFull.WAIT)
    sender.offer("first")
    scope = anyio.CancelScope()

    async def give_up() -> None:
        with scope:
            await sender.send("given up")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(give_up)
        await wait_all_tasks_blocked()
        tasks.start_soon(sender.send, "patient")
        await wait_all_tasks_blocked()
        scope.cancel()
        await wait_all_tasks_blocked()
        assert await receiver.receive_burst() == ["first"]
        assert await receiver.receive_burst() == ["patient"]
    assert receiver.statistics().accepted == 2


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_send_cancelled_with_a_place_granted_passes_it_on() -> None:
    """Only asyncio's own `Task.cancel` can come between the grant and the send that it is for."""
    sender, receiver = open_any(1, OnFull.WAIT)
    sender.offer("first")
    impatient = asyncio.create_task(sender.send("given up"))
    await wait_all_tasks_blocked()
    patient = asyncio.create_task(sender.send("patient"))
    await wait_all_tasks_blocked()
    assert receiver.receive_nowait() == ["first"]
    impatient.cancel()
    assert await receiver.receive_burst() == ["patient"]
    assert (await asyncio.gather(impatient, return_exceptions=True))[0].__class__ is asyncio.CancelledError
    await patient
    assert receiver.statistics().accepted == 2


async def test_cancelling_receive_at_any_checkpoint_loses_nothing() -> None:
    received: list[int] = []
    sender, receiver = open_any(100, OnFull.REFUSE)

    async def run() -> None:
        for _ in range(3):
            received.extend(await receiver.receive_burst(limit=2))

    def make_run() -> Coroutine[Any, Any, None]:
        received.clear()
        assert receiver.receive_nowait() == []
        for i in range(6):
            sender.offer(i)
        return run()

    def check(nth: int) -> None:
        assert received + receiver.receive_nowait() == [0, 1, 2, 3, 4, 5]

    assert await cancel_at_every_checkpoint(make_run, check) == 3


async def test_a_message_that_meets_a_cancellation_is_received_once() -> None:
    sender, receiver = open_any(1, OnFull.REFUSE)
    received: list[str] = []

    async def receive() -> None:
        received.extend(await receiver.receive_burst())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        await wait_all_tasks_blocked()
        sender.offer("kept")
        tasks.cancel_scope.cancel()
    assert received + receiver.receive_nowait() == ["kept"]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_receive_cancelled_after_its_wake_up_leaves_the_message() -> None:
    sender, receiver = open_any(1, OnFull.REFUSE)
    receiving = asyncio.create_task(receiver.receive_burst())
    await wait_all_tasks_blocked()
    sender.offer("kept")
    receiving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await receiving
    assert await receiver.receive_burst() == ["kept"]


async def test_the_end_comes_when_every_sender_has_closed_and_nothing_is_left() -> None:
    sender, receiver = open_any(1, OnFull.REFUSE)
    other = sender.clone()
    sender.offer("last")
    sender.close()
    sender.close()
    assert receiver.statistics().senders == 1
    other.close()
    assert await receiver.receive_burst() == ["last"]
    for _ in range(2):
        with pytest.raises(EndOfMailbox):
            await receiver.receive_burst()
    with pytest.raises(EndOfMailbox):
        receiver.receive_nowait()


async def test_closing_the_last_sender_wakes_the_receiver() -> None:
    sender, receiver = open_any(1, OnFull.REFUSE)

    async def expect_end() -> None:
        with pytest.raises(EndOfMailbox):
            await receiver.receive_burst()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(expect_end)
        await wait_all_tasks_blocked()
        with sender:
            pass


async def test_a_closed_sender_offers_nothing_and_cannot_be_cloned() -> None:
    sender, _ = open_any(1, OnFull.WAIT)
    keep = sender.clone()
    sender.close()
    assert not sender.offer(1)
    sender.owe(2)
    with pytest.raises(EndOfMailbox):
        await sender.send(3)
    with pytest.raises(MisuseError, match="closed"):
        sender.clone()
    counted = keep.statistics()
    assert (counted.refused, counted.dropped, counted.depth) == (2, 1, 0)


async def test_a_pending_send_still_arrives_when_all_senders_are_closed() -> None:
    sender, receiver = open_any(1, OnFull.WAIT)
    sender.offer(1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sender.send, 2)
        await wait_all_tasks_blocked()
        sender.close()
        assert await receiver.receive_burst() == [1]
        assert await receiver.receive_burst() == [2]
        with pytest.raises(EndOfMailbox):
            await receiver.receive_burst()


async def test_a_pending_send_that_gives_up_keeps_no_mailbox_open() -> None:
    sender, receiver = open_any(1, OnFull.WAIT)
    sender.offer(1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sender.send, 2)
        await wait_all_tasks_blocked()
        sender.close()
        tasks.cancel_scope.cancel()
    assert await receiver.receive_burst() == [1]
    with pytest.raises(EndOfMailbox):
        await receiver.receive_burst()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_last_send_giving_up_its_place_wakes_the_receiver_to_the_end() -> None:
    sender, receiver = open_any(1, OnFull.WAIT)
    sender.offer(1)
    sending = asyncio.create_task(sender.send(2))
    await wait_all_tasks_blocked()
    sender.close()
    assert receiver.receive_nowait() == [1]
    sending.cancel()
    with pytest.raises(EndOfMailbox):
        await receiver.receive_burst()
    with pytest.raises(asyncio.CancelledError):
        await sending


async def test_closing_the_receiver_tells_everybody() -> None:
    sender, receiver = open_any(2, OnFull.WAIT)
    question = Question(Reply())
    sender.offer(question)
    sender.offer("also lost")

    async def expect_end() -> None:
        with pytest.raises(EndOfMailbox):
            await sender.send("no room yet")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(expect_end)
        await wait_all_tasks_blocked()
        with receiver:
            pass
    with pytest.raises(PeerError, match="gone"):
        await question.reply.wait()
    assert not sender.offer("late")
    sender.owe("late")
    counted = receiver.statistics()
    assert (counted.depth, counted.dropped, counted.refused) == (0, 3, 2)
    with pytest.raises(EndOfMailbox):
        await receiver.receive_burst()


async def test_closing_the_receiver_ends_its_own_wait() -> None:
    _, receiver = open_any(2, OnFull.WAIT)

    async def expect_end() -> None:
        with pytest.raises(EndOfMailbox):
            await receiver.receive_burst()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(expect_end)
        await wait_all_tasks_blocked()
        receiver.close()


async def test_two_tasks_cannot_receive_at_once() -> None:
    sender, receiver = open_any(1, OnFull.REFUSE)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receiver.receive_burst)
        await wait_all_tasks_blocked()
        with pytest.raises(MisuseError, match="already receiving"):
            await receiver.receive_burst()
        sender.offer(1)


async def test_a_busy_receiver_lets_others_run() -> None:
    sender, receiver = open_any(1, OnFull.REFUSE)
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(count_turns)
        for i in range(10):
            sender.offer(i)
            await receiver.receive_burst()
        tasks.cancel_scope.cancel()
    assert turns >= 9


async def test_ages_and_handling_time() -> None:
    now = 100.0
    sender, receiver = open_any(9, OnFull.REFUSE, clock=lambda: now)
    sender.offer("a")
    now = 101.0
    sender.offer("b")
    now = 103.0
    assert receiver.statistics().oldest_age_s == 3.0
    assert receiver.receive_nowait(limit=1) == ["a"]
    assert receiver.statistics().oldest_age_s == 2.0
    now = 103.5
    assert receiver.receive_nowait() == ["b"]
    now = 104.5
    assert receiver.receive_nowait() == []
    counted = receiver.statistics()
    assert (counted.handled, counted.handling_s, counted.oldest_age_s) == (2, 1.5, 0.0)


async def test_waiting_is_not_handling() -> None:
    sender, receiver = open_any(9, OnFull.REFUSE)

    async def offer_after(seconds: float) -> None:
        await anyio.sleep(seconds)
        sender.offer(1)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(offer_after, 50.0)
        await receiver.receive_burst()
        await anyio.sleep(2)
        receiver.receive_nowait()
    assert receiver.statistics().handling_s == pytest.approx(2)


@pytest.mark.parametrize("capacity", [0, -1])
async def test_a_mailbox_has_room_for_something(capacity: int) -> None:
    with pytest.raises(MisuseError, match="at least 1"):
        open_any(capacity, OnFull.REFUSE)


async def test_threads_need_a_way_to_wake_the_loop() -> None:
    sender, _ = open_any(1, OnFull.REFUSE)
    with pytest.raises(MisuseError, match="call_soon"):
        sender.threadsafe()


async def test_variance_lets_a_part_take_the_end_it_needs() -> None:
    """For mypy: a sender of more kinds is a sender of fewer, a receiver of fewer a receiver of more."""
    receiver: Receiver[int | str] = open_any(1, OnFull.REFUSE)[1]
    wider: Receiver[object] = receiver
    assert wider.receive_nowait() == []
