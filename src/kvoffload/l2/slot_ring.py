"""The ring of a table of slots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvoffload.l2.nodes_table import SLOTS, NodesTable, owners_by_rendezvous
from kvoffload.l2.ring import FEW, words_of
from kvoffload.messages import BlockKey, Node


class SlotRing:
    """A key's slot is the number of its first 8 bytes modulo 4096, and the block is on the node that has the slot of this number.

    (AIBrix's own engines count the slots that the table has, and so disagree with each other's tables as soon as one is missing.)
    A hole is given to a node by rendezvous over all nodes of the table, as `make_table` would: who has the same table agrees, blocks
    of the hole are shared as all others, and when the hole is filled nothing but its own blocks moves. Leaving them out instead
    would lose that share of the cache for as long as the writer is wrong.

    ``version`` is the table's if not given: who announces rings gives one that grows, as a table's need not (see Membership).
    """

    def __init__(self, table: NodesTable, backend: str, version: int | None = None) -> None:
        self.version = table.version if version is None else version
        self.nodes = tuple(node.address(backend) for node in table.nodes)
        self._owners = table.slots
        if None in table.slots:
            others = owners_by_rendezvous(table.nodes)
            self._owners = tuple(owner or other for owner, other in zip(table.slots, others, strict=True))

    def node_of(self, key: BlockKey) -> Node | None:
        return self._owners[int.from_bytes(key[:8]) % SLOTS]

    def nodes_of(self, keys: Sequence[BlockKey]) -> list[Node | None]:
        if len(keys) <= FEW:
            return [self.node_of(key) for key in keys]
        return list(map(self._owners.__getitem__, (words_of(keys) % np.uint64(SLOTS)).tolist()))
