"""Take blocks out of the index that must not be found any more."""

from __future__ import annotations

from array import array

import numpy as np

from kvoffload.l1.parts import Parts, Slices
from kvoffload.l1.remote import STORED
from kvoffload.l1.slots import NONE
from kvoffload.l1.states import State
from kvoffload.messages import DropReason

_RESET = bytes.maketrans(
    bytes([State.FILLING, State.STAGING, State.FILLED, State.READY]), bytes([State.DOOMED, State.DOOMED, State.FREE, State.FREE])
)
_READY = int(State.READY)


def fall(parts: Parts, slot: int, reason: DropReason) -> None:
    """Take a slot that is in the index out of it, and all its descendants, children first.

    A drop is counted for each that was to be saved: for ``reason`` this slot, for its parent its descendants. (What was to be fetched is
    counted as that.)
    """
    table, counts = parts.slots, parts.counts
    family = [slot]
    for member in family:
        if table.first_child[member] >= 0:
            family += table.children(member)
    for member in reversed(family):
        state = table.state[member]
        if state == State.CONDEMNED:
            continue  # it fell before
        parts.index.remove(table.keys[member])
        table.keys[member] = None
        if state == State.READY:
            counts.invalidated += 1
            parts.policy.discard(member)
            if table.guard[member]:
                table.move(member, State.CONDEMNED)
                continue
            if member in table.held:
                table.detach(member)
                table.parent[member] = NONE
                table.move(member, State.CONDEMNED)
                continue
        elif parts.remote is not None and parts.remote.stored[member] == STORED:
            counts.drops[DropReason.FETCH_FAILED] += 1
        else:
            counts.drops[reason if member == slot else DropReason.PARENT_FAILED] += 1
        if table.abandoned is not None:
            table.abandoned.append(table.parent[member])
        table.detach(member)
        if state == State.FILLING:
            table.parent[member] = NONE
            table.move(member, State.DOOMED)
        else:
            table.release(member)
    parts.evictor.forget()
    if parts.remote is not None:
        parts.remote.has_fallen = True


def spoil(parts: Parts, slot: int, reason: DropReason) -> None:
    """What was to be filled for a node will not be; it may still be written, until all have reported."""
    assert parts.remote is not None
    parts.remote.on_nodes.discard(parts.slots.keys[slot])
    parts.slots.keys[slot] = None
    parts.slots.move(slot, State.DOOMED)
    parts.counts.drops[reason] += 1


def let_go_abandoned(parts: Parts) -> Slices[None]:
    """Where nothing is kept: free what is READY, and which neither a pin nor a child needs any more."""
    table = parts.slots
    candidates, table.abandoned = table.abandoned or [], []
    state, guard, first_child, freed = table.state, table.guard, table.first_child, 0
    for candidate in candidates:
        slot = candidate
        while slot >= 0 and state[slot] == _READY and not guard[slot] and first_child[slot] < 0:
            above = table.parent[slot]
            parts.index.remove(table.keys[slot])
            parts.policy.discard(slot)
            table.detach(slot)
            table.parent[slot] = NONE
            table.release(slot)
            slot = above
            freed += 1
            if freed % parts.config.slice_blocks == 0:
                yield


def reset(parts: Parts) -> None:
    """End all match leases and empty the index. What jobs write or read keeps its slots until they end.

    Done to whole columns: a million slots one by one would take a second.
    """
    parts.leases.release_all()
    table, counts = parts.slots, parts.counts
    being_saved = table.counts[State.FILLING] + table.counts[State.FILLED] - _fetched(parts) + table.counts[State.STAGING]
    counts.drops[DropReason.RESET] += being_saved
    counts.invalidated += table.counts[State.READY]
    kept: dict[int, int] = {}  # protected slots and their parents, from the top of each chain down
    for load in parts.inflight.loads.values():
        for slot in table.chain(load.deepest):
            kept[slot] = table.parent[slot]
    parts.index.clear()
    parts.policy.clear()
    parts.evictor.forget()
    table.keys[:] = None
    states = table.state.translate(_RESET)
    for column in (table.parent, table.first_child, table.next_sibling, table.previous_sibling):
        np.frombuffer(column, dtype=np.int32)[:] = NONE
    for slot, parent in kept.items():
        states[slot] = State.CONDEMNED
        table.attach(slot, parent)
    for slot in table.held - kept.keys():
        states[slot] = State.CONDEMNED
    table.state[:] = states
    usable = np.frombuffer(states, dtype=np.uint8)[: table.usable]
    table.counts[:] = np.bincount(usable, minlength=len(State)).tolist()
    free = np.flatnonzero(usable == State.FREE)[::-1].astype(np.int32)
    table.free = array("i", free.tobytes())
    table.fresh = table.usable


def _fetched(parts: Parts) -> int:
    """How many of the slots that are FILLING or FILLED are not for a save."""
    if parts.remote is None:
        return 0
    states = np.frombuffer(parts.slots.state, dtype=np.uint8)
    of_remote = np.frombuffer(parts.remote.stored, dtype=np.uint8) == STORED
    return int(np.count_nonzero(of_remote & ((states == State.FILLING) | (states == State.FILLED))))


def quarantine(parts: Parts, rank: int) -> None:
    """A rank will not report any more: what it was to fill falls, and stays out of reach until its process is gone."""
    table = parts.slots
    for job in parts.inflight.awaited_from(rank)[0]:
        slots = parts.inflight.saves[job].slots
        for slot in reversed(slots):
            if table.state[slot] == State.FILLING:
                fall(parts, slot, DropReason.OFF)
            elif table.state[slot] == State.STAGING:
                spoil(parts, slot, DropReason.OFF)
        for slot in slots:
            if table.state[slot] == State.DOOMED:
                table.move(slot, State.QUARANTINED)
