"""Reserve slots for blocks, and commit them when every rank has filled them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvoffload.errors import InternalError
from kvoffload.l1 import staging, writing
from kvoffload.l1.parts import Parts, Slices
from kvoffload.l1.remote import UNKNOWN
from kvoffload.l1.removal import fall, spoil
from kvoffload.l1.slots import NONE, Slots
from kvoffload.l1.states import State
from kvoffload.messages import BlockKey, BlocksFilled, DropReason, ParentMissing, ReserveSlots, SaveRun, SlotGrant

_FREE, _FILLING, _FILLED, _READY = int(State.FREE), int(State.FILLING), int(State.FILLED), int(State.READY)
_STAGING = int(State.STAGING)


def reserve(parts: Parts, message: ReserveSlots) -> Slices[tuple[SlotGrant, ParentMissing | None]]:
    """Grant a slot to every block of every run that is not in the index, as far as its parents are and slots can be had."""
    if not parts.config.keeps:
        return staging.reserve(parts, message), None
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
        start, got = yield from _reserve_run(parts, run, parent)
        if start and parts.remote is not None and parts.remote.fetch_of:
            # What was just computed is not saved because a node is to bring it: should it not, somebody has to be told.
            batch = parts.remote.fetch_of.get(index.find(run.keys[start - 1]))
            if batch is not None:
                parts.remote.relying.setdefault(batch, {})[run.request] = message.job
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


def _reserve_run(parts: Parts, run: SaveRun, parent: int) -> Slices[tuple[int, list[int]]]:
    """How many blocks of the run are in the index already, and the slots of the ones behind them, until slots run out."""
    state, shards = parts.slots.state, parts.index.shards
    shared: list[int] = []
    start = 0
    for piece in parts.sliced(run.keys):
        before = start
        for key in piece:
            slot = shards[key[0]].get(key, NONE)
            if slot < 0:
                break
            parent = slot
            start += 1
            if state[slot] == _READY:
                shared.append(slot)
        if start - before < len(piece) or start == len(run.keys):
            break
        yield
    parts.counts.shared += start
    if shared:
        yield from touch(parts, shared)
    got: list[int] = []
    if start == len(run.keys):
        return start, got
    for at, piece in enumerate(parts.sliced(run.keys[start:] if start else run.keys)):
        if at:
            yield
        more = occupy(parts, piece, parent)
        got += more
        if len(more) < len(piece) or not more:
            break
        parent = more[-1]
    return start, got


def touch(parts: Parts, chain: Sequence[int], at: Slots | None = None) -> Slices[None]:
    """These are READY, parents first, and used again. ``at``: the same as an array, where there is one."""
    if at is None:
        for number, piece in enumerate(parts.sliced(chain[::-1])):
            if number:
                yield
            parts.policy.touch(piece)
    else:
        for start in range(len(at), 0, -parts.config.slice_blocks):
            if start < len(at):
                yield
            parts.policy.touch(at[max(0, start - parts.config.slice_blocks) : start][::-1])
    if parts.remote is not None:
        yield from writing.on_hit(parts, parts.remote, chain)


def occupy(parts: Parts, chain: Sequence[BlockKey], parent: int, known: int = UNKNOWN) -> list[int]:
    """FILLING slots for these blocks, of which none is in the index, under ``parent``; fewer where no more can be had.

    ``known`` is what is known of the blocks on nodes.
    """
    table, shards = parts.slots, parts.index.shards
    wanted = len(chain)
    got = table.take(wanted)
    if len(got) < wanted and parts.config.keeps:
        # The new child counts on its parent before anything is evicted for it.
        if parent >= 0:
            table.guard[parent] += 1
        evicted = parts.evictor.evict(wanted - len(got))
        if parent >= 0:
            table.guard[parent] -= 1
        got += evicted
        if parts.remote is not None:
            writing.on_eviction(parts, parts.remote, evicted)
    for key, slot in zip(chain, got, strict=False):
        if shards[key[0]].setdefault(key, slot) != slot:
            # Not a chain: a run repeats a key of its own, and is cut there.
            spare = got.index(slot)
            table.put_back(got[spare:])
            del got[spare:]
            break
    if not got:
        return got
    state, keys, first_child, parents = table.state, table.keys, table.first_child, table.parent
    table.attach(got[0], parent)
    if len(got) >= parts.many:
        at = np.array(got, dtype=np.intp)
        keys[at] = chain if len(got) == len(chain) else chain[: len(got)]
        table.states[at] = _FILLING
        table.parents[at[1:]] = at[:-1]
        table.first_children[at[:-1]] = at[1:]
        if parts.remote is not None:
            parts.remote.all_stored[at] = known
    else:
        above = NONE
        for key, slot in zip(chain, got, strict=False):
            keys[slot] = key
            state[slot] = _FILLING
            if above >= 0:
                parents[slot] = above
                first_child[above] = slot
            above = slot
        if parts.remote is not None:
            parts.remote.mark(got, known)
    table.counts[_FREE] -= len(got)
    table.counts[_FILLING] += len(got)
    return got


def filled(parts: Parts, message: BlocksFilled) -> Slices[None]:
    """Note what became of a grant on one rank; with the last rank's report, commit it."""
    save = parts.inflight.save_reported(message.job, message.rank)
    if message.failed or message.filled != save.slots:
        _check_report(message, save.slots)
        failed = set(message.failed)
        for slot in reversed(save.slots):  # children first, so that each is counted for its own reason
            if slot not in failed:
                continue
            if parts.slots.state[slot] == _FILLING:
                fall(parts, slot, message.reason or DropReason.COPY_FAILED)
            elif parts.slots.state[slot] == _STAGING:
                spoil(parts, slot, message.reason or DropReason.COPY_FAILED)
    if not save.unreported:
        yield from commit(parts, save.slots) if parts.config.keeps else staging.pass_on(parts, save.slots)


