"""The nodes as the settings, or the table, name them at this moment: for commands."""

from __future__ import annotations

import anyio

from kvoffload.actors.membership import Membership
from kvoffload.config import L2Settings
from kvoffload.errors import PeerError
from kvoffload.l2.ring import NodeAddress
from kvoffload.messages import NodesChanged


async def nodes_now(settings: L2Settings, timeout_s: float) -> tuple[NodeAddress, ...]:
    """Raises PeerError where the table cannot be had within ``timeout_s``."""
    tables: list[NodesChanged] = []
    came = anyio.Event()

    def take(changed: NodesChanged) -> None:
        tables.append(changed)
        came.set()

    membership = Membership(settings.membership, settings.backend, settings.nodes, take)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(membership.run)
        with anyio.move_on_after(timeout_s):
            await came.wait()
        tasks.cancel_scope.cancel()
    if not tables:
        raise PeerError(f"no table of nodes within {timeout_s:.0f} s: {membership.statistics().last_error or 'no answer'}")
    return tables[-1].ring.nodes
