"""Saves where L1 keeps nothing: slots are lent to blocks on their way to nodes."""

from __future__ import annotations

from collections.abc import Sequence

from kvoffload.errors import InternalError
from kvoffload.l1 import writing
from kvoffload.l1.parts import Parts, Slices
from kvoffload.l1.remote import ON_NODES_S, UNKNOWN, Remote
from kvoffload.l1.slots import NONE
from kvoffload.l1.states import State
from kvoffload.messages import BlockKey, DropReason, ReserveSlots, SlotGrant

_FREE, _STAGING = int(State.FREE), int(State.STAGING)


def reserve(parts: Parts, message: ReserveSlots) -> SlotGrant:
    """Grant a slot to every block that no node is known to have, as far as slots can be had; parents do not matter."""
    table, counts, remote = parts.slots, parts.counts, parts.remote
    assert remote is not None
    until = remote.now + ON_NODES_S
    slots: list[int] = []
    blocks: list[int] = []
    epochs: list[int] = []
    for run in message.runs:
        counts.offered += len(run.keys)
        if not remote.is_live:
            counts.drops[DropReason.OFF] += len(run.keys)
            continue
        wanted = [at for at, key in enumerate(run.keys) if not remote.on_nodes.has(key, remote.now)]
        counts.shared += len(run.keys) - len(wanted)
        got = table.take(min(len(wanted), _room(parts))) if wanted else []
        if len(got) < len(wanted):
            counts.drops[DropReason.NO_SLOT] += len(wanted) - len(got)
        for at, slot in zip(wanted, got, strict=False):
            table.keys[slot] = run.keys[at]
            table.state[slot] = _STAGING
            table.parent[slot] = NONE
            remote.on_nodes.add(run.keys[at], until)
            blocks.append(run.blocks[at])
            epochs.append(run.epochs[at])
        remote.mark(got, UNKNOWN)
        table.counts[_FREE] -= len(got)
        table.counts[_STAGING] += len(got)
        slots += got
    granted = tuple(slots)
    if granted:
        if message.job in parts.inflight.saves:
            raise InternalError(f"save {message.job} was reserved twice")
        parts.inflight.begin_save(message.job, granted)
    return SlotGrant(message.job, granted, tuple(blocks), tuple(epochs))


def pass_on(parts: Parts, slots: Sequence[int]) -> Slices[None]:
    """All that fills these has reported: offer them to their nodes' writers, and free those that failed or that nobody takes."""
    table, remote = parts.slots, parts.remote
    assert remote is not None
    for at, piece in enumerate(parts.sliced(slots)):
        if at:
            yield
        filled = [slot for slot in piece if table.state[slot] == _STAGING]
        parts.counts.committed += len(filled)
        if remote.is_live:
            writing.offer(parts, remote, filled)
        for slot in piece:
            if slot in table.held:
                table.keys[slot] = None
                table.move(slot, State.CONDEMNED)
                continue
            if table.state[slot] == _STAGING:
                remote.on_nodes.discard(table.keys[slot])
            table.release(slot)


def _room(parts: Parts) -> int:
    """Loads need slots too: saves, and what is being written, have their share."""
    assert parts.remote is not None
    table = parts.slots
    lent = table.counts[_STAGING] + len(table.held)
    return max(0, int(parts.remote.config.max_writing_share * table.usable) - lent)


def seen(remote: Remote, keys: Sequence[BlockKey], found: Sequence[bool]) -> None:
    """Nodes have said which of these they have."""
    until = remote.now + ON_NODES_S
    for key, is_there in zip(keys, found, strict=True):
        if is_there:
            remote.on_nodes.add(key, until)
        else:
            remote.on_nodes.discard(key)
