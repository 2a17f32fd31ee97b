"""The table of nodes that AIBrix's watcher keeps in Redis (``kvcache_nodes``), read as it is, and written in the same shape.

::

    {"nodes": [{"name": "kv-0", "addr": "10.0.0.11", "port": 12345, "slots": [{"start": 2, "end": 3}, ...]}, ...], "version": 7}

4096 slots, ``end`` inclusive, ``slots`` null for a node that has none. What is of the wrong type or missing refuses the table; what
the watcher is known to get wrong is repaired, and said. Every repair depends on the table alone, so that all engines agree:

- A node that owns slots 0 and 4095 is written as one wrapped range, ``{"start": 4095, "end": 2}``, and its ranges in between are
  lost. The range is read as 4095, 0, 1, 2, and slots that no node claims are taken for the lost ones (there can be but one such node).
- A slot that several nodes claim is the one's whose name sorts first, in whatever order the table has them.
- Slots that no node claims otherwise (a node was left out) are holes: see `kvoffload.l2.slot_ring`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from typing import Annotated

import msgspec
import numpy as np

from kvoffload.errors import MisuseError, PeerError
from kvoffload.l2.addresses import host_port, node_url, plain_host
from kvoffload.l2.ring import NodeAddress, RendezvousRing
from kvoffload.messages import BlockKey, Node

SLOTS = 4096
MOST_BYTES = 1 << 20
"""Of a table. AIBrix's largest, with a range for every slot, has some 0.1 MiB."""
MOST_NODES = 1024
_MOST_CLAIMS = 64


