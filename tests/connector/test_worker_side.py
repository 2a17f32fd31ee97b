"""Every load in the metadata is reported exactly once, whatever dies."""

from __future__ import annotations

import pytest
from tests.connector.ports import Clock, FakeCopies

from kvoffload.connector.metadata import PlannedLoad, StepMetadata
from kvoffload.connector.worker_side import WorkerSettings, WorkerSide
from kvoffload.messages import LoadOutcome, SaveBlocks


class Bench:
    def __init__(self) -> None:
        self.clock = Clock()
        self.copies = FakeCopies(self.clock)
        self.side = WorkerSide(self.copies, WorkerSettings(start_deadline_s=1.0, wait_idle_s=0.002), self.clock)

    def step(self, metadata: StepMetadata | None = None, *, idle: bool = False) -> tuple[set[str], set[int]]:
        """A step's hooks in vLLM's order: the requests and the invalid blocks that are reported."""
        metadata = metadata or StepMetadata(idle=idle)
        self.side.start_load_kv(metadata)
        self.side.wait_for_save(metadata)
        finished = self.side.get_finished(idle=metadata.idle)
        return finished or set(), self.side.get_block_ids_with_load_errors()


def load(job: int, request: str, blocks: tuple[int, ...] = (7, 8), *, withdrawn: bool = False) -> PlannedLoad:
    return PlannedLoad(job, request, tuple(50 + block for block in blocks), blocks, withdrawn)


def test_a_load_is_handed_over_and_reported_when_it_has_ended() -> None:
    bench = Bench()
    assert bench.step(StepMetadata(loads=(load(1, "r"),))) == (set(), set())
    message = bench.copies.loads[1].message
    assert (message.request, message.slots, message.blocks, message.after) == ("r", (57, 58), (7, 8), "mark")
    assert bench.step() == (set(), set())
    bench.copies.end(1)
    assert bench.step() == ({"r"}, set())
    assert bench.step() == (set(), set())
    assert bench.side.counters.loaded_blocks == 2
    assert not bench.side.has_news


@pytest.mark.parametrize("outcome", [LoadOutcome.FAILED, LoadOutcome.WITHDRAWN])
def test_what_did_not_end_well_is_reported_with_its_blocks_in_the_same_step(outcome: LoadOutcome) -> None:
    bench = Bench()
    bench.step(StepMetadata(loads=(load(1, "r"), load(2, "s", (9,)))))
    bench.copies.end(1, outcome)
    bench.copies.end(2)
    assert bench.step() == ({"r", "s"}, {7, 8})
    assert bench.step() == (set(), set())
    counters = bench.side.counters
    assert (counters.failed_loads, counters.withdrawn_loads) == ((1, 0) if outcome is LoadOutcome.FAILED else (0, 1))


def test_a_load_that_does_not_start_in_time_is_withdrawn() -> None:
    bench = Bench()
    bench.step(StepMetadata(loads=(load(1, "r"),)))
    bench.clock.now += 0.99
    assert bench.step() == (set(), set())
    assert not bench.copies.loads[1].withdrawals
    bench.clock.now += 0.02
    assert bench.step() == ({"r"}, {7, 8})
    # That it is withdrawn comes through the inbox too, and is no second report.
    bench.copies.end(1, LoadOutcome.WITHDRAWN)
    assert bench.step(StepMetadata(loads=(load(2, "s", (9,)),))) == (set(), set())
    assert bench.side.counters.withdrawn_loads == 1


def test_a_load_that_has_started_is_waited_for_however_long() -> None:
    bench = Bench()
    bench.step(StepMetadata(loads=(load(1, "r"),)))
    bench.copies.loads[1].is_started = True
    for _ in range(5):
        bench.clock.now += 3600.0
        assert bench.step() == (set(), set())
    bench.copies.end(1)
    assert bench.step() == ({"r"}, set())


def test_a_load_withdrawn_by_the_scheduler_is_not_copied() -> None:
    bench = Bench()
    assert bench.step(StepMetadata(loads=(load(1, "r", withdrawn=True),))) == ({"r"}, {7, 8})
    assert not bench.copies.loads
    assert bench.copies.off == [(1, "r")]


def test_a_load_that_was_never_promised_to_l1_is_not_told_there() -> None:
    bench = Bench()
    assert bench.step(StepMetadata(loads=(PlannedLoad(1, "r", (), (7, 8), withdrawn=True),))) == ({"r"}, {7, 8})
    assert not bench.copies.off


def test_loads_after_the_copy_threads_are_gone() -> None:
    bench = Bench()
    bench.copies.is_gone = True
    assert bench.step(StepMetadata(loads=(load(1, "r"),))) == ({"r"}, {7, 8})
    assert bench.copies.off == [(1, "r")]


def test_loads_where_this_half_never_started() -> None:
    side = WorkerSide(None, WorkerSettings(), Clock())
    metadata = StepMetadata(saves=(5,), loads=(load(1, "r"),), idle=True)
    side.start_load_kv(metadata)
    side.wait_for_save(metadata)
    assert side.get_finished(idle=True) == {"r"}
    assert side.get_block_ids_with_load_errors() == {7, 8}
    assert side.get_finished(idle=True) is None


def test_handing_over_failed_halfway() -> None:
    bench = Bench()
    metadata = StepMetadata(loads=(load(1, "r"), load(2, "s", (9,))))
    bench.side.start_load_kv(StepMetadata(loads=metadata.loads[:1]))
    bench.side.start_none(metadata)
    assert bench.side.get_finished(idle=False) == {"s"}
    assert bench.side.get_block_ids_with_load_errors() == {9}
    bench.copies.end(1)
    assert bench.step() == ({"r"}, set())


# ---------------------------------------------------------------- the one wait


def test_an_idle_step_waits_a_little_for_its_loads() -> None:
    bench = Bench()
    bench.copies.on_wait = lambda: bench.copies.end(1)
    assert bench.step(StepMetadata(loads=(load(1, "r"),), idle=True)) == ({"r"}, set())
    assert bench.copies.waits == [0.002]


def test_it_waits_once_per_step_and_only_when_idle_and_in_need() -> None:
    bench = Bench()
    bench.step(idle=True)
    assert not bench.copies.waits
    bench.step(StepMetadata(loads=(load(1, "r"), load(2, "s", (9,)))))
    bench.step()
    assert not bench.copies.waits
    assert bench.step(idle=True) == (set(), set())
    assert bench.copies.waits == [0.002]
    # One load is over: vLLM is told at once.
    bench.copies.end(1)
    assert bench.step(idle=True) == ({"r"}, set())
    assert bench.copies.waits == [0.002]


def test_a_load_that_is_off_from_the_start_is_not_waited_for() -> None:
    bench = Bench()
    bench.step(StepMetadata(loads=(load(1, "r", withdrawn=True), load(2, "s", (9,))), idle=True))
    assert not bench.copies.waits


# ---------------------------------------------------------------- saves


def test_saves_are_told_with_the_mark_of_the_step() -> None:
    bench = Bench()
    bench.step(StepMetadata(saves=(3, 4)))
    assert bench.copies.saves == [SaveBlocks(3, "mark"), SaveBlocks(4, "mark")]
    assert not bench.side.counters.refused_saves


def test_refused_saves_are_counted() -> None:
    bench = Bench()
    bench.copies.refuses_saves = True
    bench.step(StepMetadata(saves=(3, 4)))
    assert bench.side.counters.refused_saves == 2
