"""Every invariant of L1, verified from scratch: for tests, and for whoever suspects a bug."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from kvoffload.errors import InternalError
from kvoffload.l1.parts import Parts
from kvoffload.l1.remote import STORED, WRITING, Remote, Transfer
from kvoffload.l1.slots import NONE
from kvoffload.l1.states import INDEXED, State


def check_all(parts: Parts) -> None:
    """Raise InternalError for the first invariant that does not hold."""
    _check_counts(parts)
    _check_index(parts)
    _check_families(parts)
    _check_guards(parts)
    _check_jobs(parts)
    _check_nothing_is_kept(parts)
    if parts.remote is not None:
        _check_remote(parts, parts.remote)
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
            _require(table.keys[slot] is None or state in (State.FREE, State.STAGING), "slot", slot, "has a key but is", state)


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
        if state in (State.FREE, State.DOOMED, State.QUARANTINED, State.STAGING):
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
    """Guards recomputed from the pins of leases and loads; nothing CONDEMNED is without one, unless it is being written to a node."""
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
        elif slot not in table.held:
            _require(table.state[slot] != State.CONDEMNED, "slot", slot, "is CONDEMNED and nothing keeps it: it has leaked")
    _require(table.protected == len(expected), table.protected, "slots are counted as protected, and", len(expected), "are")


def _check_jobs(parts: Parts) -> None:
    """Every slot being filled belongs to one save or fetch, and each of these has only such slots."""
    table = parts.slots
    owned = [slot for save in parts.inflight.saves.values() for slot in save.slots]
    if parts.remote is not None:
        owned += parts.remote.fetch_of
    filling = (State.FILLING, State.STAGING, State.DOOMED, State.QUARANTINED)
    held = {slot for slot in range(table.usable) if table.state[slot] in filling}
    _require(len(owned) == len(set(owned)), "one slot is filled twice")
    _require(
        set(owned) == held,
        "slots",
        sorted(held ^ set(owned)),
        "are being filled for nothing, or not being filled",
    )
    if not owned:
        _require(not table.counts[State.FILLED], "slots are FILLED, and nothing that they could wait for is being filled")


def _check_nothing_is_kept(parts: Parts) -> None:
    """A READY slot is pinned, or something that is being filled needs it; saves are not in the index."""
    table = parts.slots
    _require(not parts.config.keeps or not table.counts[State.STAGING], "a slot is STAGING, and L1 keeps blocks")
    if parts.config.keeps:
        return
    for slot in range(table.usable):
        if table.state[slot] == State.READY:
            _require(bool(table.guard[slot]) or table.first_child[slot] >= 0, "slot", slot, "is READY and nothing keeps it")
    _require(not table.abandoned, "slots", table.abandoned, "were not looked at")


def _check_remote(parts: Parts, remote: Remote) -> None:
    """Fetches and writes add up to their slots, and every match that waits is waited for by something."""
    table = parts.slots
    fetched = _slots_of(remote.fetches, remote.unsettled_fetches)
    _require(len(fetched) == len(set(fetched)) == len(remote.fetch_of), "two fetches fill one slot, or a fetch has lost one")
    for slot, batch in remote.fetch_of.items():
        is_settled = batch not in remote.unsettled_fetches
        _require(is_settled or slot in remote.unsettled_fetches[batch], "slot", slot, "is in fetch", batch, "and not unsettled")
        state = State(table.state[slot])
        states = (State.FILLING, State.DOOMED) if is_settled else (State.QUARANTINED,)
        _require(state in states, "slot", slot, "of fetch", batch, "is", state)
        _require(state != State.FILLING or remote.stored[slot] == STORED, "slot", slot, "is fetched and not known to be stored")
    written = _slots_of(remote.writes, remote.unsettled_writes)
    _require(len(written) == len(table.held) and set(written) == table.held, "the slots held are not those that are written to nodes")
    for slot in written:
        state = State(table.state[slot])
        _require(state in (State.READY, State.CONDEMNED), "slot", slot, "is written to a node and", state)
    writing = {slot for slot in range(table.usable) if table.state[slot] == State.READY and remote.stored[slot] == WRITING}
    _require(writing <= table.held, "slots", sorted(writing - table.held), "are marked as being written, and are not")
    queued = Counter(transfer.node for transfer in remote.writes.values() for _ in transfer.slots)
    _require(queued == remote.queued, "blocks on their way to nodes are", queued, "and not", remote.queued)
    room = int(parts.config.max_waiting_share * table.usable)
    _require(table.protected + len(remote.fetch_of) <= room, "leases, loads and fetches hold more than", room, "slots")
    for request, waiting in remote.waiting.items():
        if waiting.fetch is None:
            asked = any(find.waiting is waiting for find in remote.finds.values())
            _require(asked, "request", request, "waits for an answer that nobody was asked for")
        else:
            _require(waiting.fetch in remote.fetches, "request", request, "waits for fetch", waiting.fetch, "which has ended")
            _require(waiting in remote.waiters[waiting.fetch], "request", request, "would not be woken by fetch", waiting.fetch)
        lease = parts.leases.held.get(request)
        _require(lease is None or lease.sequence == waiting.message.sequence, "request", request, "waits, and holds an older lease")
    _require(not remote.waiting or remote.next_deadline() is not None, "matches wait without a deadline")


def _slots_of(transfers: Mapping[int, Transfer], unsettled: Mapping[int, set[int]]) -> list[int]:
    under_way = [slot for transfer in transfers.values() for slot in transfer.slots]
    return under_way + [slot for slots in unsettled.values() for slot in slots]