class TableError(PeerError):
    """This is no table of nodes; the text says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class TableNode:
    """One node: its name is its identity, host and port are where it is now."""

    name: Node
    host: str
    port: int

    def address(self, backend: str) -> NodeAddress:
        """``backend`` as in ``l2.backend``: the table does not say what serves its nodes."""
        return NodeAddress(self.name, node_url(backend, self.host, self.port))

    def __str__(self) -> str:
        return f"{self.name}={host_port(self.host, self.port)}"


@dataclass(frozen=True, slots=True)
class NodesTable:
    """``nodes`` by name; ``slots[i]`` is the name of slot i's owner, None for a hole. ``version`` is the writer's, 0 if it gave none."""

    version: int
    nodes: tuple[TableNode, ...]
    slots: tuple[Node | None, ...] = field(repr=False)

    def is_same_as(self, other: NodesTable) -> bool:
        """Versions aside."""
        return self.nodes == other.nodes and self.slots == other.slots


# ---------------------------------------------------------------- reading


_Slot = Annotated[int, msgspec.Meta(ge=0, le=(1 << 31) - 1)]
_Slots = np.ndarray[tuple[int], np.dtype[np.int64]]


class _Range(msgspec.Struct):
    start: _Slot
    end: _Slot


class _Node(msgspec.Struct):
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=253)]
    addr: str
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    slots: list[_Range] | None


class _Versioned(msgspec.Struct):
    version: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)] | msgspec.UnsetType = msgspec.UNSET


class _Table(_Versioned, kw_only=True):
    nodes: Annotated[list[_Node], msgspec.Meta(min_length=1, max_length=MOST_NODES)]


def parse_table(data: bytes) -> tuple[NodesTable, tuple[str, ...]]:
    """The table, and what had to be repaired in it. Raises `TableError`; a table without nodes is an error too. Takes some ms."""
    if len(data) > MOST_BYTES:
        raise TableError(f"the table is larger than {MOST_BYTES >> 20} MiB: is this the right key?")
    try:
        table = msgspec.json.decode(data, type=_Table)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise TableError(f"the table cannot be read: {error}") from None
    problems: list[str] = []
    if table.version is msgspec.UNSET:
        problems.append("the table has no version")
        table.version = 0
    nodes = _nodes(table.nodes, problems)
    return NodesTable(table.version, nodes, _owners(table.nodes, problems)), tuple(problems)


def version_of(data: bytes) -> int | None:
    """The version of a table that may be broken otherwise; None if it has none."""
    try:
        version = msgspec.json.decode(data, type=_Versioned).version
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    return None if version is msgspec.UNSET else version


def table_node(name: Node, host: str, port: int) -> TableNode:
    """Raises ValueError for a name, host or port that no table may have."""
    if not (name.isprintable() and 0 < len(name) <= 253 and " " not in name):
        raise ValueError(f"{name!r} is no name of a node: at most 253 printable characters, no space")
    if not 0 < port < 1 << 16:
        raise ValueError(f"{port} is no port")
    try:
        return TableNode(name, plain_host(host), port)
    except ValueError as error:
        raise ValueError(f"{host[:80]!r} {error}") from None


def _nodes(listed: list[_Node], problems: list[str]) -> tuple[TableNode, ...]:
    nodes: dict[Node, TableNode] = {}
    at: dict[tuple[str, int], Node] = {}
    for given in listed:
        try:
            node = table_node(given.name, given.addr, given.port)
        except ValueError as error:
            raise TableError(f"the table's node {given.name!r}: {error}") from None
        other = nodes.setdefault(node.name, node)
        if other is not node:
            if other != node:
                raise TableError(
                    f"the table has two nodes named {node.name}: {host_port(other.host, other.port)}, {host_port(node.host, node.port)}"
                )
            problems.append(f"node {node.name} is there twice: its slots are taken together")
        elif (name := at.setdefault((node.host, node.port), node.name)) != node.name:
            problems.append(f"nodes {name} and {node.name} have the same address, {host_port(node.host, node.port)}")
    return tuple(nodes[name] for name in sorted(nodes))


def _owners(listed: list[_Node], problems: list[str]) -> tuple[Node | None, ...]:
    """The owner of each slot; all ranges at once, as there may be thousands."""
    names = sorted({node.name for node in listed})
    rank_of = {name: rank for rank, name in enumerate(names)}
    slots, ranks, wrapped = _claims(listed, rank_of, problems)
    claims = np.bincount(slots, minlength=SLOTS)
    owner = np.full(SLOTS, len(names))  # sorts behind all
    np.minimum.at(owner, slots, ranks)
    if (claims > 1).any():
        problems.append(f"{_slots_text(claims > 1)} claimed more than once: the node whose name sorts first has them")
    for node in wrapped:
        text = f"node {node.name}: a range that wraps from slot {SLOTS - 1} to 0 is read as such"
        if len(wrapped) == 1 and len(node.slots or ()) == 1 and not claims.all():
            text += f", and {_slots_text(claims == 0)} claimed by no node, as the ranges that its writer lost"
            owner[claims == 0] = rank_of[node.name]
        problems.append(text)
    if (owner == len(names)).any():
        problems.append(f"{_slots_text(owner == len(names))} claimed by no node: their blocks are spread over all nodes")
    owners = [*names, None]
    return tuple([owners[rank] for rank in owner.tolist()])


def _claims(listed: list[_Node], rank_of: dict[Node, int], problems: list[str]) -> tuple[_Slots, _Slots, list[_Node]]:
    """Each claim of a slot and the rank of who claims it, and the nodes with ranges that wrap."""
    ranges = np.array([(part.start, part.end, rank_of[node.name]) for node in listed for part in node.slots or ()], dtype=np.int64)
    starts, ends, ranks = ranges.reshape(-1, 3).T
    inside = starts < SLOTS
    if not (inside.all() and (ends < SLOTS).all()):
        count = (~inside | (ends >= SLOTS)).sum()
        problems.append(f"{count} ranges go beyond slots 0 to {SLOTS - 1}, which is ignored: its writer must be set to {SLOTS} slots")
        starts, ends, ranks = starts[inside], np.minimum(ends[inside], SLOTS - 1), ranks[inside]
    lengths = np.where(starts > ends, ends + SLOTS, ends) - starts + 1
    if lengths.sum() > _MOST_CLAIMS * SLOTS:
        raise TableError(f"the table's ranges claim each slot {lengths.sum() // SLOTS} times over")
    offsets = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
    slots = (np.repeat(starts, lengths) + offsets) % SLOTS
    wrapped = [node for node in listed if any(part.end < part.start < SLOTS for part in node.slots or ())]
    return slots, np.repeat(ranks, lengths), wrapped


def _slots_text(which: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> str:
    """As ``12 slots (0-9, 17, ...)``."""
    spans = _spans(np.flatnonzero(which).tolist())
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in spans[:4]]
    return f"{which.sum()} slots ({', '.join(shown)}{', ...' if len(spans) > 4 else ''})"


# ---------------------------------------------------------------- writing


def make_table(version: int, nodes: Iterable[TableNode]) -> NodesTable:
    """Slots by rendezvous over the names: when nodes come and go, few slots move. Raises `MisuseError` for no nodes, or names twice."""
    listed = tuple(sorted(nodes, key=lambda node: node.name))
    if not 0 < len(listed) <= MOST_NODES or len({node.name for node in listed}) < len(listed):
        raise MisuseError(f"a table has 1 to {MOST_NODES} nodes, with names of their own: {', '.join(map(str, listed))}")
    return NodesTable(version, listed, owners_by_rendezvous(listed))


def render_table(table: NodesTable) -> bytes:
    """JSON as AIBrix writes it, but no range wraps, and a node without slots has an empty list: its reader cannot take null."""
    mine: dict[Node, list[int]] = {node.name: [] for node in table.nodes}
    for slot, owner in enumerate(table.slots):
        if owner is not None:
            mine[owner].append(slot)
    nodes = [_Node(node.name, node.host, node.port, [_Range(*span) for span in _spans(mine[node.name])]) for node in table.nodes]
    return msgspec.json.encode(_Table(nodes=nodes, version=table.version))


def owners_by_rendezvous(nodes: Iterable[TableNode]) -> tuple[Node | None, ...]:
    """The owner of each slot, where no table says it."""
    return tuple(RendezvousRing(0, [NodeAddress(node.name, "") for node in nodes]).nodes_of(_slot_keys()))


@cache
def _slot_keys() -> tuple[BlockKey, ...]:
    return tuple(blake2b(slot.to_bytes(8), digest_size=24, person=b"kvoffload.slot").digest() for slot in range(SLOTS))


def _spans(slots: list[int]) -> list[tuple[int, int]]:
    """Runs of ascending ``slots``, ends inclusive."""
    spans: list[tuple[int, int]] = []
    for slot in slots:
        if spans and spans[-1][1] == slot - 1:
            spans[-1] = (spans[-1][0], slot)
        else:
            spans.append((slot, slot))
    return spans
