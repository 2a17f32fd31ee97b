"""Bounded mailboxes between actors, threads and vLLM's hooks.

A mailbox is a deque under one small lock. On the loop, `Sender` decides at once; from any other thread `ThreadSender` decides at
once too, and arms one wake-up of the loop, no second one before that has arrived. `Receiver` drains in bursts. A cancellation
neither loses nor doubles anything: a receive takes its messages, and a send is accepted, after the last await.

Answers (`owe`) have their room reserved where the request was admitted: they are always accepted and take no room from the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

import anyio
from anyio.lowlevel import checkpoint

from kvoffload.errors import MisuseError
from kvoffload.mailbox_state import CallSoon, MailboxState, MailboxStatistics, OnFull, Ticket, tell_gone
from kvoffload.reply import Reply, current_call_soon

__all__ = [
    "EndOfMailbox",
    "MailboxStatistics",
    "OnFull",
    "Receiver",
    "Reply",
    "Sender",
    "ThreadSender",
    "current_call_soon",
    "open_mailbox",
]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
T_contra = TypeVar("T_contra", contravariant=True)


class EndOfMailbox(Exception):
    """To the receiver: every sender has closed and nothing is left. To `send`: the receiver has closed."""


class _End(Generic[T_contra]):
    """What every sending end has: it counts as a sender until it is closed."""

    def __init__(self, box: MailboxState[T_contra]) -> None:
        self._box = box
        self._is_open = True
        with box.lock:
            box.senders += 1

    def statistics(self) -> MailboxStatistics:
        return self._box.statistics()

    def close(self) -> None:
        raise NotImplementedError

    def _check_open(self) -> None:
        if not self._is_open:
            raise MisuseError(f"this sender of mailbox {self._box.name!r} is closed: clone it before closing it")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Sender(_End[T_contra]):
    """The sending end for code that runs on the receiver's loop."""

    def offer(self, message: T_contra) -> bool:
        """Never waits. False: not taken, by the mailbox's policy or because an end is closed; that is counted."""
        box = self._box
        with box.lock:
            if not self._is_open:
                box.refused += 1
                return False
            if not box.admit(message):
                return False
            waiter = box.waiter
            box.waiter = None
        if waiter is not None:
            waiter.set()
        return True

    def owe(self, message: T_contra) -> None:
        """An answer, whose room was reserved on admission: always taken. Only when an end is closed is it dropped and counted, and who
        waits for a reply to it told so.
        """
        box = self._box
        waiter = None
        with box.lock:
            is_dropped = box.is_closed or not self._is_open
            if is_dropped:
                box.dropped += 1
            else:
                box.append(message, is_owed=True)
                waiter = box.take_waiter()
        if is_dropped:
            tell_gone([message])
        elif waiter is not None:
            waiter.set()

    async def send(self, message: T_contra) -> None:
        """Wait for room, first come first served; cancelled means not accepted. Raises `EndOfMailbox` when an end is closed."""
        box = self._box
        if box.on_full is not OnFull.WAIT:
            raise MisuseError(f"mailbox {box.name!r} is {box.on_full.name}: its senders must offer, not wait")
        await checkpoint()
        with box.lock:
            if box.is_closed or not self._is_open:
                box.refused += 1
                raise EndOfMailbox(box.name)
            # Those with a ticket come first, whatever room there is.
            ticket = Ticket() if box.tickets or box.offered + box.promised >= box.capacity else None
            if ticket is not None:
                box.tickets.append(ticket)
            else:
                box.append(message, is_owed=False)
            waiter = None if ticket else box.take_waiter()
        if ticket is not None:
            waiter = await self._wait_for_room(ticket, message)
        if waiter is not None:
            waiter.set()

    async def _wait_for_room(self, ticket: Ticket, message: T_contra) -> anyio.Event | None:
        box = self._box
        try:
            await ticket.event.wait()
        except BaseException:
            with box.lock:
                if ticket.granted:
                    box.promised -= 1
                elif ticket in box.tickets:
                    box.tickets.remove(ticket)
                events = box.grant()
                waiter = box.take_waiter() if box.has_ended() else None
            for event in (*events, waiter):
                if event is not None:
                    event.set()
            raise
        with box.lock:
            if ticket.granted:
                box.promised -= 1
            if box.is_closed:
                box.refused += 1
                raise EndOfMailbox(box.name)
            box.append(message, is_owed=False)
            return box.take_waiter()

    def clone(self) -> Sender[T_contra]:
        """One more sender; the mailbox ends when all have closed."""
        self._check_open()
        return Sender(self._box)

    def threadsafe(self) -> ThreadSender[T_contra]:
        """One more sender, for any thread."""
        if self._box.call_soon is None:
            raise MisuseError(f"mailbox {self._box.name!r} was opened without call_soon: threads cannot wake its receiver")
        self._check_open()
        return ThreadSender(self._box)

    def close(self) -> None:
        """Idempotent. What was accepted is still received."""
        box = self._box
        with box.lock:
            if not self._is_open:
                return
            self._is_open = False
            box.senders -= 1
            waiter = box.take_waiter() if not box.senders else None
        if waiter is not None:
            waiter.set()

    def __enter__(self) -> Sender[T_contra]:
        return self


