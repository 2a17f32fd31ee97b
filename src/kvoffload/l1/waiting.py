"""A match for which nodes may have more than L1: ask them, fetch what is worth it, and answer when that is over, or at the deadline."""

from __future__ import annotations

from collections import Counter

import numpy as np

from kvoffload.errors import InternalError
from kvoffload.l1 import fetching, matching, staging
from kvoffload.l1.effects import ToPrefetcher, ToScheduler
from kvoffload.l1.parts import Parts, Slices
from kvoffload.l1.remote import ABSENT, THERE, Find, Reading, Remote, Waiting, in_batches
from kvoffload.l1.states import State
from kvoffload.messages import Batch, BlocksFound, FindBlocks, MatchPrefix, Node, PrefixHit

_FILLING, _READY = int(State.FILLING), int(State.READY)
_ANSWERS = bytes.maketrans(b"\0\1", bytes([ABSENT, THERE]))


def match(parts: Parts, remote: Remote, message: MatchPrefix) -> Slices[PrefixHit | None]:
    """The answer, if it can be given now: L1 has it all, or nodes have nothing worth asking for. The READY part is leased either way."""
    supersede(parts, remote, message)
    now = remote.now
    if message.deadline <= now:
        return (yield from matching.answer(parts, message, now))
    ready, start = _lengths(parts, message)
    nodes = yield from _nodes_to_ask(parts, remote, message, start)
    fetch = None if nodes else _fetch_under_way(parts, remote, message, ready, start)
    if (not nodes and fetch is None) or not _lease_whole(parts, message, ready):
        return (yield from matching.answer(parts, message, now))
    waiting = Waiting(message, ready, start, nodes)
    remote.wait(waiting)
    if fetch is None:
        yield from _ask(parts, remote, waiting)
    else:
        _wait_for(remote, waiting, fetch)
    return None


def supersede(parts: Parts, remote: Remote, message: MatchPrefix) -> None:
    """The request asks anew: what it held goes, and what it waited for is not answered any more."""
    parts.leases.release_older(message.request, message.sequence)
    older = remote.waiting.get(message.request)
    if older is not None and older.message.sequence >= message.sequence:
        raise InternalError(f"request {message.request} asked for match {message.sequence} after match {older.message.sequence}")
    remote.give_up(message.request)


def found(parts: Parts, remote: Remote, message: BlocksFound) -> Slices[None]:
    """A node has said what it has. What to fetch is decided once the first absent block is known, and all before it."""
    find = remote.finds.pop(message.batch, None)
    if find is None or find.node != message.node or len(message.found) not in (0, len(find.places)):
        raise InternalError(f"node {message.node} answered question {message.batch}, which it was not asked, or not about so many blocks")
    remote.counts.found += message.found.count(True)
    waiting = find.waiting
    if message.found and not parts.config.keeps:
        staging.seen(remote, [waiting.message.keys[waiting.start + place] for place in find.places], message.found)
    if not remote.is_waiting(waiting) or waiting.fetch is not None:
        return
    states = bytes(message.found or len(find.places)).translate(_ANSWERS)
    if isinstance(find.places, range):
        waiting.found[find.places.start : find.places.stop] = states
    else:
        np.frombuffer(waiting.found, dtype=np.uint8)[list(find.places)] = np.frombuffer(states, dtype=np.uint8)
    if waiting.is_decided:
        yield from _fetch(parts, remote, waiting)
        yield from _go_on(parts, remote, waiting)


def resume(parts: Parts, remote: Remote, batch: Batch) -> Slices[None]:
    """This fetch has ended: who waited for it waits for another one, or is answered."""
    pace = parts.pace()
    for waiting in remote.waiters.pop(batch, ()):
        if remote.is_waiting(waiting) and waiting.fetch == batch:
            if pace.is_over(len(waiting.message.keys)):
                yield
            yield from _go_on(parts, remote, waiting)


