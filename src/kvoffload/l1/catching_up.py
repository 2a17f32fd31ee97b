"""What L1 has and its node lacks, as it was restarted, was out, or is another one now: asked about and offered again, by and by."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvoffload.errors import InternalError
from kvoffload.l1 import writing
from kvoffload.l1.effects import ToPrefetcher
from kvoffload.l1.parts import Parts, Slices
from kvoffload.l1.remote import BATCH, STORED, UNKNOWN, WRITING, Remote
from kvoffload.l1.states import State
from kvoffload.messages import Batch, BlockKey, BlocksFound, FindBlocks, Node, WriteFinished

if TYPE_CHECKING:
    from kvoffload.l2.ring import Ring

PACE_S = 0.02
"""After so long there may be another step: a piece of the walk, a question, an offer. A million blocks take a minute or two."""
IDLE_S = 0.25
"""When nothing could be done it is tried again after this, should nobody say before that something ended."""
QUESTION_S = 5.0
"""A question's deadline. Nobody waits for the answer."""
PAUSE_MOST_S = 300.0
"""A node that fails is given a rest, each time twice as long, up to this."""
SHARE = 8
"""Of the blocks that may be on their way at once, these are one in so many: there is room for what is just being saved."""
SCANNED = 1 << 14
"""Slots of which the state is looked at in one step."""

_FILLED, _READY = int(State.FILLED), int(State.READY)


@dataclass(slots=True, eq=False)
class _Work:
    """What one node is to be asked about, and given. It begins at ``due``; where something fails it goes on at a later one."""

    due: float
    pause_s: float
    is_whole: bool
    """False: only blocks that it is not known to have, or that were another's before."""
    has_begun: bool = False
    is_walked: bool = False
    must_repeat: bool = False
    """Something was left out, or was lost on its way: look for it later on."""
    pending: array[int] = field(default_factory=lambda: array("i"))
    """Slots to ask about."""
    question: Batch | None = None
    lacking: list[tuple[int, BlockKey]] = field(default_factory=list)
    """To be offered."""


@dataclass(frozen=True, slots=True)
class _Question:
    node: Node
    slots: list[int]
    keys: list[BlockKey]
    marks: bytes


