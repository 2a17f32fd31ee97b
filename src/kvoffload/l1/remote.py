"""What L1 keeps of the second tier: who waits for it, what is under way to and from it, and what it must not be asked again."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress, count, islice
from operator import eq
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from kvoffload.errors import ConfigError, InternalError
from kvoffload.l1.effects import Effect
from kvoffload.l1.statistics import RemoteCounts, RemoteStatistics
from kvoffload.messages import Batch, BlockKey, Job, MatchPrefix, Node

if TYPE_CHECKING:
    from kvoffload.l2.ring import Ring

Ingestion = Literal["all", "hot", "evicted"]

UNKNOWN, WRITING, STORED = 0, 1, 2
"""What is known of a slot's block on its node: nothing; it is being written there; the node has it, or said so."""

BATCH = 256
"""Blocks of one question, fetch or write, at most: so many are dealt with in less than a millisecond, by whoever deals with them."""

REMEMBERED = 65_536
"""Blocks that failed and are remembered, at most; behind that the oldest are forgotten."""


ON_NODES_S = 600.0
"""Where L1 keeps nothing, a block that was written, is being written, or was found is not written again for so long, unless its node
says that it lacks it."""

FEW = 32
"""Fewer slots than this are faster marked by a loop."""


class LoadOrCompute(Protocol):
    """Whether loading from nodes is faster than computing."""

    def should_load(self, tokens: int, tokens_per_s: float, blocks_by_node: Mapping[Node, int], block_bytes: int) -> bool:
        """Whether these blocks, which would save computing so many tokens, are worth their loading.

        ``tokens_per_s`` is how fast the engine computes, 0.0 where that is not known; ``block_bytes`` counts all ranks.
        """

    def observe_fetch(self, node: Node, blocks: int, num_bytes: int, seconds: float) -> None:
        """The node took so long over so many blocks."""

    def forget(self, node: Node) -> None:
        """The node has left, or is at another address."""


@dataclass(frozen=True, slots=True)
class RemoteConfig:
    """How L1 uses the second tier."""

    ingestion: Ingestion = "all"
    """What is written: every block when it is READY, when it is first hit, or shortly before it would be evicted."""
    min_tokens: int = 256
    """Fewer tokens than this are not asked for."""
    retry_after_s: float = 10.0
    """A block that did not come, or was not stored, is not asked for (offered) again for so long."""
    block_bytes: int = 0
    """Of a block, on all ranks together."""
    load_or_compute: LoadOrCompute | None = None
    """None: whatever nodes have is loaded."""
    write_queue_blocks: int = 4096
    """Blocks on their way to one node at once; more are dropped."""
    max_writing_share: float = 0.5
    """Of the slots, that may be on their way to nodes at once; more blocks are dropped."""
    fetch_grace_s: float = 1.0
    """How long a fetch may go on after the deadline of the match that it was begun for: it serves later ones."""

    def __post_init__(self) -> None:
        if self.ingestion not in ("all", "hot", "evicted"):
            raise ConfigError(f"ingestion must be all, hot or evicted, not {self.ingestion!r}")
        if self.write_queue_blocks < 1:
            raise ConfigError(f"write_queue_blocks must be at least 1, not {self.write_queue_blocks}")
        if not 0 < self.max_writing_share <= 1:
            raise ConfigError(f"max_writing_share must be above 0 and at most 1, not {self.max_writing_share}")


@dataclass(slots=True, eq=False)
class Reading:
    """All that one match has fetched from one node: its batches, which share the node's time, and what is known of them so far."""

    left: int = 0
    came: int = 0
    seconds: float = 0.0
    """Of each batch, together."""
    begun: float = math.inf


@dataclass(frozen=True, slots=True)
class Transfer:
    """A fetch or a write under way: ``slots[i]`` is for block ``keys[i]``."""

    node: Node
    slots: tuple[int, ...]
    keys: tuple[BlockKey, ...]
    reading: Reading | None = None


ABSENT, THERE = 1, 2
_THERE = bytes([THERE])


