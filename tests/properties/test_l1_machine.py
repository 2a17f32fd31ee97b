"""L1Core against a plain model, under random messages of several jobs, requests and ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from kvoffload.l1 import TRANSITIONS, L1Config, L1Core, RemoteConfig, State, ToRank, ToScheduler
from kvoffload.l1.eviction import S3FIFO
from kvoffload.messages import (
    ROOT,
    BlockKey,
    BlocksFilled,
    DropReason,
    ForgetRequest,
    HitReason,
    LoadFinished,
    LoadOutcome,
    MatchPrefix,
    ParentMissing,
    PrefixHit,
    RankLost,
    ReleaseHit,
    ReserveSlots,
    ResetCache,
    SaveRun,
    SegmentGrown,
    StartLoad,
)

CAPACITY = 12
REQUESTS = ("a", "b", "c")


class TracedStates(bytearray):
    """The column of states, every single write to which is held against the table of transitions."""

    def __setitem__(self, at: Any, value: Any) -> None:
        before, after = ([self[at]], [value]) if isinstance(at, int) else (list(self[at]), list(value))
        for was, becomes in zip(before, after, strict=True):
            if was != becomes:
                assert State(becomes) in TRANSITIONS[State(was)], f"{State(was)!r} became {State(becomes)!r}"
        super().__setitem__(at, value)


@dataclass
class Grant:
    """What one rank still has to do for a job: it writes these slots until it reports."""

    slots: tuple[int, ...]
    keys: tuple[BlockKey, ...]


def path_keys(path: tuple[int, ...]) -> tuple[BlockKey, ...]:
    """The chain of keys for a path in a tree: equal prefixes have equal keys."""
    return tuple(bytes([17 * step + 1 for step in path[: depth + 1]]).ljust(24, b"\0") for depth in range(len(path)))


paths = st.lists(st.integers(0, 1), min_size=1, max_size=6).map(lambda path: path_keys(tuple(path)))


class L1Machine(RuleBasedStateMachine):
    """The model knows, per slot and rank, whose bytes are there; what L1 calls READY must hold the right ones on every rank."""

    policy = "lru"
    remote_config: RemoteConfig | None = None
    slice_blocks, many, keeps = 512, 32, True

    def set_up(self) -> None:
        """What a machine with more to it has to do at the start."""

    @initialize(ranks=st.integers(1, 3), share=st.sampled_from([0.5, 1.0]))
    def start(self, ranks: int, share: float) -> None:
        self.ranks = ranks
        config = L1Config(ranks=ranks, policy=self.policy, max_waiting_share=share, slice_blocks=self.slice_blocks, keeps=self.keeps)  # type: ignore[arg-type]
        self.core = L1Core(config, CAPACITY, self.remote_config)
        self.core._parts.many = self.core._parts.leases.many = self.many
        if isinstance(self.core._parts.policy, S3FIFO):
            self.core._parts.policy.many = self.many
        table = self.core._parts.slots
        table.state = TracedStates(table.state)
        self.grown = [0] * ranks
        self.bytes: dict[tuple[int, int], BlockKey | None] = {}  # (rank, slot) -> whose bytes are there
        self.writing: dict[tuple[int, int], Grant] = {}  # (job, rank)
        self.reading: dict[tuple[int, int], tuple[tuple[int, BlockKey], ...]] = {}  # (job, rank) -> what must stay as it is
        self.load_failed: dict[int, tuple[BlockKey, ...]] = {}
        self.hits: dict[str, tuple[PrefixHit, tuple[BlockKey, ...]]] = {}
        self.lost: set[int] = set()
        self.gone: set[int] = set()
        self.job = self.sequence = self.generation = 0
        self.now = 0.0
        self.set_up()
        for rank in range(ranks):
            self.grow(rank, 6)

    def send(self, message: Any) -> list[Any]:
        self.now += 0.001
        return [
            effect.message if isinstance(effect, ToScheduler) else effect for effect in self.all_of(self.core.handle(message, self.now))
        ]

    def all_of(self, effects: list[Any]) -> list[Any]:
        """And of all slices that follow."""
        while self.core.has_work:
            effects += self.core.go_on(self.now)
        return effects

    # ------------------------------------------------------------ what may happen

    @rule(rank=st.integers(0, 2), slots=st.integers(0, CAPACITY))
    def grow(self, rank: int, slots: int) -> None:
        rank %= self.ranks
        self.grown[rank] = max(self.grown[rank], slots)
        assert not self.send(SegmentGrown(rank, slots))
        assert self.core.statistics().usable == min(self.grown)

    @rule(chains=st.lists(st.tuples(st.sampled_from(REQUESTS), paths, st.integers(0, 3)), min_size=1, max_size=3))
    def reserve(self, chains: list[tuple[str, tuple[BlockKey, ...], int]]) -> None:
        runs = []
        for request, keys, start in chains:
            start = min(start, len(keys) - 1)
            ids = tuple(range(start, len(keys)))
            runs.append(SaveRun(request, keys[start - 1] if start else ROOT, keys[start:], ids, tuple(100 + i for i in ids)))
        self.job += 1
        before = self.core.statistics()
        effects = self.send(ReserveSlots(self.job, tuple(runs)))
        grants = [effect for effect in effects if isinstance(effect, ToRank)]
        assert [grant.rank for grant in grants] == [rank for rank in range(self.ranks) if rank not in self.lost]
        grant = grants[0].message if grants else None
        assert all(other.message == grant for other in grants)
        missing = [effect for effect in effects if isinstance(effect, ParentMissing)]
        assert len(missing) <= 1
        after = self.core.statistics()
        dropped = sum(after.drops.values()) - sum(before.drops.values())
        offered = sum(len(run.keys) for run in runs)
        granted = len(grant.slots) if grant else 0
        assert after.offered - before.offered == offered == (after.shared - before.shared) + dropped + granted
        told = after.drops.get(DropReason.PARENT_MISSING, 0) - before.drops.get(DropReason.PARENT_MISSING, 0)
        assert bool(told) == bool(missing)
        if missing:
            assert set(missing[0].requests) <= {run.request for run in runs}
            assert len(set(missing[0].requests)) == len(missing[0].requests)
        if grant is None or not grant.slots:
            return
        assert len(set(grant.slots)) == len(grant.slots)
        assert all(slot < min(self.grown) for slot in grant.slots)
        granted_keys = tuple(self.core._parts.slots.keys[slot] for slot in grant.slots)
        wanted = {(key, block, epoch) for run in runs for key, block, epoch in zip(run.keys, run.blocks, run.epochs, strict=True)}
        assert set(zip(granted_keys, grant.blocks, grant.epochs, strict=True)) <= wanted
        for rank in range(self.ranks):
            for slot in grant.slots:
                # Nobody else may be writing a granted slot, nor reading it.
                assert not any(slot in other.slots for (_, writer), other in self.writing.items() if writer == rank)
                assert not any(slot == read for (_, reader), held in self.reading.items() if reader == rank for read, _ in held)
                self.bytes[rank, slot] = None
            self.writing[self.job, rank] = Grant(grant.slots, granted_keys)
        for hit, _ in self.hits.values():
            assert not set(grant.slots) & set(hit.slots), "a leased slot was granted"

    @rule(keys=paths, more=paths)
    def save(self, keys: tuple[BlockKey, ...], more: tuple[BlockKey, ...]) -> None:
        """Two prompts from grant to commit: left to chance alone, hardly anything would be READY and the cache never full."""
        for chain in (keys, more):
            self.reserve([(REQUESTS[0], chain, 0)])
            for which in [which for which in sorted(self.writing) if which[0] == self.job]:
                self.finish_save(which, set())
            self.everything_holds()

    @precondition(lambda self: self.writing)
    @rule(data=st.data(), fails=st.sets(st.integers(0, 17), max_size=3), all_fail=st.booleans())
    def report_save(self, data: st.DataObject, fails: set[int], all_fail: bool) -> None:
        self.finish_save(data.draw(st.sampled_from(sorted(self.writing))), fails, all_fail and len(fails) == 1)

    def finish_save(self, which: tuple[int, int], fails: set[int], all_fail: bool = False) -> None:
        job, rank = which
        grant = self.writing.pop(which)
        failed = tuple(slot for at, slot in enumerate(grant.slots) if at in fails or all_fail)
        filled = tuple(slot for slot in grant.slots if slot not in failed)
        for slot, key in zip(grant.slots, grant.keys, strict=True):
            self.bytes[rank, slot] = None if slot in failed else key
        assert not self.send(BlocksFilled(job, rank, filled, failed, DropReason.OVERWRITTEN if failed else None))

    @rule(request=st.sampled_from(REQUESTS), data=st.data())
    def match_something(self, request: str, data: st.DataObject) -> None:
        """A prefix that is READY, most of it."""
        _, ready = self.indexed()
        if ready:
            key = data.draw(st.sampled_from(sorted(ready)))
            steps = key.rstrip(b"\0")
            self.match(request, tuple(steps[: depth + 1].ljust(24, b"\0") for depth in range(len(steps))))

    @rule(request=st.sampled_from(REQUESTS), keys=paths)
    def match(self, request: str, keys: tuple[BlockKey, ...]) -> None:
        self.sequence += 1
        self.hits.pop(request, None)
        indexed, ready = self.indexed()
        expected = next((at for at, key in enumerate(keys) if key not in ready), len(keys))
        pending = next((at for at, key in enumerate(keys) if key not in indexed), len(keys)) - expected
        (hit,) = self.send(MatchPrefix(request, self.sequence, keys, self.now + 1))
        assert (hit.request, hit.sequence, hit.generation) == (request, self.sequence, self.generation)
        if self.lost:
            assert (hit.reason, hit.slots) == (HitReason.OFF, ())
            return
        assert hit.pending == pending
        if hit.slots:
            assert hit.slots == tuple(ready[key] for key in keys[: len(hit.slots)])
            is_whole = len(hit.slots) == expected
            assert hit.reason == (HitReason.HIT if is_whole else HitReason.NO_ROOM)
            assert hit.expires > self.now
            self.hits[request] = hit, keys
            for rank in range(self.ranks):
                for slot, key in zip(hit.slots, keys, strict=False):
                    assert self.bytes[rank, slot] == key, "a hit on bytes of another block"
        else:
            assert not hit.slots
            assert hit.reason == (HitReason.NO_ROOM if expected else HitReason.MISS)

    @precondition(lambda self: self.hits)
    @rule(data=st.data())
    def start_load(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.hits)))
        hit, keys = self.hits.pop(request)
        first = data.draw(st.integers(0, len(hit.slots) - 1))
        count = data.draw(st.integers(0, len(hit.slots) - first))
        self.job += 1
        assert not self.send(StartLoad(self.job, request, hit.sequence, first, count))
        if count:
            held = tuple(zip(hit.slots[first : first + count], keys[first : first + count], strict=True))
            for rank in range(self.ranks):
                self.reading[self.job, rank] = held

    @rule(request=st.sampled_from(REQUESTS))
    def start_stale_load(self, request: str) -> None:
        """Of a hit that L1 does not hold any more: harmless, and reported by every rank like any other."""
        self.job += 1
        assert not self.send(StartLoad(self.job, request, 0, 0, 2))
        for rank in range(self.ranks):
            self.reading[self.job, rank] = ()

    @precondition(lambda self: self.reading)
    @rule(data=st.data(), outcome=st.sampled_from(LoadOutcome))
    def report_load(self, data: st.DataObject, outcome: LoadOutcome) -> None:
        self.finish_load(data.draw(st.sampled_from(sorted(self.reading))), outcome)

    def finish_load(self, which: tuple[int, int], outcome: LoadOutcome) -> None:
        job, rank = which
        held = self.reading[which]
        for slot, key in held:
            assert self.bytes[rank, slot] == key, "a slot was overwritten while it was read"
        del self.reading[which]
        first_failure = outcome == LoadOutcome.FAILED and job not in self.load_failed
        if first_failure:
            self.load_failed[job] = tuple(key for _, key in held)
        assert not self.send(LoadFinished(job, rank, outcome))
        if first_failure and held:
            indexed, _ = self.indexed()
            slots = dict(held)
            assert not any(slot in slots and slots[slot] == key for key, slot in indexed.items()), "what failed is still offered"

    @rule(request=st.sampled_from(REQUESTS), stale=st.booleans())
    def release(self, request: str, stale: bool) -> None:
        held = self.hits.get(request)
        assert not self.send(ReleaseHit(request, held[0].sequence - (1 if stale else 0) if held else 0))
        if not stale:
            self.hits.pop(request, None)

    @rule(request=st.sampled_from(REQUESTS))
    def forget(self, request: str) -> None:
        self.hits.pop(request, None)
        assert not self.send(ForgetRequest(request))

    @rule(really=st.integers(0, 2))
    def reset(self, really: int) -> None:
        if really:
            return  # rare, or little would ever be READY
        self.generation += 1
        self.hits.clear()
        assert not self.send(ResetCache(self.generation))
        assert not self.indexed()[0]

    @rule(rank=st.integers(0, 2), really=st.integers(0, 19))
    def lose_rank(self, rank: int, really: int) -> None:
        if really:
            return
        self.lost.add(rank % self.ranks)
        assert not self.send(RankLost(rank % self.ranks, "test"))

    @precondition(lambda self: self.lost - self.gone)
    @rule()
    def rank_gone(self) -> None:
        rank = min(self.lost - self.gone)
        self.gone.add(rank)
        self.core.rank_gone(rank)
        for table in (self.writing, self.reading):
            for which in [which for which in table if which[1] == rank]:
                del table[which]

    # ------------------------------------------------------------ what must hold

    def keys_by_slot(self) -> dict[int, BlockKey]:
        return {slot: key for shard in self.core._parts.index.shards for key, slot in shard.items()}

    def indexed(self) -> tuple[dict[BlockKey, int], dict[BlockKey, int]]:
        """All keys in the index, and the READY ones, with their slots."""
        state = self.core._parts.slots.state
        indexed = {key: slot for slot, key in self.keys_by_slot().items()}
        return indexed, {key: slot for key, slot in indexed.items() if state[slot] == State.READY}

    @invariant()
    def everything_holds(self) -> None:
        if not hasattr(self, "core"):
            return
        self.core.check()
        _, ready = self.indexed()
        for key, slot in ready.items():
            for rank in range(self.ranks):
                assert self.bytes[rank, slot] == key, "READY, and the bytes are another's"
        for hit, keys in self.hits.values():
            for slot, key in zip(hit.slots, keys, strict=False):
                assert all(self.bytes[rank, slot] == key for rank in range(self.ranks)), "a leased slot was overwritten"

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        for which in sorted(self.writing):
            self.finish_save(which, set())
        for which in sorted(self.reading):
            self.finish_load(which, LoadOutcome.LOADED)
        for request in REQUESTS:
            self.send(ForgetRequest(request))
        self.core.check()
        slots = self.core.statistics().slots
        assert slots[State.FREE] + slots[State.READY] == min(self.grown), f"leaked: {slots}"
        assert not self.core.open_jobs()
        self.send(ResetCache(self.generation + 1))
        self.core.check()
        assert self.core.statistics().slots[State.FREE] == min(self.grown)


class S3FIFOMachine(L1Machine):
    policy = "s3fifo"


@pytest.mark.parametrize("machine", [L1Machine, S3FIFOMachine], ids=["lru", "s3fifo"])
def test_random_histories(machine: type[L1Machine]) -> None:
    run_machine(machine)


def run_machine(machine: type[L1Machine], examples: int = 50) -> None:
    """Random histories of so many examples."""
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=examples, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)),
    )