class CatchingUp:
    """For each node: walk the READY slots and collect its own (one walk for all of them), ask what it has of these, BATCH by BATCH, and
    correct what is known of them; what it lacks is offered, where all is to be written, while its queue is short.

    It begins with another ring, a node that is back, and a while after writes failed or were dropped. It has no turn of its own but
    `step`, in which less than a millisecond's work is done; a slot may be anything by the next one, so it is looked at again.
    """

    def __init__(self, parts: Parts, remote: Remote) -> None:
        self.next_at: float | None = None
        """When `step` is to be called."""
        self._parts = parts
        self._remote = remote
        self._works: dict[Node, _Work] = {}  # whose turn it is comes first
        self._questions: dict[Batch, _Question] = {}
        self._walking: set[Node] = set()
        self._cursor: int | None = None  # where the walk is
        self._before: Ring | None = None  # which blocks were whose, while others' are looked for
        self._begun_before: set[Batch] = set()  # questions and transfers: they may yet mark a block for a node that is not its own any more
        self._filled: list[int] | None = None  # what such a fetch brought, and cannot be READY yet; None: not looked for
        self._is_settling = False  # there is such a thing, so there will be another walk
        self._stepped_at = -PACE_S

    def __len__(self) -> int:
        """The nodes that are being caught up, or will be."""
        return len(self._works)

    # ------------------------------------------------------------ what it begins with

    def nodes_changed(self, ring: Ring) -> Slices[None]:
        """From now on this is the ring. One that is the same changes nothing."""
        parts, remote = self._parts, self._remote
        old, remote.ring = remote.ring, ring
        if old is not None and (old.version, old.nodes) == (ring.version, ring.nodes):
            return
        known = frozenset(old.nodes) if old is not None else frozenset()
        if remote.config.load_or_compute is not None:
            for address in known.difference(ring.nodes):
                remote.config.load_or_compute.forget(address.name)
        if not parts.config.keeps:
            yield from self._forget_all()
            return
        is_whole = old is None or self._before is not None or self._is_settling
        unfinished = {node for node, work in self._works.items() if work.is_whole}
        self.end()
        if not remote.is_live or not ring.nodes:
            return
        self._before = None if is_whole else old
        self._begun_before = {*remote.finds, *remote.fetches, *remote.writes}
        self._is_settling = bool(self._begun_before or parts.slots.counts[_FILLED])
        if parts.slots.counts[_READY] or self._is_settling:
            for address in ring.nodes:
                self._begin(address.name, is_whole=is_whole or address not in known or address.name in unfinished)
        else:
            self._before = None

    def node_back(self, node: Node) -> Slices[None]:
        """Who knows what it has: it begins anew."""
        if not self._parts.config.keeps:
            yield from self._forget_all()
        elif self._remote.is_live and node in self._names() and self._parts.slots.counts[_READY]:
            self._begin(node, is_whole=True)

    def later(self, nodes: Collection[Node]) -> None:
        """Blocks of these nodes were to be written, and were not: they come again in a while. One that has left has others for heirs."""
        remote = self._remote
        if not self._parts.config.keeps or remote.config.ingestion != "all" or not remote.is_live:
            return
        names = self._names()
        for node in nodes if names.issuperset(nodes) else names:
            work = self._works.get(node)
            if work is None:
                self._put(node, is_whole=False, pause_s=remote.config.retry_after_s)
            else:
                work.must_repeat = work.has_begun

    def write_ended(self, message: WriteFinished) -> None:
        """A node that fails is left alone for a while; else there may be room for more."""
        self.batch_ended(message.batch)
        work = self._works.get(message.node)
        if message.failed or message.unsettled:
            self.later((message.node,))
            if work is not None:
                self._pause(work)
        elif work is not None:
            work.pause_s = self._remote.config.retry_after_s
            self._wake(self._remote.now)

    def question_ended(self, batch: Batch) -> None:
        """A match's question was answered; what it led to goes to the nodes that it asked, whatever the ring is now."""
        if batch in self._begun_before:
            self._begun_before |= self._remote.fetches.keys()
            self.batch_ended(batch)

    def batch_ended(self, batch: Batch) -> None:
        """So has a fetch or write. When all have ended that began under another ring, what they marked is looked at as well."""
        if batch not in self._begun_before:
            return
        self._begun_before.discard(batch)
        self._wake(self._remote.now)

    def end(self) -> None:
        """Nothing is caught up any more; answers that are still to come change nothing."""
        self._works.clear()
        self._begun_before.clear()
        self._is_settling, self._filled = False, None
        self._stop_walking()
        self._before = None
        self.next_at = None

    # ------------------------------------------------------------ what it does

    def step(self) -> Slices[None]:
        """Do a little, if it is time to."""
        remote = self._remote
        if self.next_at is None or remote.now < self.next_at:
            return
        if not remote.is_live:
            self.end()
            return
        if self._is_settling and not self._begun_before:
            self._settle()
        has_walked = self._walk()
        if has_walked:
            yield
        has_done = self._serve_one() or has_walked
        self._stepped_at, self.next_at = remote.now, None
        if self._is_settling and not self._begun_before:
            self._wake(remote.now + IDLE_S)
        for work in self._works.values():
            self._wake(max(work.due, remote.now + (PACE_S if has_done else IDLE_S)))

    def has_asked(self, batch: Batch) -> bool:
        """Whether this question is one of its own."""
        return batch in self._questions

    def found(self, message: BlocksFound) -> None:
        """A node has said what it has. It has what it has of blocks whose slots are still theirs, and of which nothing else was heard."""
        parts, remote = self._parts, self._remote
        question = self._questions.pop(message.batch)
        if question.node != message.node or len(message.found) not in (0, len(question.keys)):
            raise InternalError(
                f"node {message.node} answered question {message.batch}, which it was not asked, or not about so many blocks"
            )
        work = self._works.get(message.node)
        if work is None or work.question != message.batch:
            return
        work.question = None
        if not message.found:
            work.pending.extend(question.slots)
            self._pause(work)
            return
        state, keys, stored = parts.slots.state, parts.slots.keys, remote.stored
        there: list[int] = []
        lacking: list[tuple[int, BlockKey]] = []
        for slot, key, mark, is_there in zip(question.slots, question.keys, question.marks, message.found, strict=True):
            if state[slot] == _READY and stored[slot] == mark and keys[slot] == key:
                there.append(slot) if is_there else lacking.append((slot, key))
        remote.counts.checked += len(question.keys)
        remote.counts.lacking += len(lacking)
        remote.mark(there, STORED)
        remote.mark([slot for slot, _ in lacking], UNKNOWN)
        if remote.config.ingestion == "all":
            work.lacking = lacking
            self._offer(message.node, work)
        self._wake(remote.now)

    def check(self) -> None:
        """Raises InternalError for what must not be."""
        if self._works and self.next_at is None:
            raise InternalError(f"nodes {list(self._works)} are to be caught up, and there is no time for it")
        asked = {work.question for work in self._works.values()} - {None}
        if not asked <= self._questions.keys():
            raise InternalError(f"questions {asked - self._questions.keys()} are waited for, and were not asked")
        if self._works and (not self._remote.is_live or not self._parts.config.keeps):
            raise InternalError("nodes are caught up that must not be written")
        if self._is_settling and not self._begun_before and self.next_at is None:
            raise InternalError("nothing is left that began under another ring, and it will not be noticed")
        if self._cursor is None and self._walking:
            raise InternalError(f"nodes {self._walking} wait for a walk that has ended")

    def _settle(self) -> None:
        """When nothing is left that began under another ring: begin once more, for what it marked."""
        state = self._parts.slots.state
        if self._filled is None:
            self._filled = np.flatnonzero(self._parts.slots.states == _FILLED).tolist()
        self._filled = [slot for slot in self._filled if state[slot] == _FILLED]
        if self._filled:
            return
        self._is_settling, self._filled = False, None
        for node in self._names():
            work = self._works.get(node)
            self._begin(node, is_whole=self._before is None or (work is not None and work.is_whole))

    # ------------------------------------------------------------ the walk

    def _walk(self) -> bool:
        """One piece: of the next READY slots, those that belong to nodes that want them. False: nobody wants any."""
        parts, remote = self._parts, self._remote
        table, works, ring = parts.slots, self._works, remote.ring
        assert ring is not None
        if self._cursor is None:
            self._walking = {node for node, work in works.items() if not work.is_walked and work.due <= remote.now}
            if not self._walking:
                return False
            for node in self._walking:
                works[node].has_begun = True
            self._cursor = 0
        stop = min(table.fresh, self._cursor + SCANNED)
        marks = remote.all_stored[self._cursor : stop]
        is_some = self._before is None and not any(works[node].is_whole for node in self._walking)
        at = np.flatnonzero((table.states[self._cursor : stop] == _READY) & ((marks == UNKNOWN) if is_some else (marks != WRITING)))
        if len(at) > parts.config.slice_blocks:
            at = at[: parts.config.slice_blocks]
            stop = self._cursor + int(at[-1]) + 1
        if len(at):
            self._collect((at + self._cursor).tolist(), table.keys[at + self._cursor].tolist(), marks[at].tolist())
        self._cursor = stop
        if stop >= table.fresh:
            for node in self._walking:
                works[node].is_walked = True
            self._stop_walking()
            if not self._is_settling:
                self._before = None
        return True

    def _collect(self, slots: Sequence[int], keys: Sequence[BlockKey], marks: Sequence[int]) -> None:
        ring, before = self._remote.ring, self._before
        assert ring is not None
        wanted = {node: self._works[node] for node in self._walking}
        nodes = ring.nodes_of(keys)
        formerly = before.nodes_of(keys) if before is not None else nodes
        for slot, mark, node, former in zip(slots, marks, nodes, formerly, strict=True):
            work = wanted.get(node) if node is not None else None
            if work is not None and (work.is_whole or mark == UNKNOWN or node != former):
                work.pending.append(slot)

    def _stop_walking(self) -> None:
        self._walking = set()
        self._cursor = None

    # ------------------------------------------------------------ one node after the other

    def _serve_one(self) -> bool:
        """Whether something could be done for one of them. It is the last one's turn then."""
        now = self._remote.now
        for node, work in list(self._works.items()):
            if work.due > now or work.question is not None or not work.has_begun:
                continue
            if not (work.lacking or work.pending) and work.is_walked:
                del self._works[node]
                if work.must_repeat:
                    self._put(node, is_whole=False, pause_s=work.pause_s)
            elif self._offer(node, work) or (not work.lacking and self._ask(node, work)):
                self._works[node] = self._works.pop(node)
                return True
        return False

    def _ask(self, node: Node, work: _Work) -> bool:
        remote, table = self._remote, self._parts.slots
        if not work.pending or (len(work.pending) < BATCH and not work.is_walked):
            return False
        if remote.config.ingestion == "all" and self._room(node) <= 0:
            return False
        slots = work.pending[-BATCH:]
        del work.pending[-BATCH:]
        state, stored = table.state, remote.stored
        asked = [slot for slot in slots if state[slot] == _READY and stored[slot] != WRITING]
        keys = table.keys[np.array(asked, dtype=np.intp)].tolist()
        if asked:
            work.question = remote.next_batch()
            self._questions[work.question] = _Question(node, asked, keys, bytes(stored[slot] for slot in asked))
            remote.effects.append(ToPrefetcher(node, FindBlocks(work.question, tuple(keys), remote.now + QUESTION_S)))
        return True

    def _offer(self, node: Node, work: _Work) -> bool:
        """Offer what it lacks, as far as that is still so and there is room."""
        parts, remote = self._parts, self._remote
        room = self._room(node)
        if not work.lacking or room <= 0:
            return False
        state, keys, stored = parts.slots.state, parts.slots.keys, remote.stored
        lacking = [slot for slot, key in work.lacking[:room] if state[slot] == _READY and stored[slot] == UNKNOWN and keys[slot] == key]
        del work.lacking[:room]
        slots = writing.not_tried(parts, remote, lacking)
        work.must_repeat |= len(slots) < len(lacking)
        before = remote.counts.offered
        writing.offer(parts, remote, slots)
        remote.counts.offered_again += remote.counts.offered - before
        return True

    def _room(self, node: Node) -> int:
        """How many more blocks may be on their way to this node because of this: none until half of those before have come there."""
        config, table = self._remote.config, self._parts.slots
        share = max(1, int(config.max_writing_share * table.usable) // SHARE)
        queue = min(BATCH, max(1, config.write_queue_blocks // SHARE))
        room = min(share - len(table.held), queue - self._remote.queued[node])
        return room if 2 * room >= min(share, queue) else 0

    # ------------------------------------------------------------ whose turn it is when

    def _begin(self, node: Node, *, is_whole: bool) -> None:
        """Now, and from the beginning."""
        self._walking.discard(node)
        self._works[node] = _Work(self._remote.now, self._remote.config.retry_after_s, is_whole)
        self._wake(self._remote.now)

    def _put(self, node: Node, *, is_whole: bool, pause_s: float) -> None:
        """After a pause."""
        self._works[node] = work = _Work(self._remote.now + pause_s, pause_s, is_whole)
        self._wake(work.due)

    def _pause(self, work: _Work) -> None:
        """What it was about to do it does later."""
        if work.has_begun and work.due <= self._remote.now:
            work.due = self._remote.now + work.pause_s
            work.pause_s = min(2 * work.pause_s, PAUSE_MOST_S)
            self._wake(work.due)

    def _wake(self, at: float) -> None:
        at = max(at, self._stepped_at + PACE_S)
        self.next_at = at if self.next_at is None else min(self.next_at, at)

    def _names(self) -> set[Node]:
        ring = self._remote.ring
        return {address.name for address in ring.nodes} if ring is not None else set()

    def _forget_all(self) -> Slices[None]:
        """Where L1 keeps nothing: whatever is saved next is written, whether it was before or not."""
        on_nodes = self._remote.on_nodes
        while len(on_nodes):
            on_nodes.forget(self._parts.config.slice_blocks)
            yield
