from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.copy.rigs import WAIT_S, Rig, ids

from kvoffload.copy.engine import Ids
from kvoffload.copy.hands import CopyFact, CopyHands, HandsConfig, HandsCrashed, LoadState
from kvoffload.errors import EngineLost
from kvoffload.messages import BlocksFilled, DropReason, LoadBlocks, LoadEnded, LoadOutcome, SaveBlocks, SlotGrant
from kvoffload.testing.copy_faults import FaultyCopyEngine, InjectedCrash

CONFIG = HandsConfig(rank=3, max_loads=4, max_saves=4, pair_timeout_s=5.0, load_first_s=0.01)


@dataclass
class Bench:
    """Hands on a faulty engine, and what they said to either side."""

    config: HandsConfig = CONFIG
    now: float = 0.0
    ended: list[LoadEnded] = field(default_factory=list)
    facts: list[CopyFact] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rig = Rig.make(blocks=16, slots=16)
        self.engine = FaultyCopyEngine(self.rig.engine)
        self.hands = CopyHands(self.engine, self.ended.append, self.facts.append, self.config, lambda: self.now)

    def close(self) -> None:
        self.engine.release()
        assert self.hands.close(WAIT_S)
        self.rig.close()

    def idle(self) -> None:
        assert self.hands.wait_idle(WAIT_S)

    def filled(self) -> list[BlocksFilled]:
        return [fact for fact in self.facts if isinstance(fact, BlocksFilled)]

    def outcomes(self) -> dict[int, LoadOutcome]:
        """Of every load; both sides were told the same, once each."""
        told = [fact for fact in self.facts if isinstance(fact, LoadEnded)]
        assert sorted(told, key=lambda fact: fact.job) == sorted(self.ended, key=lambda fact: fact.job)
        assert len({fact.job for fact in told}) == len(told)
        return {fact.job: fact.outcome for fact in told}


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    made.hands.start()
    yield made
    made.close()


def grant(job: int, slots: tuple[int, ...] = (1,), blocks: tuple[int, ...] | None = None) -> SlotGrant:
    return SlotGrant(job, slots, slots if blocks is None else blocks, (0,) * len(slots))


def load(job: int, slots: tuple[int, ...] = (1,), blocks: tuple[int, ...] = (9,)) -> LoadBlocks:
    return LoadBlocks(job, f"request {job}", slots, blocks, None)


# ---------------------------------------------------------------- loads


def test_a_load_copies_and_is_told_once(bench: Bench) -> None:
    bench.rig.engine.save(ids(4, 5), ids(0, 1), ids(0, 0), None)
    job = bench.hands.load(load(1, (0, 1), (9, 8)))
    bench.idle()
    assert bench.rig.block(9) == bench.rig.block(4)
    assert bench.rig.block(8) == bench.rig.block(5)
    assert bench.ended == [LoadEnded(1, "request 1", LoadOutcome.LOADED, (9, 8))]
    assert bench.outcomes() == {1: LoadOutcome.LOADED}
    assert job.state is LoadState.ENDED
    assert not job.withdraw()
    assert bench.hands.live_loads() == []


def test_a_job_is_one_call_whatever_its_size(bench: Bench) -> None:
    bench.hands.load(load(1, tuple(range(16)), tuple(range(16))))
    bench.idle()
    assert [(call.kind, len(call.blocks)) for call in bench.engine.calls] == [("load", 16)]


def test_what_has_not_started_can_be_withdrawn(bench: Bench) -> None:
    bench.engine.hold_loads()
    first, second = bench.hands.load(load(1)), bench.hands.load(load(2))
    assert bench.engine.wait_held("load")
    assert first.state is LoadState.STARTED
    assert second.state is LoadState.QUEUED
    assert bench.hands.live_loads() == [1, 2]
    assert not first.withdraw()
    assert second.withdraw()
    assert not second.withdraw()
    assert bench.ended == [LoadEnded(2, "request 2", LoadOutcome.WITHDRAWN, (9,))]  # told when withdraw returned
    assert not bench.hands.wait_idle(0)
    bench.engine.release()
    bench.idle()
    assert bench.outcomes() == {1: LoadOutcome.LOADED, 2: LoadOutcome.WITHDRAWN}
    assert len(bench.engine.calls) == 1