def look_again(parts: Parts, remote: Remote) -> Slices[None]:
    """Blocks fell: whose chain they were in is answered at once, unless it waits for something else that is still coming."""
    remote.has_fallen = False
    pace = parts.pace()
    for waiting in list(remote.waiting.values()):
        if pace.is_over(len(waiting.message.keys)):
            yield
        ready, end = _lengths(parts, waiting.message)
        if waiting.fetch is None:
            if end < waiting.start:
                yield from _answer(parts, remote, waiting)
        elif waiting.fetch != _fetch_under_way(parts, remote, waiting.message, ready, end):
            yield from _go_on(parts, remote, waiting)


def expire(parts: Parts, remote: Remote) -> Slices[None]:
    """Answer every match whose deadline has come with what is READY. What is being fetched goes on."""
    pace = parts.pace()
    while (waiting := remote.due(remote.now)) is not None:
        if pace.is_over(len(waiting.message.keys)):
            yield
        remote.counts.late += 1
        yield from _answer(parts, remote, waiting)


def refuse_all(parts: Parts, remote: Remote) -> None:
    """L1 is off: every match that waits is told so."""
    for waiting in list(remote.waiting.values()):
        remote.give_up(waiting.message.request)
        parts.leases.release(waiting.message.request)
        remote.effects.append(ToScheduler(matching.refuse(parts, waiting.message, remote.now)))


def _lengths(parts: Parts, message: MatchPrefix) -> tuple[int, int]:
    """How many of the first blocks are READY, and how many are that or being filled."""
    state = parts.slots.state
    ready = parts.index.length_with(message.keys, state, _READY)
    return ready, parts.index.length_with(message.keys, state, _FILLING, start=ready)


def _nodes_to_ask(parts: Parts, remote: Remote, message: MatchPrefix, start: int) -> Slices[list[Node]]:
    """The nodes of the blocks from ``start`` on; none where that cannot be worth it."""
    nodes: list[Node] = []
    if remote.ring is None or not remote.is_live or not _is_enough(remote, message, start, len(message.keys)):
        return nodes
    unread, now = remote.unread, remote.now
    for at, keys in enumerate(parts.sliced(message.keys[start:] if start else message.keys)):
        if at:
            yield
        theirs = remote.ring.nodes_of(keys)
        if len(unread):
            whole = next((place for place, key in enumerate(keys) if unread.has(key, now)), len(keys))
            theirs = theirs[:whole]
        if None in theirs:
            theirs = theirs[: theirs.index(None)]
        nodes += theirs  # type: ignore[arg-type]
        if len(theirs) < len(keys):
            break
    return nodes if _is_enough(remote, message, start, start + len(nodes)) else []


def _useful(message: MatchPrefix, start: int, stop: int) -> int:
    """How many tokens the blocks from ``start`` to ``stop`` save computing: not those that the engine has itself."""
    return max(0, stop - max(start, message.local)) * message.block_tokens


def _is_enough(remote: Remote, message: MatchPrefix, start: int, stop: int) -> bool:
    return stop > max(start, message.local) and _useful(message, start, stop) >= remote.config.min_tokens


def _lease_whole(parts: Parts, message: MatchPrefix, ready: int) -> bool:
    """Lease the READY part while the request waits; False, and nothing leased, where there is no room for it."""
    leases, request = parts.leases, message.request
    if ready:
        deepest = parts.index.find(message.keys[ready - 1])
        if request in leases.held:
            if leases.extend(request, deepest, ready, parts.room):
                return True
        elif leases.grant(request, message.sequence, deepest, ready, parts.room) == ready:
            return True
    leases.release(request)
    return not ready


