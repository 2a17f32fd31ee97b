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
        words = np.frombuffer(b"".join([key[:8] for key in keys]), dtype=">u8").astype(np.uint64)
        highest = _weights(words, self._seeds[0][0])
        winners = np.zeros(len(keys), dtype=np.intp)
        for index, (seed, _) in enumerate(self._seeds[1:], 1):
            weights = _weights(words, seed)
            winners[weights > highest] = index
            np.maximum(highest, weights, out=highest)
        names = [name for _, name in self._seeds]
        return [names[winner] for winner in winners.tolist()]


def _seed(name: Node) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8, person=b"kvoffload.ring").digest())


def _weights(words: np.ndarray[tuple[int], np.dtype[np.uint64]], seed: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """As in `RendezvousRing.node_of`; products wrap at 64 bits."""
    weights = (words ^ np.uint64(seed)) * np.uint64(_FIRST)
    weights ^= weights >> np.uint64(32)
    weights *= np.uint64(_SECOND)
    return weights