def test_a_load_without_room_is_withdrawn_at_once(bench: Bench) -> None:
    bench.engine.hold_loads()
    for number in range(6):
        bench.hands.load(load(number))
    assert sorted(bench.outcomes()) == [4, 5]
    bench.engine.release()
    bench.idle()
    assert [bench.outcomes()[number].name for number in range(6)] == ["LOADED"] * 4 + ["WITHDRAWN"] * 2


def test_a_failed_load_is_told_and_the_next_one_works(bench: Bench) -> None:
    bench.engine.fail_next(1, "load")
    bench.hands.load(load(1))
    bench.hands.load(load(2, (1, 2), (9,)))  # malformed: the engine refuses it
    bench.hands.load(load(3))
    bench.idle()
    assert [bench.outcomes()[number].name for number in (1, 2, 3)] == ["FAILED", "FAILED", "LOADED"]
    assert bench.hands.crashed is None


def test_withdraw_and_start_never_both_happen() -> None:
    config = replace(CONFIG, max_loads=10_000)
    bench = Bench(config)
    bench.hands.start()
    withdrawn = []
    for number in range(500):
        job = bench.hands.load(load(number))
        if job.withdraw():
            withdrawn.append(number)
    bench.idle()
    outcomes = bench.outcomes()
    assert len(outcomes) == 500
    assert [number for number, outcome in outcomes.items() if outcome is LoadOutcome.WITHDRAWN] == withdrawn
    assert len(bench.engine.calls) == 500 - len(withdrawn)
    bench.close()


# ---------------------------------------------------------------- saves


def test_a_save_needs_both_halves(bench: Bench) -> None:
    bench.hands.granted(grant(1, (2, 3), (5, 6)))
    assert bench.hands.wait_idle(0)
    assert bench.engine.calls == []
    assert bench.hands.saved(SaveBlocks(1, None))
    bench.idle()
    assert bench.facts == [BlocksFilled(1, 3, (2, 3), ())]
    assert bench.rig.slot(3) == bench.rig.block(6)

    assert bench.hands.saved(SaveBlocks(2, None))
    bench.hands.granted(grant(2, (4,)))
    bench.idle()
    assert bench.filled()[-1] == BlocksFilled(2, 3, (4,), ())


def test_an_overwritten_block_is_failed(bench: Bench) -> None:
    bench.rig.ledger.bump([6])
    bench.hands.saved(SaveBlocks(1, None))
    bench.hands.granted(grant(1, (2, 3, 4), (5, 6, 7)))
    bench.idle()
    assert bench.facts == [BlocksFilled(1, 3, (2, 4), (3,), DropReason.OVERWRITTEN)]


def test_an_empty_grant_is_paired_and_forgotten(bench: Bench) -> None:
    bench.hands.granted(grant(1, ()))
    bench.hands.saved(SaveBlocks(1, None))
    bench.hands.saved(SaveBlocks(2, None))
    bench.hands.granted(grant(2, ()))
    bench.idle()
    assert bench.facts == []
    assert bench.hands.next_expiry() is None


def test_a_lonely_grant_expires_and_its_late_half_does_nothing(bench: Bench) -> None:
    bench.hands.granted(grant(1, (2, 3)))
    bench.hands.granted(grant(2, ()))
    assert bench.hands.next_expiry() == 5.0
    bench.now = 5.0
    assert [late.job for late in bench.hands.expire(5.0)] == [1, 2]
    assert bench.facts == [BlocksFilled(1, 3, (), (2, 3), DropReason.UNPAIRED)]
    assert bench.hands.saved(SaveBlocks(1, None))
    assert bench.hands.expire(100.0) == []
    assert bench.engine.calls == []


def test_a_late_grant_is_reported_failed_at_once(bench: Bench) -> None:
    bench.hands.saved(SaveBlocks(1, None))
    bench.hands.expire(6.0)
    bench.hands.granted(grant(1, (2,)))
    assert bench.facts == [BlocksFilled(1, 3, (), (2,), DropReason.UNPAIRED)]


