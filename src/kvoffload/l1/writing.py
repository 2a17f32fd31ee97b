"""Which blocks are written to nodes, and when. Each keeps its slot until nothing reads it any more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvoffload.l1.effects import ToWriter
from kvoffload.l1.parts import Parts, Slices
from kvoffload.l1.remote import FEW, STORED, UNKNOWN, WRITING, Remote, Transfer, end_transfer, in_batches
from kvoffload.messages import WriteBlocks, WriteFinished

AHEAD_SHARE = 0.05
"""Of the slots, that may be on their way to nodes at once because they are to be evicted soon."""
AHEAD = 256
"""So many of the slots to be evicted next are looked at after a reservation that evicted, at most."""


def on_commit(parts: Parts, remote: Remote, ready: Sequence[int]) -> Slices[int]:
    """These became READY; how many of them were saved, and not fetched."""
    stored = remote.stored
    if len(ready) >= FEW and remote.all_stored[ready].all():
        return 0  # all were fetched
    saved = [slot for slot in ready if not stored[slot]]
    if remote.config.ingestion == "all":
        yield from _write(parts, remote, saved)
    return len(saved)


def on_hit(parts: Parts, remote: Remote, slots: Sequence[int]) -> Slices[None]:
    """These are READY, and used again."""
    if remote.config.ingestion == "hot":
        stored = remote.stored
        yield from _write(parts, remote, not_tried(parts, remote, [slot for slot in slots if not stored[slot]]))


def on_eviction(parts: Parts, remote: Remote, evicted: Sequence[int]) -> None:
    """These left L1."""
    if remote.config.ingestion == "evicted":
        stored = remote.stored
        remote.counts.evicted_unwritten += sum(stored[slot] != STORED for slot in evicted)
        remote.must_look_ahead = True


def look_ahead(parts: Parts, remote: Remote) -> None:
    """After a reservation: if it evicted, write what will be evicted next, as far as no node has it."""
    if not remote.must_look_ahead:
        return
    remote.must_look_ahead = False
    most = max(1, int(AHEAD_SHARE * parts.slots.usable)) - len(parts.slots.held)
    if most <= 0 or not remote.is_live:
        return
    stored = remote.stored
    named = [slot for slot in parts.policy.peek(AHEAD) if not stored[slot]]
    offer(parts, remote, not_tried(parts, remote, named)[:most])


def finished(parts: Parts, remote: Remote, message: WriteFinished) -> None:
    """A write has ended: its slots are let go, save for those that are not settled."""
    transfer = end_transfer(remote.writes, message.batch, message.node, message.stored, message.failed, message.unsettled)
    remote.queued[message.node] -= len(transfer.slots)
    if not remote.queued[message.node]:
        del remote.queued[message.node]
    remote.counts.written += len(message.stored)
    remote.counts.write_failed += len(message.failed) + len(message.unsettled)
    if not parts.config.keeps:
        remote.has_stored(message.stored, transfer)
    if len(message.stored) == len(transfer.slots):
        remote.mark(transfer.slots, STORED)
        parts.slots.let_go_all(transfer.slots)
        return
    written, unsettled = set(message.stored), set(message.unsettled)
    for slot, key in zip(transfer.slots, transfer.keys, strict=True):
        if slot not in written:
            remote.unwritten.add(key, remote.now + remote.config.retry_after_s)
            remote.on_nodes.discard(key)
        if slot not in unsettled:
            remote.stored[slot] = STORED if slot in written else UNKNOWN
            parts.slots.let_go(slot)
    if unsettled:
        remote.unsettled_writes[message.batch] = unsettled


def settled(parts: Parts, remote: Remote, slots: Sequence[int]) -> None:
    """Nothing reads these any more, whose write had not been settled."""
    for slot in slots:
        remote.stored[slot] = UNKNOWN
        parts.slots.let_go(slot)


def not_tried(parts: Parts, remote: Remote, slots: list[int]) -> list[int]:
    """Those of these whose writing has not failed a short while ago."""
    if not len(remote.unwritten):
        return slots
    keys = parts.slots.keys
    return [slot for slot in slots if not remote.unwritten.has(keys[slot], remote.now)]


def _write(parts: Parts, remote: Remote, slots: Sequence[int]) -> Slices[None]:
    """Offer these to the writers of their nodes, as far as they may be on their way; the rest is dropped."""
    if not slots or not remote.is_live:
        return
    for at, piece in enumerate(parts.sliced(slots)):
        if at:
            yield
        offer(parts, remote, piece)


def offer(parts: Parts, remote: Remote, slots: Sequence[int]) -> None:
    """Offer so few to the writers of their nodes; those that are taken are held."""
    if not slots or remote.ring is None:
        return
    table, config, counts = parts.slots, remote.config, remote.counts
    room = max(0, int(config.max_writing_share * table.usable) - len(table.held))
    if len(slots) > room:
        counts.write_dropped += len(slots) - room
        remote.dropped.update(address.name for address in remote.ring.nodes)
        slots = slots[:room]
    if not slots:
        return
    keys = table.keys[np.array(slots, dtype=np.intp)].tolist()
    for node, (taken, theirs) in in_batches(remote.ring.nodes_of(keys), slots, keys):
        most = config.write_queue_blocks - remote.queued[node] if node is not None else 0
        if len(taken) > most:
            counts.write_dropped += len(taken) - most
            if node is not None:
                remote.dropped.add(node)
            taken, theirs = taken[:most], theirs[:most]
        if node is None or not taken:
            continue
        remote.queued[node] += len(taken)
        remote.mark(taken, WRITING)
        table.held.update(taken)
        counts.offered += len(taken)
        number = remote.next_batch()
        transfer = remote.writes[number] = Transfer(node, tuple(taken), tuple(theirs))
        remote.effects.append(ToWriter(node, WriteBlocks(number, transfer.slots, transfer.keys)))