def _ask(parts: Parts, remote: Remote, waiting: Waiting) -> Slices[None]:
    """Ask every node concerned, all at once."""
    message, start = waiting.message, waiting.start
    remote.counts.lookups += 1
    remote.counts.asked += len(waiting.nodes)
    for at, places in enumerate(parts.sliced(range(len(waiting.nodes)))):
        if at:
            yield
        first, stop = places[0], places[-1] + 1
        for node, (theirs, keys) in in_batches(waiting.nodes[first:stop], places, message.keys[start + first : start + stop]):
            assert node is not None
            batch = remote.next_batch()
            remote.finds[batch] = Find(waiting, node, theirs)
            remote.effects.append(ToPrefetcher(node, FindBlocks(batch, tuple(keys), message.deadline)))


def _fetch(parts: Parts, remote: Remote, waiting: Waiting) -> Slices[None]:
    """Fetch what is there and L1 still lacks, from the first such block on: L1 has no block without its parent.

    So blocks that only L1 lacks, and the engine has, are fetched with the others, and count among what that costs.
    """
    message, config = waiting.message, remote.config
    _, start = _lengths(parts, message)
    stop = waiting.start + waiting.known
    if not waiting.start <= start < stop or not remote.is_live:
        return  # something that was there has fallen, or somebody else was faster
    room = max(0, parts.room - parts.slots.protected)
    if stop - start > room:
        waiting.is_cut = True
        stop = start + room
    if not _is_enough(remote, message, start, stop):
        return
    nodes = waiting.nodes[start - waiting.start : stop - waiting.start]
    judge = config.load_or_compute
    if judge is not None and not judge.should_load(_useful(message, start, stop), message.tokens_per_s, Counter(nodes), config.block_bytes):
        remote.counts.skipped += len(nodes)
        return
    deadline = message.deadline + config.fetch_grace_s
    readings: dict[Node, Reading] = {}
    for at, places in enumerate(parts.sliced(range(start, stop))):
        if at:
            yield
        first, end = places[0], places[-1] + 1
        theirs = waiting.nodes[first - waiting.start : end - waiting.start]
        before = message.keys[first - 1] if first else None
        slots = fetching.fetch(parts, remote, before, message.keys[first:end], theirs, deadline, readings)
        waiting.slots += slots
        if len(slots) < len(places):
            waiting.is_cut = True
            return


def _fetch_under_way(parts: Parts, remote: Remote, message: MatchPrefix, ready: int, end: int) -> Batch | None:
    """The first fetch that blocks ``ready`` to ``end`` wait for; None too where none of them is of use."""
    if end <= max(ready, message.local):
        return None
    state, find, fetch_of = parts.slots.state, parts.index.find, remote.fetch_of
    for key in message.keys[ready:end]:
        slot = find(key)
        if state[slot] == _FILLING and slot in fetch_of:
            return fetch_of[slot]
    return None


def _go_on(parts: Parts, remote: Remote, waiting: Waiting) -> Slices[None]:
    """Wait for the first fetch that this match still waits for, with what came so far leased as well; or answer it."""
    message = waiting.message
    ready, end = _lengths(parts, message)
    fetch = _fetch_under_way(parts, remote, message, ready, end)
    if fetch is None or not _lease_whole(parts, message, ready):
        yield from _answer(parts, remote, waiting)
    else:
        _wait_for(remote, waiting, fetch)


def _wait_for(remote: Remote, waiting: Waiting, fetch: Batch) -> None:
    waiting.fetch = fetch
    remote.waiters.setdefault(fetch, []).append(waiting)


def _answer(parts: Parts, remote: Remote, waiting: Waiting) -> Slices[None]:
    message, counts = waiting.message, remote.counts
    remote.give_up(message.request)
    likely = np.array(waiting.slots, dtype=np.intp) if len(waiting.slots) == len(message.keys) else None
    hit = yield from matching.answer(parts, message, remote.now, is_cut=waiting.is_cut, likely=likely)
    gained = len(hit.slots) - waiting.ready
    if gained > 0:
        counts.hits += 1
        counts.hit_blocks += gained
        counts.hit_tokens += _useful(message, waiting.ready, len(hit.slots))
    remote.effects.append(ToScheduler(hit))