def test_refused_halves_fail_their_grants(bench: Bench) -> None:
    bench.hands.granted(grant(9, (8,)))
    for number in range(4):
        assert bench.hands.saved(SaveBlocks(number, None))
    assert not bench.hands.saved(SaveBlocks(9, None))
    assert not bench.hands.saved(SaveBlocks(10, None))
    bench.hands.granted(grant(10, (7,)))
    assert bench.filled() == [
        BlocksFilled(9, 3, (), (8,), DropReason.UNPAIRED),
        BlocksFilled(10, 3, (), (7,), DropReason.UNPAIRED),
    ]
    assert bench.hands.statistics.refused == 2


def test_pairs_that_wait_for_the_thread_are_bounded_too(bench: Bench) -> None:
    bench.engine.hold_saves()
    accepted = []
    for number in range(8):
        bench.hands.granted(grant(number, (number,)))
        accepted.append(bench.hands.saved(SaveBlocks(number, None)))
        assert bench.engine.wait_held("save")
    assert accepted == [True] * 5 + [False] * 3  # one is being copied
    bench.engine.release()
    bench.idle()
    assert [fact.job for fact in bench.filled() if fact.filled] == [0, 1, 2, 3, 4]
    assert [fact.job for fact in bench.filled() if fact.failed] == [5, 6, 7]


def test_a_failed_save_is_told_and_the_next_one_works(bench: Bench) -> None:
    bench.engine.fail_next(1, "save")
    for number in (1, 2):
        bench.hands.saved(SaveBlocks(number, None))
        bench.hands.granted(grant(number, (number,)))
    bench.idle()
    assert bench.facts == [BlocksFilled(1, 3, (), (1,), DropReason.COPY_FAILED), BlocksFilled(2, 3, (2,), ())]


def chunked(bench_config: HandsConfig) -> Bench:
    bench = Bench(bench_config)
    assert bench.engine.block_bytes == 768
    return bench


def test_a_save_goes_in_chunks_and_gives_way_to_loads() -> None:
    bench = chunked(replace(CONFIG, chunk_bytes=768 * 3, load_first_s=WAIT_S))
    bench.engine.hold_saves()
    bench.hands.start()
    bench.hands.saved(SaveBlocks(1, None))
    bench.hands.granted(grant(1, tuple(range(8))))
    assert bench.engine.wait_held("save")
    bench.engine.hold_loads()
    bench.hands.load(load(2))
    assert bench.engine.wait_held("load")
    with bench.engine._changed:
        bench.engine._held_kinds.discard("save")
        bench.engine._changed.notify_all()
    assert not bench.hands.wait_idle(0.05)
    assert [call.kind for call in bench.engine.calls] == ["save", "load"]  # the next chunk waits for the load
    bench.engine.release()
    bench.idle()
    assert [(call.kind, len(call.blocks)) for call in bench.engine.calls] == [("save", 3), ("load", 1), ("save", 3), ("save", 2)]
    assert bench.filled() == [BlocksFilled(1, 3, tuple(range(8)), ())]
    bench.close()


def test_a_load_that_does_not_end_does_not_stop_saves(bench: Bench) -> None:
    bench.engine.hold_loads()
    bench.hands.load(load(1))
    assert bench.engine.wait_held("load")
    bench.hands.saved(SaveBlocks(2, None))
    bench.hands.granted(grant(2))
    assert bench.engine.wait_calls(2, WAIT_S)


def test_a_failure_in_the_middle_keeps_the_chunks_before_it() -> None:
    bench = chunked(replace(CONFIG, chunk_bytes=768 * 2))
    bench.hands.start()
    bench.engine.pass_next("save")
    bench.engine.fail_next(1, "save")
    bench.hands.saved(SaveBlocks(1, None))
    bench.hands.granted(grant(1, (0, 1, 2, 3, 4)))
    bench.idle()
    assert bench.filled() == [BlocksFilled(1, 3, (0, 1), (2, 3, 4), DropReason.COPY_FAILED)]
    bench.close()