@dataclass(slots=True, eq=False)
class Waiting:
    """A match that is to be answered later. Its READY part is leased meanwhile."""

    message: MatchPrefix
    ready: int
    """Blocks that were READY at first."""
    start: int
    """The first block that nodes were asked for: ``nodes[i]`` for block ``start + i``."""
    nodes: list[Node]
    found: bytearray = field(init=False)
    """By block, from ``start`` on: not known yet (0), ABSENT, THERE."""
    fetch: Batch | None = None
    """The fetch that it waits for; None while it waits for nodes to say what they have."""
    is_cut: bool = False
    """Whether there was no room for all that was found."""
    slots: list[int] = field(default_factory=list)
    """What was reserved for it."""

    def __post_init__(self) -> None:
        self.found = bytearray(len(self.nodes))

    @property
    def known(self) -> int:
        """So many blocks, from ``start`` on, are there."""
        return len(self.found) - len(self.found.lstrip(_THERE))

    @property
    def is_decided(self) -> bool:
        """Whether it is known where that ends."""
        return self.found.lstrip(_THERE)[:1] != b"\0"


@dataclass(frozen=True, slots=True)
class Find:
    """A question to one node, about these places of ``waiting.nodes``."""

    waiting: Waiting
    node: Node
    places: Sequence[int]


class Recent:
    """Keys of which something was seen a short while ago, each until its time; at most REMEMBERED."""

    def __init__(self) -> None:
        self._until: dict[BlockKey, float] = {}

    def __len__(self) -> int:
        return len(self._until)

    def add(self, key: BlockKey, until: float) -> None:
        """Remember a key; the oldest goes where there are too many."""
        self._until.pop(key, None)
        self._until[key] = until
        if len(self._until) > REMEMBERED:
            del self._until[next(iter(self._until))]

    def discard(self, key: BlockKey) -> None:
        """Forget a key, if it is remembered."""
        self._until.pop(key, None)

    def forget(self, count: int) -> None:
        """Forget so many keys."""
        for key in list(islice(self._until, count)):
            del self._until[key]

    def has(self, key: BlockKey, now: float) -> bool:
        """Whether the key is remembered and its time has not come."""
        until = self._until.get(key)
        if until is None:
            return False
        if until <= now:
            del self._until[key]
            return False
        return True