class ThreadSender(_End[T_contra]):
    """The sending end for every other thread: the decision falls on the caller's thread, at once; nothing here raises or waits."""

    def offer(self, message: T_contra) -> bool:
        """As `Sender.offer`; False as well when the receiver's loop is closed."""
        box = self._box
        with box.lock:
            if not self._is_open:
                box.refused += 1
                return False
            if not box.admit(message):
                return False
            if box.armed or box.handling:  # must_arm(), by hand: this is vLLM's thread
                return True
            box.armed = True
        if box.arm():
            return True
        with box.lock:
            is_back = box.retract(message)
            box.refused += is_back
        self._shut()
        return not is_back

    def owe(self, message: T_contra) -> None:
        """As `Sender.owe`; dropped and counted as well when the receiver's loop is closed."""
        box = self._box
        with box.lock:
            is_dropped = box.is_closed or not self._is_open
            if is_dropped:
                box.dropped += 1
            else:
                box.append(message, is_owed=True)
                if not box.must_arm():
                    return
        if is_dropped:
            tell_gone([message])
        elif not box.arm():
            self._shut()

    def _shut(self) -> None:
        """The loop is closed, so nobody will receive again."""
        with self._box.lock:
            left = self._box.shut()
        tell_gone(left)

    def clone(self) -> ThreadSender[T_contra]:
        """One more sender, for this or another thread."""
        self._check_open()
        return ThreadSender(self._box)

    def close(self) -> None:
        """Idempotent. What was accepted is still received."""
        box = self._box
        with box.lock:
            if not self._is_open:
                return
            self._is_open = False
            box.senders -= 1
            if box.senders or not box.must_arm():
                return
        box.arm()

    def __enter__(self) -> ThreadSender[T_contra]:
        return self


class Receiver(Generic[T_co]):
    """The receiving end: one task at a time, on the mailbox's loop."""

    def __init__(self, box: MailboxState[T_co]) -> None:
        self._box = box
        self._is_receiving = False

    async def receive_burst(self, limit: int = 256) -> list[T_co]:
        """At least one message, at most ``limit``, oldest first; one checkpoint, however many. Raises `EndOfMailbox`."""
        box = self._box
        if self._is_receiving:
            raise MisuseError(f"mailbox {box.name!r} has one receiver, and it is already receiving")
        self._is_receiving = True
        try:
            with box.lock:
                box.returned()
                is_ready = bool(box.entries) or box.has_ended()
            if is_ready:
                await checkpoint()  # before anything is taken: a busy actor stays fair and can be cancelled
            while (waiter := self._must_wait()) is not None:
                await waiter.wait()
            return self.receive_nowait(limit)
        finally:
            self._is_receiving = False
            box.waiter = None

    def _must_wait(self) -> anyio.Event | None:
        box = self._box
        with box.lock:
            if box.entries or box.has_ended():
                return None
            box.waiter = anyio.Event()
            return box.waiter

    def receive_nowait(self, limit: int = 256) -> list[T_co]:
        """What is there, at most ``limit``; an empty list when nothing is. Raises `EndOfMailbox`."""
        box = self._box
        with box.lock:
            box.returned()
            if box.has_ended():
                raise EndOfMailbox(box.name)
            if not box.entries:
                return []
            burst = box.take(limit)
            events = box.grant()
        for event in events:
            event.set()
        return burst

    def statistics(self) -> MailboxStatistics:
        return self._box.statistics()

    def close(self) -> None:
        """Idempotent. Accept nothing more; what is left is dropped, counted, and its replies are told `gone`."""
        box = self._box
        with box.lock:
            box.returned()
            left = box.shut()
            events = [ticket.event for ticket in box.tickets]
            box.tickets.clear()
            waiter = box.take_waiter()
        tell_gone(left)
        for event in (*events, waiter):
            if event is not None:
                event.set()

    def __enter__(self) -> Receiver[T_co]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_mailbox(
    name: str,
    capacity: int,
    on_full: OnFull,
    *,
    call_soon: CallSoon | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Sender[T], Receiver[T]]:
    """A mailbox for ``capacity`` messages (>= 1), not counting what is owed.

    ``call_soon`` schedules into the receiver's loop from any thread (`current_call_soon`, `LoopThread.call_soon`) and is needed for
    `Sender.threadsafe`; it may raise RuntimeError when the loop is closed. ``clock``: seconds, for ages and handling time.
    """
    if capacity < 1:
        raise MisuseError(f"mailbox {name!r} needs a capacity of at least 1, not {capacity}")
    box: MailboxState[T] = MailboxState(name, capacity, on_full, call_soon, clock)
    return Sender(box), Receiver(box)