def test_stop_saving_reports_everything_and_ends_after_the_chunk() -> None:
    bench = chunked(replace(CONFIG, chunk_bytes=768 * 2))
    bench.hands.start()
    bench.engine.hold_saves()
    for number in (1, 2):
        bench.hands.saved(SaveBlocks(number, None))
        bench.hands.granted(grant(number, (4 * number, 4 * number + 1, 4 * number + 2)))
    bench.hands.granted(grant(3, (1,)))
    assert bench.engine.wait_held("save")
    bench.hands.stop_saving()
    assert [(fact.job, fact.reason) for fact in bench.filled()] == [(3, DropReason.OFF), (2, DropReason.OFF)]
    assert not bench.hands.saved(SaveBlocks(3, None))
    bench.hands.granted(grant(4, (2,)))
    assert not bench.hands.wait_idle(0)
    bench.engine.release()
    bench.idle()
    assert bench.filled()[2:] == [
        BlocksFilled(4, 3, (), (2,), DropReason.OFF),
        BlocksFilled(1, 3, (4, 5), (6,), DropReason.OFF),
    ]
    bench.close()


# ---------------------------------------------------------------- ends


@pytest.mark.parametrize("kind", ["save", "load"])
def test_a_crash_is_told_after_its_job_and_ends_saving(bench: Bench, kind: str) -> None:
    bench.engine.crash_next(kind)
    if kind == "save":
        bench.hands.saved(SaveBlocks(1, None))
        bench.hands.granted(grant(1))
    else:
        bench.hands.load(load(1))
    while bench.hands.crashed is None:
        bench.idle()
    bench.hands.granted(grant(2, (5,)))
    late = bench.hands.load(load(3))
    assert late.state is LoadState.WITHDRAWN
    assert not bench.hands.saved(SaveBlocks(4, None))
    bench.close()  # joins the threads: everything has been told
    if kind == "save":
        assert bench.filled()[0] == BlocksFilled(1, 3, (), (1,), DropReason.COPY_FAILED)
    else:
        assert bench.outcomes()[1] is LoadOutcome.FAILED
    crash = next(fact for fact in bench.facts if isinstance(fact, HandsCrashed))
    assert isinstance(crash.error, InjectedCrash)
    assert BlocksFilled(2, 3, (), (5,), DropReason.OFF) in bench.facts
    bench.rig = Rig.make()


class LosingEngine(FaultyCopyEngine):
    """Of its second call it is not known whether it has ended."""

    def _lose(self) -> None:
        if len(self.calls) == 2:
            raise EngineLost("no news of a copy")

    def save(self, blocks: Ids, slots: Ids, epochs: Ids, after: object = None) -> NDArray[np.bool_]:
        flags = super().save(blocks, slots, epochs, after)
        self._lose()
        return flags

    def load(self, slots: Ids, blocks: Ids, after: object = None) -> None:
        super().load(slots, blocks, after)
        self._lose()


@pytest.mark.parametrize("kind", ["save", "load"])
def test_a_copy_that_may_never_end_crashes_and_no_slot_is_given_back(kind: str) -> None:
    bench = Bench(replace(CONFIG, chunk_bytes=1))
    crash = threading.Event()

    def report(fact: CopyFact) -> None:
        bench.facts.append(fact)
        if isinstance(fact, HandsCrashed):
            crash.set()

    bench.hands = CopyHands(LosingEngine(bench.rig.engine), bench.ended.append, report, bench.config)
    if kind == "save":
        assert bench.hands.saved(SaveBlocks(1, None))
        bench.hands.granted(grant(1, (4, 5, 6)))  # three calls
    else:
        bench.hands.load(load(1))
        bench.hands.load(load(2))
        bench.hands.load(load(3))
    bench.hands.start()
    assert crash.wait(WAIT_S)
    assert isinstance(bench.hands.crashed, EngineLost)
    assert bench.hands.wait_idle(WAIT_S) is (kind == "load"), "what was never told, but nobody waits for it"
    assert not bench.hands.saved(SaveBlocks(4, None))
    assert bench.hands.load(load(5)).state is LoadState.WITHDRAWN
    assert bench.filled() == [], "the slots may still be written"
    if kind == "load":
        outcomes = [bench.outcomes()[number].name for number in (1, 2, 3, 5)]
        assert outcomes == ["LOADED", "FAILED", "WITHDRAWN", "WITHDRAWN"], "vLLM waits for every load"
    assert not bench.hands.close(WAIT_S), "engine, segment and tensors must be kept"
    bench.rig.close()


