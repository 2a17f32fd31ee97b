"""Reserve slots for blocks, and commit them when every rank has filled them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvoffload.errors import InternalError
from kvoffload.l1 import staging, writing
from kvoffload.l1.parts import Parts, Slices
from kvoffload.l1.remote import UNKNOWN
from kvoffload.l1.removal import fall, spoil
from kvoffload.l1.slots import NONE
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


def touch(parts: Parts, chain: Sequence[int]) -> Slices[None]:
    """These are READY, parents first, and used again."""
    leaf_first = chain[::-1]
    for at, piece in enumerate(parts.sliced(leaf_first)):
        if at:
            yield
        parts.policy.touch(piece)
    if parts.remote is not None:
        yield from writing.on_hit(parts, parts.remote, chain)


def occupy(parts: Parts, chain: Sequence[BlockKey], parent: int) -> list[int]:
    """FILLING slots for these blocks, of which none is in the index, under ``parent``; fewer where no more can be had."""
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
    if not got:
        return got
    if parts.remote is not None:
        parts.remote.mark(got, UNKNOWN)
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
        keys[at] = chain[: len(got)]
        np.frombuffer(state, dtype=np.uint8)[at] = _FILLING
        np.frombuffer(parents, dtype=np.int32)[at[1:]] = at[:-1]
        np.frombuffer(first_child, dtype=np.int32)[at[:-1]] = at[1:]
    else:
        above = NONE
        for key, slot in zip(chain, got, strict=False):
            keys[slot] = key
            state[slot] = _FILLING
            if above >= 0:
                parents[slot] = above
                first_child[above] = slot
            above = slot
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


def commit(parts: Parts, slots: Sequence[int]) -> Slices[None]:
    """All that fills these has reported: make READY what may be, and free what fell."""
    table = parts.slots
    ready: list[int] = []
    for at, piece in enumerate(parts.sliced(slots)):
        if at:
            yield
        _commit(parts, piece, ready)
    if table.counts[_FILLED]:
        yield from _wake(parts, ready)
    for at, piece in enumerate(parts.sliced(ready[::-1])):
        if at:
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
    if len(slots) >= parts.many and _commit_all(parts, slots):
        ready += slots
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


def _commit_all(parts: Parts, slots: Sequence[int]) -> bool:
    """The usual case: all of these become READY. False, and nothing changed, where some cannot."""
    table = parts.slots
    at, states = np.array(slots, dtype=np.intp), np.frombuffer(table.state, dtype=np.uint8)
    if not (states[at] == _FILLING).all():
        return False
    states[at] = _READY
    parents = np.frombuffer(table.parent, dtype=np.int32)[at]
    if not ((parents < 0) | (states[parents] == _READY)).all():
        states[at] = _FILLING
        return False
    table.counts[_FILLING] -= len(slots)
    table.counts[_READY] += len(slots)
    return True


def _wake(parts: Parts, ready: list[int]) -> Slices[None]:
    """These became READY: so do the FILLED ones that waited for them, and are added."""
    table = parts.slots
    state, first_child, counts = table.state, table.first_child, table.counts
    for at, above in enumerate(ready):
        if not counts[_FILLED]:
            return
        if first_child[above] >= 0:
            for child in table.children(above):
                if state[child] == _FILLED:
                    state[child] = _READY
                    counts[_FILLED] -= 1
                    counts[_READY] += 1
                    ready.append(child)
        if at % parts.config.slice_blocks == parts.config.slice_blocks - 1:
            yield


def _check_report(message: BlocksFilled, slots: tuple[int, ...]) -> None:
    told = [*message.filled, *message.failed]
    if len(told) != len(slots) or set(told) != set(slots):
        raise InternalError(f"rank {message.rank} reported slots {told} of save {message.job}, which was granted {list(slots)}")