class Remote:
    """The state of the second tier's use, on which `waiting`, `fetching` and `writing` work."""

    def __init__(self, config: RemoteConfig, capacity: int) -> None:
        self.config = config
        self.ring: Ring | None = None
        self.off_reason: str | None = None
        self.is_stopped = False
        self.now = 0.0  # of the message that is being handled
        self.effects: list[Effect] = []
        self.counts = RemoteCounts()
        self.stored = bytearray(capacity)  # UNKNOWN, WRITING or STORED; of a FREE slot it means nothing
        self.all_stored = np.frombuffer(self.stored, dtype=np.uint8)  # the same memory, for many at once
        self._batches = count(1)
        self.must_look_ahead = False
        self.has_fallen = False  # something left the index otherwise than by eviction: who waits for it should know
        self.dropped: set[Node] = set()  # blocks that were to be written to these were not offered: they should come again
        self.finds: dict[Batch, Find] = {}
        self.fetches: dict[Batch, Transfer] = {}
        self.writes: dict[Batch, Transfer] = {}
        self.unsettled_fetches: dict[Batch, set[int]] = {}
        self.unsettled_writes: dict[Batch, set[int]] = {}
        self.fetch_of: dict[int, Batch] = {}  # by slot, until it is reported and settled
        self.relying: dict[Batch, dict[str, Job]] = {}
        """By fetch, the requests that computed what it is to bring, and whose offer of it was taken for shared."""
        self.queued: Counter[Node] = Counter()  # blocks on their way to a node
        self.unread = Recent()
        self.unwritten = Recent()
        self.on_nodes = Recent()  # where L1 keeps nothing: what need not be written (again)
        self.waiting: dict[str, Waiting] = {}
        self.waiters: dict[Batch, list[Waiting]] = {}  # by fetch; some may have left
        self._deadlines: list[tuple[float, int, Waiting]] = []
        self._order = count()

    @property
    def is_live(self) -> bool:
        """Whether nodes may be asked and written to."""
        return self.ring is not None and self.off_reason is None and not self.is_stopped

    def next_batch(self) -> Batch:
        """A number for a question, fetch or write."""
        return next(self._batches)

    def take_effects(self) -> list[Effect]:
        """What is to be sent."""
        effects, self.effects = self.effects, []
        return effects

    def wait(self, waiting: Waiting) -> None:
        """This match is answered later, at its deadline if not before."""
        message = waiting.message
        self.waiting[message.request] = waiting
        heapq.heappush(self._deadlines, (message.deadline, next(self._order), waiting))

    def is_waiting(self, waiting: Waiting) -> bool:
        """Whether this match has neither been answered nor given up."""
        return self.waiting.get(waiting.message.request) is waiting

    def give_up(self, request: str, sequence: int | None = None) -> None:
        """The request does not wait for an answer (to this match) any more. What is being fetched for it goes on."""
        waiting = self.waiting.get(request)
        if waiting is not None and (sequence is None or waiting.message.sequence == sequence):
            del self.waiting[request]

    def next_deadline(self) -> float | None:
        """Of the matches that wait."""
        while self._deadlines and not self.is_waiting(self._deadlines[0][2]):
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def due(self, now: float) -> Waiting | None:
        """A match whose deadline has come."""
        deadline = self.next_deadline()
        return self._deadlines[0][2] if deadline is not None and deadline <= now else None

    def reset(self, generation: int) -> None:
        """Nobody waits any more, and nodes are neither read nor written from now on.

        The weights may not be what the namespace of the keys says any more: blocks of before would be found for prompts of after.
        """
        self.waiting.clear()
        self.waiters.clear()
        self._deadlines.clear()
        self.counts.resets += 1
        self.off_reason = self.off_reason or f"the cache was reset (generation {generation}): the weights may have changed under their name"

    def mark(self, slots: Sequence[int], what: int) -> None:
        """What is known of these slots' blocks: UNKNOWN, WRITING or STORED."""
        if len(slots) < FEW:
            for slot in slots:
                self.stored[slot] = what
        else:
            self.all_stored[np.array(slots, dtype=np.intp)] = what

    def has_stored(self, slots: Sequence[int], transfer: Transfer) -> None:
        """A node has these blocks of a write: they need not be written again. (It may have said that it lacks them, while it did.)"""
        stored, until = set(slots), self.now + ON_NODES_S
        for slot, key in zip(transfer.slots, transfer.keys, strict=True):
            if slot in stored:
                self.on_nodes.add(key, until)

    def open_jobs(self) -> set[Job]:
        """The fetches and writes that nodes have not reported, as numbers that no job has."""
        return {-batch for table in (self.fetches, self.writes) for batch in table}

    def open_writes(self) -> set[Job]:
        """The writes among them."""
        return {-batch for batch in self.writes}

    def unsettled_jobs(self) -> set[Job]:
        """Those that were reported, and whose slots something may still read or write."""
        return {-batch for table in (self.unsettled_fetches, self.unsettled_writes) for batch in table}

    def statistics(self, writing: int, catching_up: int) -> RemoteStatistics:
        """A snapshot, with so many slots on their way to nodes, and so many nodes that are to be caught up."""
        unsettled = sum(map(len, self.unsettled_fetches.values())) + sum(map(len, self.unsettled_writes.values()))
        return RemoteStatistics(
            replace(self.counts), len(self.waiting), len(self.fetch_of), writing, unsettled, self.off_reason, catching_up
        )


def end_transfer(table: dict[Batch, Transfer], batch: Batch, node: Node, *parts: tuple[int, ...]) -> Transfer:
    """Take the fetch or write out of its table that this report, slots by outcome, ends. Raises InternalError if it cannot be."""
    transfer = table.get(batch)
    if transfer is None or transfer.node != node:
        raise InternalError(f"node {node} reported batch {batch}, which is not under way there")
    if (parts[0] is transfer.slots or parts[0] == transfer.slots) and not any(parts[1:]):
        del table[batch]
        return transfer
    told = [slot for part in parts for slot in part]
    if len(told) != len(transfer.slots) or set(told) != set(transfer.slots):
        raise InternalError(f"node {node} reported slots {told} of batch {batch}, which is of {list(transfer.slots)}")
    del table[batch]
    return transfer


def in_batches(nodes: Sequence[Node | None], *columns: Sequence[Any]) -> Iterator[tuple[Node | None, list[Sequence[Any]]]]:
    """The rows of these columns by node, at most BATCH at once; each node's in order."""
    there = dict.fromkeys(nodes)
    for node in there:
        if len(there) == 1:
            yield from _cut(node, columns)
        else:
            is_theirs = list(map(partial(eq, node), nodes))
            yield from _cut(node, [tuple(compress(column, is_theirs)) for column in columns])


def _cut(node: Node | None, columns: Sequence[Sequence[Any]]) -> Iterator[tuple[Node | None, list[Sequence[Any]]]]:
    for start in range(0, len(columns[0]), BATCH):
        yield node, [column[start : start + BATCH] for column in columns]
