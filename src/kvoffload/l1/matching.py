"""Find the longest READY prefix, lease it, and turn the lease into a load."""

from __future__ import annotations

from kvoffload.errors import InternalError
from kvoffload.l1.parts import Parts, Slices
from kvoffload.l1.removal import fall
from kvoffload.l1.saving import touch
from kvoffload.l1.slots import NONE, Slots
from kvoffload.l1.states import State
from kvoffload.messages import DropReason, HitReason, LoadFinished, LoadOutcome, MatchPrefix, PrefixHit, StartLoad

_FILLING, _READY = int(State.FILLING), int(State.READY)


def match(parts: Parts, message: MatchPrefix, now: float) -> Slices[PrefixHit]:
    """Answer with the longest READY prefix, or as much of it as there is room to protect, and lease it."""
    parts.leases.release_older(message.request, message.sequence)
    return (yield from answer(parts, message, now))


def answer(parts: Parts, message: MatchPrefix, now: float, *, is_cut: bool = False, likely: Slots | None = None) -> Slices[PrefixHit]:
    """As `match`, for a request that holds no lease, or one of the first part of this.

    ``is_cut``: there was no room for more. ``likely``: what the hit's slots should be, if somebody knows.
    """
    keys, state, index, counts = message.keys, parts.slots.state, parts.index, parts.counts
    length = index.length_with(keys, state, _READY)
    pending = index.length_with(keys, state, _FILLING, start=length) - length
    slots: tuple[int, ...] = ()
    reason = HitReason.MISS
    if length:
        deepest = index.find(keys[length - 1])
        if length > parts.config.slice_blocks:
            yield
        if message.request in parts.leases.held and parts.leases.extend(message.request, deepest, length, parts.room):
            granted = length
        else:
            parts.leases.release(message.request)
            granted = parts.leases.grant(message.request, message.sequence, deepest, length, parts.room, likely)
        if length > parts.config.slice_blocks:
            yield
        reason = HitReason.HIT if granted == length else HitReason.NO_ROOM
        if granted:
            chain, at = parts.leases.chain(message.request)
            if len(chain) != granted:
                raise InternalError(
                    f"request {message.request}: its keys are no chain, block {granted} is block {len(chain)} of its prefix"
                )
            slots = tuple(chain)
            yield from touch(parts, chain, at)
    else:
        parts.leases.release(message.request)
    if is_cut:
        reason = HitReason.NO_ROOM
    counts.matches[reason] += 1
    counts.asked += len(keys)
    counts.hit += len(slots)
    return PrefixHit(message.request, message.sequence, slots, pending, parts.generation, now + parts.config.hit_lifetime_s, reason)


def refuse(parts: Parts, message: MatchPrefix, now: float) -> PrefixHit:
    """Answer 0 for being off."""
    parts.leases.release_older(message.request, message.sequence)
    parts.counts.matches[HitReason.OFF] += 1
    parts.counts.asked += len(message.keys)
    return PrefixHit(message.request, message.sequence, (), 0, parts.generation, now, HitReason.OFF)


def start_load(parts: Parts, message: StartLoad) -> None:
    """Move the lease's pin to the last block loaded and to the job, or release it where nothing is loaded.

    A hit that is not held (any more: there was a reset) makes an empty job, whose reports are expected all the same.
    """
    if not message.count:
        parts.leases.release(message.request, message.sequence)
        return
    deepest = parts.leases.use(message.request, message.sequence, message.first + message.count)
    parts.inflight.begin_load(message.job, deepest, message.count if deepest >= 0 else 0)


def finish_load(parts: Parts, message: LoadFinished) -> None:
    """A load has ended on one rank; after the last one its pin goes. What failed to load is not offered again."""
    load = parts.inflight.load_reported(message.job, message.rank)
    if load.deepest == NONE:
        return
    if message.outcome == LoadOutcome.FAILED and not load.failed:
        load.failed = True
        first = parts.slots.ancestor(load.deepest, load.count - 1)
        if parts.slots.state[first] == _READY:
            fall(parts, first, DropReason.PARENT_FAILED)
    if not load.unreported:
        parts.slots.unpin(load.deepest)
