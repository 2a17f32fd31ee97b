"""Every invariant of L1, verified from scratch: for tests, and for whoever suspects a bug."""

from __future__ import annotations

from collections import Counter

from kvoffload.errors import InternalError
from kvoffload.l1.parts import Parts
from kvoffload.l1.slots import NONE
from kvoffload.l1.states import INDEXED, State


def check_all(parts: Parts) -> None:
    """Raise InternalError for the first invariant that does not hold."""
    _check_counts(parts)
    _check_index(parts)
    _check_families(parts)
    _check_guards(parts)
    _check_jobs(parts)
    parts.policy.check()


def _require(holds: bool, *what: object) -> None:
    if not holds:
        words = (part.name if isinstance(part, State) else str(part) for part in what)
        raise InternalError("L1: " + " ".join(words))


def _check_counts(parts: Parts) -> None:
    """One state per slot, the counts add up, and the free list has every FREE slot once."""
    table = parts.slots
    _require(table.fresh <= table.usable <= table.capacity, "more slots are used than there are")
    _require(not any(table.state[table.fresh :]), "a slot that was never handed out is not FREE")
    counted = Counter(table.state[: table.usable])
    _require([counted[state] for state in State] == table.counts, "slots by state are", counted, "and not", table.counts)
    free = set(table.free)
    _require(len(free) == len(table.free), "a slot is in the free list twice")
    _require(free == {slot for slot in range(table.fresh) if table.state[slot] == State.FREE}, "the free list is not the FREE slots")


def _check_index(parts: Parts) -> None:
    """Index and slots agree, and only READY slots are in the policy's order."""
    table = parts.slots
    indexed = {slot for shard in parts.index.shards for slot in shard.values()}
    ordered = set(parts.policy.order())
    _require(len(indexed) == len(parts.index), "two keys lead to one slot")
    for slot in range(table.usable):
        state = State(table.state[slot])
        _require((slot in indexed) == (state in INDEXED), "slot", slot, "is", state, "and index and slots disagree about it")
        _require((slot in ordered) == (state == State.READY), "slot", slot, "is", state, "but the policy disagrees")
        if slot in indexed:
            _require(parts.index.find(table.keys[slot]) == slot, "slot", slot, "has another slot's key")
        else:
            _require(table.keys[slot] is None or state == State.FREE, "slot", slot, "has a key but is", state)


def _check_families(parts: Parts) -> None:
    """Parents and children agree, and no child is further along than its parent."""
    table = parts.slots
    children: dict[int, list[int]] = {slot: table.children(slot) for slot in range(table.usable) if table.first_child[slot] >= 0}
    for parent, family in children.items():
        _require(all(table.parent[child] == parent for child in family), "a child of slot", parent, "has another parent")
        before = [NONE if len(family) == 1 else family[-1], *family[:-1]]
        _require([table.previous_sibling[child] for child in family] == before, "the children of slot", parent, "are linked wrongly")
    listed = {child for family in children.values() for child in family}
    for slot in range(table.usable):
        state, parent = State(table.state[slot]), table.parent[slot]
        if state in (State.FREE, State.DOOMED, State.QUARANTINED):
            _require(slot not in children and slot not in listed, "slot", slot, "is", state, "and has family")
            continue
        _require((slot in listed) == (parent != NONE), "slot", slot, "is not among its parent's children")
        if parent == NONE:
            continue
        above = State(table.state[parent])
        if state in INDEXED:
            _require(above in INDEXED, "slot", slot, "is in the index and its parent is", above)
        if state in (State.READY, State.FILLED):
            closed = above == State.READY if state == State.READY else above != State.READY
            _require(closed, "slot", slot, "is", state, "and its parent is", above)
        if state == State.CONDEMNED:
            _require(above in (State.READY, State.CONDEMNED), "slot", slot, "is CONDEMNED and its parent is", above)


def _check_guards(parts: Parts) -> None:
    """Guards recomputed from the pins of leases and loads; nothing CONDEMNED is without one."""
    table = parts.slots
    pins = [lease.deepest for lease in parts.leases.held.values()]
    pins += [load.deepest for load in parts.inflight.loads.values() if not load.is_empty]
    expected: Counter[int] = Counter()
    for pin in pins:
        slot = pin
        while slot >= 0:
            expected[slot] += 1
            if expected[slot] > 1:
                break
            slot = table.parent[slot]
    for slot in range(table.usable):
        _require(table.guard[slot] == expected[slot], "slot", slot, "has guard", table.guard[slot], "and should have", expected[slot])
        if expected[slot]:
            _require(table.state[slot] in (State.READY, State.CONDEMNED), "slot", slot, "is pinned and", State(table.state[slot]))
        else:
            _require(table.state[slot] != State.CONDEMNED, "slot", slot, "is CONDEMNED and nothing pins it: it has leaked")
    _require(table.protected == len(expected), table.protected, "slots are counted as protected, and", len(expected), "are")


def _check_jobs(parts: Parts) -> None:
    """Every slot being filled belongs to one save, and every save has only such slots."""
    table = parts.slots
    owned = [slot for save in parts.inflight.saves.values() for slot in save.slots]
    held = {slot for slot in range(table.usable) if table.state[slot] in (State.FILLING, State.DOOMED, State.QUARANTINED)}
    _require(len(owned) == len(set(owned)), "two saves fill one slot")
    _require(set(owned) == held, "slots", sorted(held ^ set(owned)), "are being filled by no save, or are in a save and not being filled")
    if not owned:
        _require(not table.counts[State.FILLED], "slots are FILLED, and nothing that they could wait for is being filled")
