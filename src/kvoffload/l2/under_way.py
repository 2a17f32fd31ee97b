"""The batches of one actor that are not over yet, and the slots that its node may still touch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import anyio

from kvoffload.errors import InternalError
from kvoffload.l2.node import L2Node
from kvoffload.messages import Batch, FromL2, Node, TransfersSettled
from kvoffload.observe.logs import get_logger

log = get_logger("l2")


class OpenBatches:
    """Which batches are not over, the transfers that they left unsettled included."""

    def __init__(self) -> None:
        self._over: dict[Batch, anyio.Event | None] = {}  # an event for those that somebody waits for

    def __len__(self) -> int:
        return len(self._over)

    def open(self, batch: Batch) -> None:
        if batch in self._over:
            raise InternalError(f"batch {batch} is under way already: numbers are never used twice")
        self._over[batch] = None

    def close(self, batch: Batch) -> None:
        event = self._over.pop(batch)
        if event is not None:
            event.set()

    def snapshot(self) -> tuple[anyio.Event, ...]:
        """For `wait`: those that are open now."""
        self._over = {batch: event or anyio.Event() for batch, event in self._over.items()}
        return tuple(event for event in self._over.values() if event is not None)

    @staticmethod
    async def wait(events: Sequence[anyio.Event], timeout_s: float | None = None) -> bool:
        """Whether all of a `snapshot` were over within ``timeout_s``."""
        with anyio.move_on_after(timeout_s):
            for event in events:
                await event.wait()
        return all(event.is_set() for event in events)


class Unsettled:
    """Slots that a node may still read or write, by batch, until the node says that it does not; then `TransfersSettled` is reported."""

    def __init__(self, node: L2Node, name: Node, report: Callable[[FromL2], None], on_settled: Callable[[Sequence[int]], None]) -> None:
        """``on_settled`` is called with the slots before they are reported."""
        self._node = node
        self._name = name
        self._report = report
        self._on_settled = on_settled
        self._slots: dict[Batch, tuple[int, ...]] = {}

    def __len__(self) -> int:
        """Slots."""
        return sum(map(len, self._slots.values()))

    def __contains__(self, batch: object) -> bool:
        return batch in self._slots

    def add(self, batch: Batch, slots: tuple[int, ...]) -> None:
        """To be called when they have been reported as unsettled."""
        if slots:
            self._slots[batch] = slots

    async def settle(self) -> None:
        """Wait for all that were added so far."""
        batches = list(self._slots)
        if not batches:
            return
        await self._node.settle()
        for batch in batches:
            slots = self._slots.pop(batch, ())
            if slots:
                self._on_settled(slots)
                self._report(TransfersSettled(batch, self._name, slots))

    async def settle_finally(self, timeout_s: float) -> None:
        """For an actor that ends: shielded, bounded, and it raises nothing. What does not settle is for `Remains`."""
        if not self._slots:
            return
        with anyio.CancelScope(shield=True), anyio.move_on_after(timeout_s):
            try:
                await self.settle()
            except Exception as error:
                log.exception("a node failed to settle", node=self._name, error=repr(error))
        if self._slots:
            log.warning("slots are out of use until their node lets go of them", node=self._name, slots=len(self))
