"""What the hook timers look at inside a connector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Insides:
    """Of a connector that nothing is known of: it posts no blocks, has no named waits, and no loads to follow."""

    ports: Sequence[Any] = ()
    """Each has a ``wait(timeout_s)``, of which a hook's time is told apart."""

    def posted_blocks(self, request_id: str | None) -> int:
        """Blocks whose key was made or posted so far, for all saves and for the match of this request."""
        return 0

    @property
    def has_pending_loads(self) -> bool:
        return False


class KVOffloadInsides(Insides):
    """Of ours, both halves of which are in this process."""

    def __init__(self, scheduler_connector: Any, worker_connector: Any) -> None:
        self._side = scheduler_connector.scheduler_half.side
        self.ports = (scheduler_connector.scheduler_half.host.hub, worker_connector.worker_half.host.runtime)

    def posted_blocks(self, request_id: str | None) -> int:
        total: int = self._side.saver.offered_blocks
        record = self._side.records.get(request_id)
        # A chain counts once it was asked for: its sequence is 0 before.
        return total + (record.sequence * len(record.chain.keys) if record is not None else 0)

    @property
    def has_pending_loads(self) -> bool:
        return bool(self._side.has_pending_loads)
