"""The state of a mailbox, shared by its ends: what is admitted, what is counted, who must be woken. Nothing here waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from threading import Lock
from typing import Generic, TypeVar

import anyio

from kvoffload.reply import Reply

T = TypeVar("T")
CallSoon = Callable[[Callable[[], None]], object]


class OnFull(Enum):
    """What happens to a message that finds no room."""

    WAIT = "wait"
    """`send` waits for room, first come first served; `offer` is refused."""
    REFUSE = "refuse"
    """Refused, at once; the caller keeps it."""
    DROP_NEWEST = "drop_newest"
    """Refused as well, but counted as dropped: the caller does not intend to keep it."""
    LATEST = "latest"
    """It takes the place of the newest message that waits: the last one wins."""


@dataclass(frozen=True, slots=True)
class MailboxStatistics:
    """A mailbox at one moment; counters are since it was opened.

    ``accepted`` counts the offers and sends that were taken, ``owed`` the answers, ``dropped`` what its policy or its end threw
    away, ``handled`` what was handed out. ``handling_s``: from a burst handed out to the next receive, summed.
    """

    name: str
    capacity: int
    depth: int
    peak: int
    oldest_age_s: float
    accepted: int
    owed: int
    refused: int
    dropped: int
    handled: int
    handling_s: float
    senders: int


class Ticket:
    """A `send` that waits for room; ``granted`` is set, under the lock, when one place was reserved for it."""

    __slots__ = ("event", "granted")

    def __init__(self) -> None:
        self.event = anyio.Event()
        self.granted = False


class MailboxState(Generic[T]):
    """The state that both ends share. Methods are called with ``lock`` held; what they return is to be done after it is let go."""

    def __init__(self, name: str, capacity: int, on_full: OnFull, call_soon: CallSoon | None, clock: Callable[[], float]) -> None:
        self.name, self.capacity, self.on_full = name, capacity, on_full
        self.call_soon, self.clock = call_soon, clock
        self.lock = Lock()
        self.entries: deque[tuple[T, float, bool]] = deque()  # message, when, owed
        self.offered = 0  # entries that are not owed
        self.promised = 0  # places granted to sends that have not come back yet
        self.tickets: deque[Ticket] = deque()
        self.waiter: anyio.Event | None = None
        self.handling = False  # a burst is out: its receiver will look here again before it waits
        self.handed_at = 0.0
        self.armed = False  # a wake-up is on its way to the loop
        self.is_closed = False  # the receiver is gone, or its loop is
        self.senders = 0
        self.peak = self.accepted = self.owed = self.refused = self.dropped = self.handled = 0
        self.handling_s = 0.0

    def admit(self, message: T) -> bool:
        """Take an offered message if there is room, by policy; counts either way."""
        if self.is_closed:
            self.refused += 1
            return False
        if self.offered + self.promised >= self.capacity and not self._make_room():
            return False
        # append(), by hand: this runs for every message
        self.entries.append((message, self.clock(), False))
        self.offered += 1
        self.accepted += 1
        if len(self.entries) > self.peak:
            self.peak = len(self.entries)
        return True

    def append(self, message: T, is_owed: bool) -> None:
        self.entries.append((message, self.clock(), is_owed))
        if is_owed:
            self.owed += 1
        else:
            self.offered += 1
            self.accepted += 1
        if len(self.entries) > self.peak:
            self.peak = len(self.entries)

    def _make_room(self) -> bool:
        if self.on_full is OnFull.LATEST:
            # Behind it there may be answers, which are never replaced.
            newest = next(i for i in range(len(self.entries) - 1, -1, -1) if not self.entries[i][2])
            self._discard(newest)
            return True
        if self.on_full is OnFull.DROP_NEWEST:
            self.dropped += 1
        else:
            self.refused += 1
        return False

    def _discard(self, index: int) -> None:
        message, _, is_owed = self.entries[index]
        del self.entries[index]
        self.offered -= not is_owed
        self.dropped += 1
        tell_gone([message])

    def retract(self, message: T) -> bool:
        """Undo the acceptance of ``message``, which no loop was there to receive; False if it was handed out all the same."""
        for index in range(len(self.entries) - 1, -1, -1):
            entry = self.entries[index]
            if entry[0] is message:
                del self.entries[index]
                self.owed -= entry[2]
                self.offered -= not entry[2]
                self.accepted -= not entry[2]
                return True
        return False

    def shut(self) -> list[T]:
        """Accept nothing from now on; what was left is dropped, counted and returned, for `tell_gone`."""
        self.is_closed = True
        left = [entry[0] for entry in self.entries]
        self.entries.clear()
        self.offered = 0
        self.dropped += len(left)
        return left

    def take(self, limit: int) -> list[T]:
        """The oldest ``limit`` messages; the caller then sets the events of `grant`."""
        entries = self.entries
        if len(entries) <= limit:
            burst = [entry[0] for entry in entries]
            entries.clear()
            self.offered = 0
        else:
            burst = [entry[0] for entry in islice(entries, limit)]
            for _ in range(limit):
                self.offered -= not entries.popleft()[2]
        self.handled += len(burst)
        self.handling = True
        self.handed_at = self.clock()
        return burst

    def grant(self) -> list[anyio.Event]:
        """Reserve the room there is for the sends that wait."""
        events = []
        while self.tickets and self.offered + self.promised < self.capacity:
            ticket = self.tickets.popleft()
            ticket.granted = True
            self.promised += 1
            events.append(ticket.event)
        return events

    def returned(self) -> None:
        """The receiver is back from handling a burst."""
        if self.handling:
            self.handling = False
            self.handling_s += self.clock() - self.handed_at

    def must_arm(self) -> bool:
        """After a post from a thread: must the caller wake the loop? Marks it as done."""
        if self.armed or self.handling:
            return False
        self.armed = True
        return True

    def has_ended(self) -> bool:
        return not self.entries and (self.is_closed or not (self.senders or self.promised or self.tickets))

    def take_waiter(self) -> anyio.Event | None:
        waiter, self.waiter = self.waiter, None
        return waiter

    # The two below take the lock themselves.

    def wake(self) -> None:
        """On the loop: the armed wake-up arrives."""
        with self.lock:
            self.armed = False
            waiter = self.take_waiter()
        if waiter is not None:
            waiter.set()

    def arm(self) -> bool:
        """From a thread: send the wake-up that `must_arm` asked for; False if there is no loop any more."""
        assert self.call_soon is not None
        try:
            self.call_soon(self.wake)
        except RuntimeError:  # asyncio's "loop is closed", trio's RunFinishedError
            return False
        return True

    def statistics(self) -> MailboxStatistics:
        with self.lock:
            return MailboxStatistics(
                name=self.name,
                capacity=self.capacity,
                depth=len(self.entries),
                peak=self.peak,
                oldest_age_s=max(0.0, self.clock() - self.entries[0][1]) if self.entries else 0.0,
                accepted=self.accepted,
                owed=self.owed,
                refused=self.refused,
                dropped=self.dropped,
                handled=self.handled,
                handling_s=self.handling_s,
                senders=self.senders,
            )


def tell_gone(messages: Iterable[object]) -> None:
    """Whoever waits for an answer to one of these dropped messages is told that none will come."""
    for message in messages:
        reply = getattr(message, "reply", None)
        if isinstance(reply, Reply):
            reply.gone()
