"""Slots that an actor's end left out of use, as its node might still touch them: who outlives the actor says when it does not."""

from __future__ import annotations

from collections.abc import Callable

from kvoffload.l2.node import L2Node
from kvoffload.messages import Batch, FetchFinished, FromL2, Node, TransfersSettled, WriteFinished
from kvoffload.observe.logs import get_logger

log = get_logger("l2")

Slots = tuple[int, ...]


class Reports:
    """What one actor, in all its lives, reports on its way to L1: this knows which slots it has called unsettled and not settled."""

    def __init__(self, forward: Callable[[FromL2], None]) -> None:
        self._forward = forward
        self._unsettled: dict[Batch, set[int]] = {}

    def __call__(self, message: FromL2) -> None:
        if isinstance(message, (FetchFinished, WriteFinished)) and message.unsettled:
            self._unsettled[message.batch] = set(message.unsettled)
        elif isinstance(message, TransfersSettled) and message.batch in self._unsettled:
            self._unsettled[message.batch] -= set(message.slots)
            if not self._unsettled[message.batch]:
                del self._unsettled[message.batch]
        self._forward(message)

    def left(self) -> dict[Batch, Slots]:
        """To be called when the actor has ended, and settles nothing any more: what it left, which nobody will report but the caller."""
        left, self._unsettled = {batch: tuple(sorted(slots)) for batch, slots in self._unsettled.items()}, {}
        return left


class Remains:
    """What the actors of one node left, until the node says that it touches it no more; then `TransfersSettled` is reported."""

    def __init__(self, node: L2Node, name: Node, report: Callable[[FromL2], None], clear: Callable[[Slots], None]) -> None:
        """``clear`` is called with the slots of fetches before they are reported."""
        self._node = node
        self._name = name
        self._report = report
        self._clear = clear
        self._left: dict[Batch, tuple[Slots, bool]] = {}

    def __len__(self) -> int:
        """Slots."""
        return sum(len(slots) for slots, _ in self._left.values())

    def add(self, left: dict[Batch, Slots], *, of_fetches: bool) -> None:
        self._left |= {batch: (slots, of_fetches) for batch, slots in left.items()}

    async def settle(self) -> None:
        """Wait for all that were added so far, for as long as it takes."""
        left = dict(self._left)
        if left:
            await self._node.settle()
            self._settled(left)

    def closed(self) -> None:
        """The node's `close` has returned: nothing touches a buffer."""
        self._settled(dict(self._left))

    def _settled(self, left: dict[Batch, tuple[Slots, bool]]) -> None:
        count = 0
        for batch, (slots, is_fetch) in left.items():
            if self._left.pop(batch, None) is None:
                continue
            if is_fetch:
                self._clear(slots)
            self._report(TransfersSettled(batch, self._name, slots))
            count += len(slots)
        if count:
            log.warning("slots may be used again: their node touches them no more", node=self._name, slots=count)