def test_a_crash_withdraws_what_waits_behind_it(bench: Bench) -> None:
    bench.engine.hold_loads()
    bench.engine.crash_next("load")
    for number in (1, 2, 3):
        bench.hands.load(load(number))
    bench.engine.release()
    bench.idle()
    assert [bench.outcomes()[number].name for number in (1, 2, 3)] == ["FAILED", "WITHDRAWN", "WITHDRAWN"]


def test_a_callback_that_raises_is_a_crash_and_the_other_side_is_told(bench: Bench) -> None:
    facts: list[CopyFact] = []

    def broken(ended: LoadEnded) -> None:
        raise LookupError("no inbox")

    hands = CopyHands(bench.engine, broken, facts.append, CONFIG)
    hands.start()
    hands.load(load(1))
    assert hands.wait_idle(WAIT_S)
    assert hands.close(WAIT_S)
    assert isinstance(hands.crashed, LookupError)
    assert LoadEnded(1, "request 1", LoadOutcome.LOADED, (9,)) in facts
    assert any(isinstance(fact, HandsCrashed) for fact in facts)


def test_a_callback_that_always_raises_never_reaches_the_caller(bench: Bench) -> None:
    def broken(fact: Any) -> None:
        raise LookupError("no inbox")

    hands = CopyHands(bench.engine, broken, broken, replace(CONFIG, max_loads=64))
    jobs = [hands.load(load(number)) for number in range(64)]
    assert jobs[0].withdraw()
    assert {job.state for job in jobs} == {LoadState.WITHDRAWN}
    assert hands.close(WAIT_S)


def test_close_waits_for_what_runs_and_withdraws_the_rest(bench: Bench) -> None:
    bench.engine.hold_loads()
    bench.hands.load(load(1))
    bench.hands.load(load(2))
    bench.hands.granted(grant(3))
    assert bench.engine.wait_held("load")
    assert not bench.hands.close(0.01)
    assert bench.outcomes() == {2: LoadOutcome.WITHDRAWN}
    assert bench.filled() == [BlocksFilled(3, 3, (), (1,), DropReason.OFF)]
    bench.engine.release()
    assert bench.hands.close(WAIT_S)
    assert bench.hands.close(WAIT_S)
    assert bench.outcomes() == {1: LoadOutcome.LOADED, 2: LoadOutcome.WITHDRAWN}
    assert bench.hands.load(load(4)).state is LoadState.WITHDRAWN


def test_closing_before_the_start() -> None:
    bench = Bench()
    bench.hands.load(load(1))
    bench.close()
    assert bench.outcomes() == {1: LoadOutcome.WITHDRAWN}


def test_everything_is_told_exactly_once_from_many_threads() -> None:
    bench = Bench(replace(CONFIG, max_loads=10_000, max_saves=10_000, chunk_bytes=768 * 2, load_first_s=0.0005))
    bench.hands.start()
    bench.engine.fail_next(40)

    def saves(half: str) -> None:
        for number in range(1000, 1300):
            if half == "grant":
                bench.hands.granted(grant(number, (0, 1, 2)))
            elif number % 10:
                bench.hands.saved(SaveBlocks(number, None))

    def loads(start: int) -> None:
        for number in range(start, start + 150):
            job = bench.hands.load(load(number))
            if number % 3 == 0:
                job.withdraw()

    threads = [threading.Thread(target=saves, args=(half,)) for half in ("grant", "saved")]
    threads += [threading.Thread(target=loads, args=(start,)) for start in (0, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    bench.idle()
    bench.hands.expire(1e9)
    bench.close()
    assert len(bench.outcomes()) == 300
    assert sorted(fact.job for fact in bench.filled()) == list(range(1000, 1300))
    assert all(sorted((*fact.filled, *fact.failed)) == [0, 1, 2] for fact in bench.filled())
    unpaired = [fact.job for fact in bench.filled() if fact.reason is DropReason.UNPAIRED]
    assert unpaired == list(range(1000, 1300, 10))