def commit(parts: Parts, slots: Sequence[int], at: Slots | None = None) -> Slices[None]:
    """All that fills these has reported: make READY what may be, and free what fell. ``at``: the same as an array, where there is one."""
    table = parts.slots
    ready: list[int] = []
    if at is not None and len(at) <= parts.config.slice_blocks and not table.counts[_FILLED] and _commit_all(parts, at):
        if table.counts[_FILLED]:
            return
        parts.policy.admit(at[::-1])
        if table.abandoned is not None:
            table.abandoned += slots
        if parts.remote is None or not parts.remote.all_stored[at].all():
            saved = len(slots) if parts.remote is None else (yield from writing.on_commit(parts, parts.remote, slots))
            parts.counts.committed += saved  # not in one expression: others count while this waits for its turn
        return
    for number, piece in enumerate(parts.sliced(slots)):
        if number:
            yield
        _commit(parts, piece, ready)
    if table.counts[_FILLED]:
        yield from _wake(parts, ready)
    for number, piece in enumerate(parts.sliced(ready[::-1])):
        if number:
            yield
        parts.policy.admit(piece)
    if table.abandoned is not None:
        table.abandoned += ready  # unless somebody who waited takes them now
    saved = len(ready) if parts.remote is None else (yield from writing.on_commit(parts, parts.remote, ready))
    parts.counts.committed += saved


def _commit(parts: Parts, slots: Sequence[int], ready: list[int]) -> None:
    """Those that are READY now are added to ``ready``."""
    table = parts.slots
    state, parent, counts = table.state, table.parent, table.counts
    if len(slots) >= parts.many:
        waiting = counts[_FILLED]
        if _commit_all(parts, np.array(slots, dtype=np.intp)):
            ready += slots if counts[_FILLED] == waiting else ()
            return
    before = len(ready)
    filled = 0
    for slot in slots:
        if state[slot] == _FILLING:
            above = parent[slot]
            if above < 0 or state[above] == _READY:
                state[slot] = _READY
                ready.append(slot)
            else:
                state[slot] = _FILLED
                filled += 1
        else:  # DOOMED or QUARANTINED
            table.release(slot)
    counts[_FILLING] -= len(ready) - before + filled
    counts[_FILLED] += filled
    counts[_READY] += len(ready) - before


def _commit_all(parts: Parts, at: Slots) -> bool:
    """The usual cases: all of these become READY, or none does. False, and nothing changed, in any other."""
    table = parts.slots
    states = table.states
    if not (states[at] == _FILLING).all():
        return False
    parents = table.parents[at]
    if not ((parents < 0) | (states[parents] == _READY)).any():  # a part of a chain whose beginning has not come
        states[at] = _FILLED
        table.counts[_FILLING] -= len(at)
        table.counts[_FILLED] += len(at)
        return True
    states[at] = _READY
    if not ((parents < 0) | (states[parents] == _READY)).all():
        states[at] = _FILLING
        return False
    table.counts[_FILLING] -= len(at)
    table.counts[_READY] += len(at)
    return True


def _wake(parts: Parts, ready: list[int]) -> Slices[None]:
    """These became READY: so do the FILLED ones that waited for them, and are added."""
    table = parts.slots
    state, counts = table.state, table.counts
    first_child, next_sibling = table.first_child, table.next_sibling
    before, filled = len(ready), counts[_FILLED]
    for at, above in enumerate(ready):
        child = first_child[above]
        while child >= 0:
            if state[child] == _FILLED:
                state[child] = _READY
                ready.append(child)
            child = next_sibling[child]
        if len(ready) - before == filled:
            break
        if at % parts.config.slice_blocks == parts.config.slice_blocks - 1:
            counts[_FILLED] -= len(ready) - before
            counts[_READY] += len(ready) - before
            before, filled = len(ready), counts[_FILLED]
            yield
    counts[_FILLED] -= len(ready) - before
    counts[_READY] += len(ready) - before


def _check_report(message: BlocksFilled, slots: tuple[int, ...]) -> None:
    told = [*message.filled, *message.failed]
    if len(told) != len(slots) or set(told) != set(slots):
        raise InternalError(f"rank {message.rank} reported slots {told} of save {message.job}, which was granted {list(slots)}")
