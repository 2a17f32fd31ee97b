"""Which node a block belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import numpy as np

from kvoffload.errors import MisuseError
from kvoffload.messages import BlockKey, Node


@dataclass(frozen=True, slots=True)
class NodeAddress:
    """``name`` is the node's identity in the ring; ``url`` is where it is now: ``infinistore://10.0.0.1:12345``, ``redis://...``."""

    name: Node
    url: str


class Ring(Protocol):
    """A table of nodes, immutable; ``version`` grows with every change."""

    @property
    def version(self) -> int: ...

    @property
    def nodes(self) -> tuple[NodeAddress, ...]: ...

    def node_of(self, key: BlockKey) -> Node | None:
        """The node of this block; None where no node has it: there are no nodes."""

    def nodes_of(self, keys: Sequence[BlockKey]) -> list[Node | None]:
        """`node_of` for each; for many keys it is faster."""


FEW = 16
"""Up to so many keys a plain loop is faster than numpy."""

_MASK = (1 << 64) - 1
_FIRST, _SECOND = 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53
"""The odd multipliers of MurmurHash3's 64-bit finalizer."""


class RendezvousRing:
    """Rendezvous (highest random weight) hashing: a block belongs to the node whose name and the key together hash highest.

    A node that joins takes its share of every other's blocks, one that leaves gives its own to all others, and nothing else moves.
    Only names count, so a node that moves to another address keeps its blocks. Every engine must compute the same: a change of
    anything below makes the blocks of all nodes unfindable. Keys are uniform already (`kvoffload.keys`), their first 8 bytes do.
    """

    def __init__(self, version: int, nodes: Iterable[NodeAddress]) -> None:
        self.version = version
        self.nodes = tuple(sorted(nodes, key=lambda node: node.name))
        self._seeds = [(_seed(node.name), node.name) for node in self.nodes]
        self._columns = np.array([[seed] for seed, _ in self._seeds], dtype=np.uint64)
        self._names = np.array([name for _, name in self._seeds], dtype=object)
        if len({node.name for node in self.nodes}) < len(self.nodes):
            raise MisuseError(f"nodes need names of their own: {[node.name for node in self.nodes]}")

    def node_of(self, key: BlockKey) -> Node | None:
        word = int.from_bytes(key[:8])
        highest, winner = -1, None
        for seed, name in self._seeds:
            weight = ((word ^ seed) * _FIRST) & _MASK
            weight = ((weight ^ (weight >> 32)) * _SECOND) & _MASK
            if weight > highest:  # of equal ones the lowest name wins
                highest, winner = weight, name
        return winner

    def nodes_of(self, keys: Sequence[BlockKey]) -> list[Node | None]:
        if len(self._seeds) < 2:
            return [self._seeds[0][1] if self._seeds else None] * len(keys)
        if len(keys) <= FEW:
            return [self.node_of(key) for key in keys]
        weights = words_of(keys) ^ self._columns
        weights *= np.uint64(_FIRST)  # as in `node_of`; products wrap at 64 bits
        weights ^= weights >> np.uint64(32)
        weights *= np.uint64(_SECOND)
        # The first of equal ones: nodes are in the order of their names.
        return self._names[weights.argmax(axis=0)].tolist()  # type: ignore[no-any-return]


def words_of(keys: Sequence[BlockKey]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """The number of each key's first 8 bytes."""
    joined, step = b"".join(keys), len(keys[0])
    if step % 8 or len(joined) != step * len(keys):  # not as `kvoffload.keys` makes them
        joined, step = b"".join([key[:8] for key in keys]), 8
    return np.frombuffer(joined, dtype=">u8")[:: step // 8].astype(np.uint64)


def _seed(name: Node) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8, person=b"kvoffload.ring").digest())
