"""Bring blocks from nodes into slots: reserved at once, READY when they came and their parents are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import numpy as np

from kvoffload.l1 import writing
from kvoffload.l1.effects import ToPrefetcher, ToScheduler
from kvoffload.l1.parts import Parts, Slices
from kvoffload.l1.remote import STORED, Reading, Remote, Transfer, end_transfer, in_batches
from kvoffload.l1.removal import fall
from kvoffload.l1.saving import commit, occupy
from kvoffload.l1.slots import NONE
from kvoffload.l1.states import State
from kvoffload.messages import BlockKey, DropReason, FetchBlocks, FetchFinished, Node, ParentMissing

_FILLING = int(State.FILLING)


def fetch(
    parts: Parts,
    remote: Remote,
    before: BlockKey | None,
    keys: Sequence[BlockKey],
    nodes: Sequence[Node],
    deadline: float,
    readings: dict[Node, Reading],
) -> list[int]:
    """Reserve slots for these blocks, the first the child of ``before``, and ask ``nodes[i]`` for ``keys[i]``.

    Gives the slots: of each block, or of the first ones where no more could be had.

    ``readings`` are of all that is fetched for the same match.
    """
    parts.evictor.begin()
    slots = occupy(parts, keys, parts.index.find(before) if before is not None else NONE, STORED)
    writing.look_ahead(parts, remote)
    if not slots:
        return slots
    if len(slots) < len(keys):
        nodes, keys = nodes[: len(slots)], keys[: len(slots)]
    for node, (taken, theirs) in in_batches(nodes, slots, keys):
        assert node is not None
        reading = readings.setdefault(node, Reading())
        reading.left += 1
        number = remote.next_batch()
        transfer = remote.fetches[number] = Transfer(node, tuple(taken), tuple(theirs), reading)
        remote.fetch_of.update(zip(taken, repeat(number)))
        remote.effects.append(ToPrefetcher(node, FetchBlocks(number, transfer.slots, transfer.keys, deadline)))
    return slots


def finished(parts: Parts, remote: Remote, message: FetchFinished) -> Slices[None]:
    """A fetch has ended: what came is committed, what did not falls, and what may still be written into is out of reach."""
    transfer = end_transfer(remote.fetches, message.batch, message.node, message.fetched, message.absent, message.failed, message.unsettled)
    counts, table = remote.counts, parts.slots
    counts.fetched += len(message.fetched)
    counts.absent += len(message.absent)
    counts.failed += len(message.failed) + len(message.unsettled)
    reported: Sequence[int] = transfer.slots
    if len(message.fetched) < len(reported):
        came, unsettled = set(message.fetched), set(message.unsettled)
        for slot, key in zip(reversed(transfer.slots), reversed(transfer.keys), strict=True):
            if slot not in came:
                remote.unread.add(key, remote.now + remote.config.retry_after_s)
                remote.on_nodes.discard(key)
                if table.state[slot] == _FILLING:
                    fall(parts, slot, DropReason.FETCH_FAILED)
        for slot in unsettled:
            table.move(slot, State.QUARANTINED)
        if unsettled:
            remote.unsettled_fetches[message.batch] = unsettled
        reported = [slot for slot in transfer.slots if slot not in unsettled]
    for slot in reported:
        del remote.fetch_of[slot]
    yield from commit(parts, reported, np.array(reported, dtype=np.intp) if len(reported) >= parts.many else None)
    relying = remote.relying.pop(message.batch, None)
    if relying is not None and any(parts.index.find(key) < 0 for key in transfer.keys):
        job = max(relying.values())
        remote.effects.append(ToScheduler(ParentMissing(job, tuple(relying))))
    if transfer.reading is not None:
        _learn(remote, transfer.reading, message)


def _learn(remote: Remote, reading: Reading, message: FetchFinished) -> None:
    """Batches that ran side by side took no longer than from the first one's begin to the last one's end."""
    judge, block_bytes = remote.config.load_or_compute, remote.config.block_bytes
    reading.left -= 1
    reading.came += len(message.fetched)
    if message.seconds > 0:
        reading.seconds += message.seconds
        reading.begun = min(reading.begun, remote.now - message.seconds)
    if judge is None or reading.left or not reading.came or not reading.seconds:
        return
    is_only_one = reading.seconds == message.seconds
    seconds = reading.seconds if is_only_one else min(reading.seconds, remote.now - reading.begun)
    judge.observe_fetch(message.node, reading.came, reading.came * block_bytes, seconds)


def settled(parts: Parts, remote: Remote, slots: Sequence[int]) -> None:
    """Nothing writes into these any more, whose fetch had not been settled."""
    for slot in slots:
        del remote.fetch_of[slot]
        parts.slots.release(slot)
