"""L1Core with nodes against a plain model: they answer late, in any order, not at all until the end, or leave transfers unsettled; they
come, go, and are restarted empty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule
from tests.properties.test_l1_machine import CAPACITY, REQUESTS, L1Machine, path_keys, paths, run_machine

from kvoffload.l1 import RemoteConfig, State, ToPrefetcher, ToRank, ToScheduler, ToWriter
from kvoffload.l2.ring import NodeAddress, RendezvousRing
from kvoffload.messages import (
    BlockKey,
    BlocksFound,
    DropReason,
    FetchBlocks,
    FetchFinished,
    FindBlocks,
    HitReason,
    LoadOutcome,
    MatchPrefix,
    Node,
    NodeBack,
    NodesChanged,
    ParentMissing,
    PrefixHit,
    StartLoad,
    TransfersSettled,
    WriteBlocks,
    WriteFinished,
)

LONG = path_keys((0, 1, 0, 1, 0, 1))

RARELY = [1] * 60 + [0]


@dataclass
class Asked:
    """A match that was not answered yet."""

    sequence: int
    keys: tuple[BlockKey, ...]
    deadline: float


class RemoteMachine(L1Machine):
    """The model adds: questions, fetches and writes that nodes have not reported; what they may still touch; and who is owed an answer."""

    remote_config = RemoteConfig(min_tokens=1, retry_after_s=0.02, write_queue_blocks=5, fetch_grace_s=0.1)

    def set_up(self) -> None:
        self.finds: dict[int, tuple[Node, FindBlocks]] = {}
        self.fetches: dict[int, tuple[Node, FetchBlocks]] = {}
        self.writes: dict[int, tuple[Node, WriteBlocks]] = {}
        self.late_writers: dict[int, tuple[Node, set[int]]] = {}  # fetches that are not settled: these slots may change any time
        self.late_readers: dict[int, tuple[Node, dict[int, BlockKey]]] = {}  # writes that are not settled
        self.asked: dict[str, Asked] = {}
        self.answered: set[tuple[str, int]] = set()
        self.was_reset = False
        self.on_nodes: dict[Node, set[BlockKey]] = {}
        """What was written to a node, or came from it, since it was last empty."""
        self.ring: RendezvousRing
        self.change_nodes(2)

    def send(self, message: Any) -> list[Any]:
        self.now += 0.001
        return self.sort(self.all_of(self.core.handle(message, self.now)))

    def sort(self, effects: list[Any]) -> list[Any]:
        """Note what goes to nodes and which matches are answered; the rest is for the rule."""
        rest: list[Any] = []
        for effect in effects:
            if isinstance(effect, ToPrefetcher | ToWriter):
                assert not self.lost
                assert not self.was_reset
                self.note(effect.node, effect.message)
            elif isinstance(effect, ToScheduler) and isinstance(effect.message, PrefixHit):
                self.got_hit(effect.message)
            else:
                if isinstance(effect, ToRank):
                    assert not self.touched() & set(effect.message.slots), "granted, and a node may still touch it"
                rest.append(effect.message if isinstance(effect, ToScheduler) else effect)
        return rest

    def note(self, node: Node, message: FindBlocks | FetchBlocks | WriteBlocks) -> None:
        assert message.keys
        if isinstance(message, FindBlocks):
            self.finds[message.batch] = node, message
        elif isinstance(message, FetchBlocks):
            assert not self.touched() & set(message.slots), "reserved, and a node may still touch it"
            assert not {slot for grant in self.writing.values() for slot in grant.slots} & set(message.slots)
            assert not {slot for held in self.reading.values() for slot, _ in held} & set(message.slots)
            assert not {slot for hit, _ in self.hits.values() for slot in hit.slots} & set(message.slots)
            self.fetches[message.batch] = node, message
            self.fill(message.slots, None)
        else:
            for rank in range(self.ranks):
                assert all(self.bytes[rank, slot] == key for slot, key in zip(message.slots, message.keys, strict=True))
            assert not {slot for _, other in self.writes.values() for slot in other.slots} & set(message.slots), "written twice at once"
            self.writes[message.batch] = node, message

    def fill(self, slots: tuple[int, ...], keys: tuple[BlockKey, ...] | None) -> None:
        for at, slot in enumerate(slots):
            for rank in range(self.ranks):
                self.bytes[rank, slot] = keys[at] if keys is not None else None

    def touched(self) -> set[int]:
        """The slots that a node may read or write."""
        slots = {slot for _, fetch in self.fetches.values() for slot in fetch.slots}
        slots |= {slot for _, write in self.writes.values() for slot in write.slots}
        for _, late in (*self.late_writers.values(), *self.late_readers.values()):
            slots |= set(late)
        return slots

    def got_hit(self, hit: PrefixHit) -> None:
        asked = self.asked.pop(hit.request)
        assert asked.sequence == hit.sequence, "an answer to an older question"
        assert (hit.request, hit.sequence) not in self.answered, "a second answer"
        self.answered.add((hit.request, hit.sequence))
        assert hit.generation == self.generation
        if self.lost:
            assert (hit.reason, hit.slots) == (HitReason.OFF, ())
            return
        indexed, ready = self.indexed()
        whole = next((at for at, key in enumerate(asked.keys) if key not in ready), len(asked.keys))
        assert hit.pending == next((at for at, key in enumerate(asked.keys) if key not in indexed), len(asked.keys)) - whole
        assert hit.slots == tuple(ready[key] for key in asked.keys[: len(hit.slots)])
        if hit.reason != HitReason.NO_ROOM:
            assert len(hit.slots) == whole
            assert hit.reason == (HitReason.HIT if whole else HitReason.MISS)
        if hit.slots:
            self.hits[hit.request] = hit, asked.keys

    # ------------------------------------------------------------ what may happen besides

    @rule(request=st.sampled_from(REQUESTS), keys=paths | st.just(LONG), wait_ms=st.integers(0, 60), local=st.sampled_from([0, 0, 2]))
    def match(self, request: str, keys: tuple[BlockKey, ...], wait_ms: int = 30, local: int = 0) -> None:
        self.sequence += 1
        self.hits.pop(request, None)
        self.asked[request] = Asked(self.sequence, keys, self.now + wait_ms / 1000)
        message = MatchPrefix(request, self.sequence, keys, self.asked[request].deadline, local, 0.0, 1)
        assert not self.send(message)

    @rule(request=st.sampled_from(REQUESTS), keys=paths | st.just(LONG), wait_ms=st.integers(10, 1000))
    def match_and_find(self, request: str, keys: tuple[BlockKey, ...], wait_ms: int) -> None:
        """Nodes that have everything: left to chance alone, hardly anything would be fetched."""
        self.match(request, keys, wait_ms)
        for batch in sorted(self.finds):
            self.finish_find(batch, [True] * 9)

    @precondition(lambda self: self.fetches)
    @rule()
    def finish_fetches(self) -> None:
        for batch in sorted(self.fetches):
            self.finish_fetch(batch, ["fetched"] * 9)

    @precondition(lambda self: self.finds)
    @rule(data=st.data(), found=st.lists(st.sampled_from([True, True, True, False]), min_size=9, max_size=9), is_dead=st.booleans())
    def answer_find(self, data: st.DataObject, found: list[bool], is_dead: bool) -> None:
        batch = data.draw(st.sampled_from(sorted(self.finds)))
        self.finish_find(batch, [] if is_dead and not found[0] else found)

    def finish_find(self, batch: int, found: list[bool]) -> None:
        node, find = self.finds.pop(batch)
        if found and self.core._catching_up.has_asked(batch):  # type: ignore[union-attr]
            found = [key in self.has(node) for key in find.keys]
        assert not self.send(BlocksFound(batch, node, tuple(found[: len(find.keys)])))

    @precondition(lambda self: self.fetches)
    @rule(
        data=st.data(),
        ends=st.lists(st.sampled_from(["fetched", "fetched", "fetched", "absent", "failed", "unsettled"]), min_size=9, max_size=9),
    )
    def report_fetch(self, data: st.DataObject, ends: list[str]) -> None:
        self.finish_fetch(data.draw(st.sampled_from(sorted(self.fetches))), ends)

    def finish_fetch(self, batch: int, ends: list[str]) -> None:
        node, fetch = self.fetches.pop(batch)
        by_end: dict[str, list[int]] = {"fetched": [], "absent": [], "failed": [], "unsettled": []}
        for slot, key, end in zip(fetch.slots, fetch.keys, ends, strict=False):
            by_end[end].append(slot)
            self.fill((slot,), (key,) if end == "fetched" else None)
            if end == "fetched":
                self.has(node).add(key)
        if by_end["unsettled"]:
            self.late_writers[batch] = node, set(by_end["unsettled"])
        fetched, absent, failed, unsettled = (tuple(slots) for slots in by_end.values())
        told = self.send(FetchFinished(batch, node, fetched, absent, failed, unsettled, 0.01))
        assert len(told) <= 1
        assert all(isinstance(effect, ParentMissing) and effect.requests for effect in told)  # who computed what did not come

    @precondition(lambda self: self.writes)
    @rule(data=st.data(), ends=st.lists(st.sampled_from(["stored", "stored", "failed", "unsettled"]), min_size=9, max_size=9))
    def report_write(self, data: st.DataObject, ends: list[str]) -> None:
        self.finish_write(data.draw(st.sampled_from(sorted(self.writes))), ends)

    def finish_write(self, batch: int, ends: list[str]) -> None:
        node, write = self.writes.pop(batch)
        self.has(node).update(key for key, end in zip(write.keys, ends, strict=False) if end == "stored")
        told = {kind: tuple(slot for slot, end in zip(write.slots, ends, strict=False) if end == kind) for kind in set(ends)}
        late = {slot: key for slot, key in zip(write.slots, write.keys, strict=True) if slot in told.get("unsettled", ())}
        if late:
            self.late_readers[batch] = node, late
        assert not self.send(WriteFinished(batch, node, told.get("stored", ()), told.get("failed", ()), told.get("unsettled", ())))

    @precondition(lambda self: self.writes)
    @rule()
    def finish_writes(self) -> None:
        for batch in sorted(self.writes):
            self.finish_write(batch, ["stored"] * 9)

    @rule(keys=paths, writes_first=st.booleans())
    def fail_a_load(self, keys: tuple[BlockKey, ...], writes_first: bool) -> None:
        """Of what was just saved, and is being written: the two ends of its slots come in either order."""
        self.save(keys, keys)
        self.match(REQUESTS[0], keys, 0)
        if REQUESTS[0] not in self.hits:
            return
        hit, keys = self.hits.pop(REQUESTS[0])
        self.job += 1
        assert not self.send(StartLoad(self.job, hit.request, hit.sequence, 0, len(hit.slots)))
        loads = [(self.job, rank) for rank in range(self.ranks)]
        for which in loads:
            self.reading[which] = tuple(zip(hit.slots, keys, strict=False))
        self.finish_load(loads[0], LoadOutcome.FAILED)
        self.everything_holds()
        if writes_first:
            for batch in sorted(self.writes):
                self.finish_write(batch, ["stored"] * 9)
            self.everything_holds()
        for which in loads[1:]:
            self.finish_load(which, LoadOutcome.LOADED)

    @precondition(lambda self: self.late_writers or self.late_readers)
    @rule(data=st.data(), at_once=st.booleans())
    def settle(self, data: st.DataObject, at_once: bool) -> None:
        batch = data.draw(st.sampled_from(sorted({*self.late_writers, *self.late_readers})))
        self.settle_batch(batch, at_once)

    def settle_batch(self, batch: int, at_once: bool) -> None:
        writer = self.late_writers.get(batch)
        if writer is not None:
            node, slots = writer
            settled = sorted(slots)[: None if at_once else 1]
            slots.difference_update(settled)
            if not slots:
                del self.late_writers[batch]
        else:
            node, read = self.late_readers[batch]
            settled = sorted(read)[: None if at_once else 1]
            for slot in settled:
                del read[slot]
            if not read:
                del self.late_readers[batch]
        assert not self.send(TransfersSettled(batch, node, tuple(settled)))

    @rule(ms=st.integers(1, 80))
    def time_passes(self, ms: int) -> None:
        self.now += ms / 1000
        deadline = self.core.next_deadline()
        first = min((asked.deadline for asked in self.asked.values()), default=None)
        assert self.core._parts.remote.next_deadline() == first  # type: ignore[union-attr]
        assert first is None or (deadline is not None and deadline <= first)
        assert not self.sort(self.all_of(self.core.tick(self.now)))
        assert all(asked.deadline > self.now for asked in self.asked.values()), "somebody waits beyond the deadline"

    @rule(count=st.sampled_from([3, 2, 1, 3, 2, 0]))
    def change_nodes(self, count: int) -> None:
        self.ring = RendezvousRing(self.sequence, [NodeAddress(f"n{number}", f"redis://n{number}") for number in range(count)])
        assert not self.send(NodesChanged(self.ring))

    @rule(number=st.integers(0, 2), is_empty=st.booleans())
    def bring_back(self, number: int, is_empty: bool) -> None:
        """A node that was away, and may have been restarted."""
        if is_empty:
            self.has(f"n{number}").clear()
        assert not self.send(NodeBack(f"n{number}"))

    def has(self, node: Node) -> set[BlockKey]:
        return self.on_nodes.setdefault(node, set())

    @rule(request=st.sampled_from(REQUESTS))
    def forget(self, request: str) -> None:
        self.asked.pop(request, None)
        super().forget(request)

    @rule(really=st.sampled_from(RARELY))
    def reset(self, really: int) -> None:
        """Rare: nothing is fetched or written after it."""
        if not really:
            self.was_reset = True
            self.asked.clear()
        super().reset(really)

    @rule(rank=st.integers(0, 2), really=st.sampled_from(RARELY))
    def lose_rank(self, rank: int, really: int) -> None:
        super().lose_rank(rank, really)

    # ------------------------------------------------------------ what must hold besides

    @invariant()
    def nodes_find_their_slots_as_they_left_them(self) -> None:
        if not hasattr(self, "core"):
            return
        state = self.core._parts.slots.state
        for _, slots in self.late_writers.values():
            assert all(state[slot] == State.QUARANTINED for slot in slots), "a late writer's slot is in use"
        being_read = [(slot, key) for _, write in self.writes.values() for slot, key in zip(write.slots, write.keys, strict=True)]
        being_read += [item for _, read in self.late_readers.values() for item in read.items()]
        for slot, key in being_read:
            assert all(self.bytes[rank, slot] == key for rank in range(self.ranks)), "overwritten while it was written to a node"
        remote = self.core.statistics().remote
        assert remote is not None
        assert remote.waiting == len(self.asked)
        assert remote.fetching + remote.writing == len(self.touched()) <= CAPACITY
        if self.remote_config.ingestion == "all" and not (self.lost or self.was_reset):
            counts = remote.totals
            offered = counts.offered - counts.offered_again
            assert offered + counts.write_dropped == self.core.statistics().committed, "a block was neither written nor dropped"

    def catch_up(self) -> None:
        """Nodes are well from now on: sooner or later all that L1 has is where it belongs, and nothing is left to be done."""
        for _ in range(2000):
            for batch in sorted(self.finds):
                self.finish_find(batch, [True] * 9)
            for batch in sorted(self.writes):
                self.finish_write(batch, ["stored"] * 9)
            while self.late_writers or self.late_readers:
                self.settle_batch(min({*self.late_writers, *self.late_readers}), at_once=True)
            self.everything_holds()
            due = self.core.next_deadline()
            if due is None:
                break
            self.now = max(self.now, due)
            self.sort(self.all_of(self.core.tick(self.now)))
        assert self.core.next_deadline() is None, "it never ends"
        if self.lost or self.was_reset or not self.keeps or self.remote_config.ingestion != "all":
            return
        _, ready = self.indexed()
        lacking = [key for key in ready if (node := self.ring.node_of(key)) is not None and key not in self.has(node)]
        assert not lacking, "L1 has these, and others will never find them"

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        for which in sorted(self.writing):
            self.finish_save(which, set())
        for batch in sorted(self.finds):
            self.finish_find(batch, [True] * 9)
        self.now += 10.0
        self.sort(self.all_of(self.core.tick(self.now)))
        assert not self.asked, "never answered"
        for batch in sorted(self.fetches):
            self.finish_fetch(batch, ["fetched"] * 9)
        while self.writes:
            self.finish_write(min(self.writes), ["stored"] * 9)
        self.catch_up()
        super().teardown()


class HotMachine(RemoteMachine):
    policy = "s3fifo"
    remote_config = RemoteConfig("hot", min_tokens=1, retry_after_s=0.02, max_writing_share=1.0, fetch_grace_s=0.1)


class EvictedMachine(RemoteMachine):
    remote_config = RemoteConfig("evicted", min_tokens=2, retry_after_s=0.02, fetch_grace_s=0.1)


class SlicedMachine(RemoteMachine):
    """Every block is a slice of its own, and what is done to many at once is done to few as well."""

    policy = "s3fifo"
    slice_blocks, many = 1, 1


class OnlyNodesMachine(RemoteMachine):
    """L1 keeps nothing: what nobody reads or writes any more is gone."""

    keeps = False
    remote_config = RemoteConfig("hot", min_tokens=1, retry_after_s=0.02, fetch_grace_s=0.1, max_writing_share=0.7)

    @invariant()
    def nothing_is_kept(self) -> None:
        if not hasattr(self, "core"):
            return
        statistics = self.core.statistics()
        needed = {slot for grant in self.writing.values() for slot in grant.slots} | self.touched()
        needed |= {slot for hit, _ in self.hits.values() for slot in hit.slots}
        needed |= {slot for held in self.reading.values() for slot, _ in held}
        if not (needed or self.asked):
            assert statistics.slots[State.FREE] == statistics.usable
        assert not statistics.drops.get(DropReason.PARENT_MISSING)
        if not (self.lost or self.was_reset):
            counts = self.core._parts.remote.counts  # type: ignore[union-attr]
            assert counts.offered - counts.offered_again + counts.write_dropped == statistics.committed, (
                "a block was neither written nor dropped"
            )


class SlicedOnlyNodesMachine(OnlyNodesMachine):
    policy = "s3fifo"
    slice_blocks, many = 1, 1


class AtOnceMachine(HotMachine):
    """What is done to many at once is done to few as well, and nothing is sliced."""

    many = 1


class AtOnceOnlyNodesMachine(OnlyNodesMachine):
    policy = "s3fifo"
    many = 1


MACHINES = {
    "all-lru": RemoteMachine,
    "hot-s3fifo": HotMachine,
    "evicted-lru": EvictedMachine,
    "sliced": SlicedMachine,
    "only-nodes": OnlyNodesMachine,
    "only-nodes-sliced": SlicedOnlyNodesMachine,
    "at-once": AtOnceMachine,
    "only-nodes-at-once": AtOnceOnlyNodesMachine,
}


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_random_histories(machine: type[RemoteMachine]) -> None:
    run_machine(machine)
