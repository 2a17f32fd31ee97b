"""How many bytes may be under way at once, first come first served."""

from __future__ import annotations

import anyio


class ByteBudget:
    """Bytes that may be under way at once, given in the order in which they were asked for."""

    def __init__(self, num_bytes: int) -> None:
        self._left = self._whole = num_bytes
        self._queue: dict[Ticket, None] = {}

    def ask(self, num_bytes: int) -> Ticket:
        """Take a place in the queue. One that asks for more than there is gets all of it."""
        ticket = Ticket(self, min(num_bytes, self._whole))
        self._queue[ticket] = None
        self._grant()
        return ticket

    def refuse_all(self) -> None:
        """Whoever waits is told that it will get nothing."""
        queue, self._queue = self._queue, {}
        for ticket in queue:
            ticket.tell()

    def _grant(self) -> None:
        while self._queue and (ticket := next(iter(self._queue))).num_bytes <= self._left:
            del self._queue[ticket]
            self._left -= ticket.num_bytes
            ticket.is_granted = True
            ticket.tell()

    def give_back(self, ticket: Ticket) -> None:
        """It is over, or waits no longer; once is enough, twice does no harm."""
        self._queue.pop(ticket, None)
        if ticket.is_granted:
            ticket.is_granted = False
            self._left += ticket.num_bytes
        self._grant()


class Ticket:
    """A place in a `ByteBudget`'s queue, then so many of its bytes; ``with`` gives them back."""

    __slots__ = ("_budget", "_event", "_is_told", "is_granted", "num_bytes")

    def __init__(self, budget: ByteBudget, num_bytes: int) -> None:
        self._budget = budget
        self.num_bytes = num_bytes
        self.is_granted = False
        self._is_told = False
        self._event: anyio.Event | None = None  # where it has to wait

    def tell(self) -> None:
        """It is granted, or will not be."""
        self._is_told = True
        if self._event is not None:
            self._event.set()

    async def wait(self, timeout_s: float) -> bool:
        """Whether its turn came within ``timeout_s``."""
        if not self._is_told:
            self._event = anyio.Event()
            with anyio.move_on_after(max(0.0, timeout_s)):
                await self._event.wait()
        return self.is_granted

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, *of_error: object) -> None:
        self._budget.give_back(self)
