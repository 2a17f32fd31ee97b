"""Bring blocks from nodes into slots: reserved at once, READY when they came and their parents are."""

from __future__ import annotations

from collections.abc import Sequence

from kvoffload.l1 import writing
from kvoffload.l1.effects import ToPrefetcher
from kvoffload.l1.parts import Parts
from kvoffload.l1.remote import STORED, Remote, Transfer, end_transfer
from kvoffload.l1.removal import fall
from kvoffload.l1.saving import commit, occupy
from kvoffload.l1.slots import NONE
from kvoffload.l1.states import State
from kvoffload.messages import BlockKey, DropReason, FetchBlocks, FetchFinished, Node

_FILLING = int(State.FILLING)


def fetch(parts: Parts, remote: Remote, before: BlockKey | None, keys: Sequence[BlockKey], nodes: Sequence[Node], deadline: float) -> int:
    """Reserve slots for these blocks, the first the child of ``before``, and ask ``nodes[i]`` for ``keys[i]``; how many found a slot."""
    parts.evictor.begin()
    slots = occupy(parts, keys, parts.index.find(before) if before is not None else NONE)
    writing.look_ahead(parts, remote)
    batches: dict[Node, tuple[list[int], list[BlockKey]]] = {}
    for slot, key, node in zip(slots, keys, nodes, strict=False):
        batch = batches.setdefault(node, ([], []))
        batch[0].append(slot)
        batch[1].append(key)
        remote.stored[slot] = STORED
    for node, (taken, theirs) in batches.items():
        number = remote.next_batch()
        transfer = remote.fetches[number] = Transfer(node, tuple(taken), tuple(theirs))
        for slot in taken:
            remote.fetch_of[slot] = number
        remote.effects.append(ToPrefetcher(node, FetchBlocks(number, transfer.slots, transfer.keys, deadline)))
    return len(slots)


def finished(parts: Parts, remote: Remote, message: FetchFinished) -> None:
    """A fetch has ended: what came is committed, what did not falls, and what may still be written into is out of reach."""
    transfer = end_transfer(remote.fetches, message.batch, message.node, message.fetched, message.absent, message.failed, message.unsettled)
    config, counts, table = remote.config, remote.counts, parts.slots
    counts.fetched += len(message.fetched)
    counts.absent += len(message.absent)
    counts.failed += len(message.failed) + len(message.unsettled)
    came, unsettled = set(message.fetched), set(message.unsettled)
    for slot, key in zip(reversed(transfer.slots), reversed(transfer.keys), strict=True):
        if slot not in came:
            remote.unread.add(key, remote.now + config.retry_after_s)
            if table.state[slot] == _FILLING:
                fall(parts, slot, DropReason.FETCH_FAILED)
    for slot in unsettled:
        table.move(slot, State.QUARANTINED)
    if unsettled:
        remote.unsettled_fetches[message.batch] = unsettled
    reported = [slot for slot in transfer.slots if slot not in unsettled]
    for slot in reported:
        del remote.fetch_of[slot]
    commit(parts, reported)
    if config.load_or_compute is not None and came and message.seconds > 0:
        config.load_or_compute.observe_fetch(message.node, len(came), len(came) * config.block_bytes, message.seconds)


def settled(parts: Parts, remote: Remote, slots: Sequence[int]) -> None:
    """Nothing writes into these any more, whose fetch had not been settled."""
    for slot in slots:
        del remote.fetch_of[slot]
        parts.slots.release(slot)
