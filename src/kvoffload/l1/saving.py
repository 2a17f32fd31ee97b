"""Reserve slots for blocks, and commit them when every rank has filled them."""

from __future__ import annotations

from collections.abc import Sequence

from kvoffload.errors import InternalError
from kvoffload.l1 import writing
from kvoffload.l1.parts import Parts
from kvoffload.l1.removal import fall
from kvoffload.l1.slots import NONE
from kvoffload.l1.states import State
from kvoffload.messages import BlockKey, BlocksFilled, DropReason, ParentMissing, ReserveSlots, SaveRun, SlotGrant

_FREE, _FILLING, _FILLED, _READY = int(State.FREE), int(State.FILLING), int(State.FILLED), int(State.READY)


def reserve(parts: Parts, message: ReserveSlots) -> tuple[SlotGrant, ParentMissing | None]:
    """Grant a slot to every block of every run that is not in the index, as far as its parents are and slots can be had."""
    index, drops = parts.index, parts.counts.drops
    missing: dict[str, None] = {}
    short: set[str] = set()
    slots: list[int] = []
    blocks: list[int] = []
    epochs: list[int] = []
    parts.evictor.begin()
    for run in message.runs:
        parts.counts.offered += len(run.keys)
        parent = index.find(run.parent) if run.parent else NONE
        if run.parent and parent < 0:
            # Where the parent itself just found no slot, offering the whole prefix once more would not help.
            if run.request in short:
                drops[DropReason.NO_SLOT] += len(run.keys)
            else:
                drops[DropReason.PARENT_MISSING] += len(run.keys)
                missing[run.request] = None
            continue
        start, got = _reserve_run(parts, run, parent)
        stop = start + len(got)
        slots += got
        blocks += run.blocks[start:stop]
        epochs += run.epochs[start:stop]
        if stop < len(run.keys):
            short.add(run.request)
            drops[DropReason.NO_SLOT] += len(run.keys) - stop
    if parts.remote is not None:
        writing.look_ahead(parts, parts.remote)
    granted = tuple(slots)
    if granted:
        if message.job in parts.inflight.saves:
            raise InternalError(f"save {message.job} was reserved twice")
        parts.inflight.begin_save(message.job, granted)
    return (
        SlotGrant(message.job, granted, tuple(blocks), tuple(epochs)),
        ParentMissing(message.job, tuple(missing)) if missing else None,
    )


def _reserve_run(parts: Parts, run: SaveRun, parent: int) -> tuple[int, list[int]]:
    """How many blocks of the run are in the index already, and the slots of the ones behind them, until slots run out."""
    state, shards = parts.slots.state, parts.index.shards
    shared: list[int] = []
    start = 0
    for key in run.keys:
        slot = shards[key[0]].get(key, NONE)
        if slot < 0:
            break
        parent = slot
        start += 1
        if state[slot] == _READY:
            shared.append(slot)
    parts.counts.shared += start
    if shared:
        parts.policy.touch(reversed(shared))
        if parts.remote is not None:
            writing.on_hit(parts, parts.remote, shared)
    wanted = len(run.keys) - start
    if not wanted:
        return start, []
    return start, occupy(parts, run.keys[start:] if start else run.keys, parent)


def occupy(parts: Parts, chain: Sequence[BlockKey], parent: int) -> list[int]:
    """FILLING slots for these blocks, of which none is in the index, under ``parent``; fewer where no more can be had."""
    table, shards = parts.slots, parts.index.shards
    wanted = len(chain)
    got = table.take(wanted)
    if len(got) < wanted:
        # The new child counts on its parent before anything is evicted for it.
        if parent >= 0:
            table.guard[parent] += 1
        evicted = parts.evictor.evict(wanted - len(got))
        if parent >= 0:
            table.guard[parent] -= 1
        got += evicted
        if parts.remote is not None:
            writing.on_eviction(parts, parts.remote, evicted)
    if not got:
        return got
    if parts.remote is not None:
        parts.remote.forget(got)
    state, keys, first_child, parents = table.state, table.keys, table.first_child, table.parent
    above = parent
    for key, slot in zip(chain, got, strict=False):
        if shards[key[0]].setdefault(key, slot) != slot:
            # Not a chain: a run repeats a key of its own, and is cut there.
            spare = got.index(slot)
            table.put_back(got[spare:])
            del got[spare:]
            break
        keys[slot] = key
        state[slot] = _FILLING
        if above != parent:
            parents[slot] = above
            first_child[above] = slot
        else:
            table.attach(slot, above)
        above = slot
    table.counts[_FREE] -= len(got)
    table.counts[_FILLING] += len(got)
    return got


def filled(parts: Parts, message: BlocksFilled) -> None:
    """Note what became of a grant on one rank; with the last rank's report, commit it."""
    save = parts.inflight.save_reported(message.job, message.rank)
    if message.failed or message.filled != save.slots:
        _check_report(message, save.slots)
        failed = set(message.failed)
        for slot in reversed(save.slots):  # children first, so that each is counted for its own reason
            if slot in failed and parts.slots.state[slot] == _FILLING:
                fall(parts, slot, message.reason or DropReason.COPY_FAILED)
    if not save.unreported:
        commit(parts, save.slots)


def commit(parts: Parts, slots: Sequence[int]) -> None:
    """All that fills these has reported: make READY what may be, and free what fell."""
    table = parts.slots
    state, parent, first_child, counts = table.state, table.parent, table.first_child, table.counts
    waiting = counts[_FILLED]
    ready: list[int] = []
    filled = 0
    for slot in slots:
        if state[slot] == _FILLING:
            above = parent[slot]
            if above < 0 or state[above] == _READY:
                state[slot] = _READY
                ready.append(slot)
                if waiting and first_child[slot] >= 0:
                    _wake(parts, slot, ready)
            else:
                state[slot] = _FILLED
                filled += 1
        else:  # DOOMED or QUARANTINED
            table.release(slot)
    woken = len(ready) + filled
    counts[_FILLING] -= woken
    counts[_FILLED] += filled
    counts[_READY] += len(ready)
    parts.policy.admit(reversed(ready))
    saved = len(ready) if parts.remote is None else writing.on_commit(parts, parts.remote, ready)
    parts.counts.committed += saved


def _wake(parts: Parts, slot: int, ready: list[int]) -> None:
    """A slot became READY: so do the FILLED ones that waited for it."""
    table = parts.slots
    woken = [slot]
    for above in woken:
        for child in table.children(above):
            if table.state[child] == _FILLED:
                table.state[child] = _READY
                table.counts[_FILLED] -= 1
                table.counts[_FILLING] += 1  # as if filled by this commit, which counts all in ``ready`` as FILLING before
                ready.append(child)
                woken.append(child)


def _check_report(message: BlocksFilled, slots: tuple[int, ...]) -> None:
    told = [*message.filled, *message.failed]
    if len(told) != len(slots) or set(told) != set(slots):
        raise InternalError(f"rank {message.rank} reported slots {told} of save {message.job}, which was granted {list(slots)}")
