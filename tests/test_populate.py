"""How the slots of a segment become usable: step by step, as memory allows, and on a GPU only when its driver may be asked."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from kvoffload import populate
from kvoffload.errors import CapacityError, CopyError
from kvoffload.populate import LONGEST_PAUSE_S, Populator, Preparation, Prepare
from kvoffload.segment import Crew, Segment

MIB = 1 << 20
WAIT_S = 20.0


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = Segment.create(4 * MIB, 8192)
    yield made
    made.close()


class FullMachine(Segment):
    """Memory for three steps."""

    left = 3

    def _advise_populate(self, address: int, num_bytes: int) -> int:
        if not self.left:
            return errno.ENOMEM
        self.left -= 1
        return super()._advise_populate(address, num_bytes)


def test_the_populator_reports_growth_until_all_is_there(segment: Segment) -> None:
    grown: list[int] = []
    populator = Populator(segment, grown.append, step_bytes=MIB)
    populator.start()
    assert populator.wait(WAIT_S)
    assert grown == [128, 256, 384, 512]
    assert populator.error is None
    assert populator.close()


def test_the_populator_stops_when_closed(segment: Segment) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def on_grown(slots: int) -> None:
        reached.set()
        go_on.wait(WAIT_S)

    populator = Populator(segment, on_grown, step_bytes=MIB)
    populator.start()
    assert reached.wait(WAIT_S)
    assert not populator.close(timeout_s=0)  # the step is still under way
    go_on.set()
    assert populator.close(WAIT_S)
    assert segment.populated_slots == 128


def test_the_populator_can_be_closed_unstarted(segment: Segment) -> None:
    assert Populator(segment, lambda slots: None).close()


def test_the_populator_stays_at_what_memory_allows() -> None:
    segment = FullMachine.create(4 * MIB, 8192)
    grown: list[int] = []
    populator = Populator(segment, grown.append, step_bytes=MIB)
    populator.start()
    assert populator.wait(WAIT_S)
    assert grown == [128, 256, 384]
    assert isinstance(populator.error, CapacityError)


def test_the_populator_stops_before_the_limit_of_a_control_group(segment: Segment) -> None:
    left = [3 * MIB, 2 * MIB, MIB - 1]
    grown: list[int] = []
    populator = Populator(segment, grown.append, headroom=lambda: left.pop(0), step_bytes=MIB)
    populator.start()
    assert populator.wait(WAIT_S)
    assert grown == [128, 256]
    assert "1048575 bytes" in str(populator.error)


def test_a_failing_callback_ends_only_the_populator(segment: Segment) -> None:
    def on_grown(slots: int) -> None:
        raise LookupError("gone")

    populator = Populator(segment, on_grown, step_bytes=MIB)
    populator.start()
    assert populator.wait(WAIT_S)
    assert isinstance(populator.error, LookupError)


# ------------------------------------------------------------ on the caller's thread, at the start


def test_without_time_the_first_slots_are_one_step(segment: Segment) -> None:
    grown: list[int] = []
    populator = Populator(segment, grown.append, step_bytes=MIB)
    assert populator.first_slots() == 128
    assert grown == [128]
    populator.start()
    assert populator.wait(WAIT_S)
    assert grown == [128, 256, 384, 512]


def test_the_first_slots_are_at_least_one() -> None:
    segment = Segment.create(4 * MIB, 2 * MIB)
    assert Populator(segment, lambda slots: None, step_bytes=MIB).first_slots() == 1
    segment.close()


def test_the_start_takes_as_much_as_its_time_allows(segment: Segment) -> None:
    times = iter([0.0, 1.0, 1.9, 2.0, 99.0])  # at the begin, and after each step
    grown: list[int] = []
    populator = Populator(segment, grown.append, step_bytes=MIB, clock=lambda: next(times))
    assert populator.first_slots(2.0) == 384
    assert grown == [128, 256, 384]


def test_a_start_with_enough_time_leaves_nothing_to_do(segment: Segment) -> None:
    grown: list[int] = []
    populator = Populator(segment, grown.append, step_bytes=MIB)
    assert populator.first_slots(WAIT_S) == 512
    populator.start()
    assert populator.wait(WAIT_S)
    assert grown == [128, 256, 384, 512]


def test_no_memory_for_one_slot_is_an_error_and_for_more_is_not() -> None:
    full = FullMachine.create(4 * MIB, 2 * MIB)
    full.left = 1
    with pytest.raises(CapacityError, match="no memory for bytes 1048576"):
        Populator(full, lambda slots: None, step_bytes=MIB).first_slots(WAIT_S)
    full.close()
    full = FullMachine.create(4 * MIB, 8192)
    populator = Populator(full, lambda slots: None, step_bytes=MIB)
    assert populator.first_slots(WAIT_S) == 384
    assert populator.error is None
    populator.start()
    assert populator.wait(WAIT_S)
    assert isinstance(populator.error, CapacityError)
    full.close()


def test_what_is_left_may_be_less_than_a_step(segment: Segment) -> None:
    """A segment smaller than a step needs only its own size, and so does the rest of any."""
    left = iter([4 * MIB, MIB])
    populator = Populator(segment, lambda slots: None, headroom=lambda: next(left), step_bytes=3 * MIB)
    assert populator.first_slots(WAIT_S) == 512


# ------------------------------------------------------------ slots that an engine has to prepare


class Engine:
    """Records what it is asked to prepare, and gives that or less."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.most = 1 << 30
        self.at_start: list[bool] = []
        self.was_asked = threading.Semaphore(0)

    def prepare(self, populated: int, *, at_start: bool = False) -> int:
        self.asked.append(populated)
        self.at_start.append(at_start)
        self.was_asked.release()
        return min(populated, self.most)


class Together:
    """A crew of this many threads."""

    def __init__(self, threads: int = 3) -> None:
        self.threads = threads

    def run(self, parts: Sequence[Callable[[], None]]) -> None:
        for part in parts:
            part()


def gpu(prepare: Prepare, piece_slots: int, crew: Crew | None = None) -> Preparation:
    return Preparation(prepare, piece_slots, needs_leave=lambda: True, crew=crew)


def test_the_engine_prepares_piece_by_piece_and_what_it_did_is_reported_at_once(segment: Segment) -> None:
    engine, grown = Engine(), list[tuple[int, int]]()
    populator = Populator(
        segment, lambda slots: grown.append((slots, len(engine.asked))), step_bytes=MIB, preparation=gpu(engine.prepare, 200)
    )
    assert populator.first_slots(WAIT_S) == 512
    assert engine.asked == [200, 400, 512]
    assert engine.at_start == [True] * 3
    assert grown == [(200, 1), (400, 2), (512, 3)]


def test_at_the_end_of_its_time_the_start_prepares_less_than_a_piece(segment: Segment) -> None:
    engine = Engine()
    populator = Populator(segment, lambda slots: None, step_bytes=MIB, preparation=gpu(engine.prepare, 200))
    assert populator.first_slots(0.0) == 128
    assert engine.asked == [128]


def test_after_the_start_the_engine_is_not_asked_before_it_is_allowed(segment: Segment) -> None:
    engine, grown = Engine(), list[int]()
    populator = Populator(segment, grown.append, step_bytes=MIB, preparation=gpu(engine.prepare, 100))
    populator.first_slots()
    engine.asked.clear()
    populator.start()
    until(lambda: segment.populated_slots == 512)
    assert not populator.wait(0.05)
    assert engine.asked == []
    assert grown == [100, 128]
    populator.allow()
    assert populator.wait(WAIT_S)
    assert engine.asked == [228, 328, 428, 512]
    assert engine.at_start == [True, True] + [False] * 4
    assert grown[-1] == 512


def test_once_allowed_it_prepares_while_it_populates(segment: Segment) -> None:
    engine, seen = Engine(), list[int]()

    def prepare(populated: int, *, at_start: bool = False) -> int:
        seen.append(segment.populated_slots)
        return engine.prepare(populated)

    populator = Populator(segment, lambda slots: None, step_bytes=MIB, preparation=gpu(prepare, 128))
    populator.allow()
    populator.start()
    assert populator.wait(WAIT_S)
    assert engine.asked == [128, 256, 384, 512]
    assert seen == [128, 256, 384, 512]


def test_an_engine_that_gives_less_is_asked_again_at_the_next_chance_and_not_before(segment: Segment) -> None:
    engine, grown = Engine(), list[int]()
    engine.most = 0
    populator = Populator(segment, grown.append, step_bytes=4 * MIB, preparation=gpu(engine.prepare, 256))
    populator.start()
    until(lambda: segment.populated_slots == 512)
    for _ in range(2):
        populator.allow()
        assert engine.was_asked.acquire(timeout=WAIT_S)
        assert not engine.was_asked.acquire(timeout=0.05)
    assert grown == []
    engine.most = 512
    populator.allow()
    assert populator.wait(WAIT_S)
    assert grown == [256, 512]


def test_an_engine_that_comes_to_need_no_leave_keeps_neither_the_start_nor_the_rest_waiting(segment: Segment) -> None:
    engine, grown, leaves = Engine(), list[int](), iter([True, True])
    preparation = Preparation(engine.prepare, 100, needs_leave=lambda: next(leaves, False))
    populator = Populator(segment, grown.append, step_bytes=MIB, preparation=preparation)
    assert populator.first_slots(WAIT_S) == 384
    populator.start()
    assert populator.wait(WAIT_S)
    assert grown[-1] == 512


def test_an_engine_that_needs_no_leave_is_asked_after_each_step(segment: Segment) -> None:
    engine, grown = Engine(), list[int]()
    populator = Populator(segment, grown.append, step_bytes=MIB, preparation=Preparation(engine.prepare))
    assert populator.first_slots() == 128
    populator.start()
    assert populator.wait(WAIT_S)
    assert engine.asked == grown == [128, 256, 384, 512]


def test_no_slot_is_reported_that_the_engine_does_not_give(segment: Segment) -> None:
    engine, grown = Engine(), list[int]()
    engine.most = 70
    populator = Populator(segment, grown.append, step_bytes=MIB, preparation=gpu(engine.prepare, 100))
    assert populator.first_slots(WAIT_S) == 70
    assert grown == [70]


def test_what_memory_allowed_is_prepared_too() -> None:
    full = FullMachine.create(4 * MIB, 8192)
    engine, grown = Engine(), list[int]()
    populator = Populator(full, grown.append, step_bytes=MIB, preparation=gpu(engine.prepare, 1000))
    populator.allow()
    populator.start()
    assert populator.wait(WAIT_S)
    assert isinstance(populator.error, CapacityError)
    assert grown == [384]
    full.close()


def test_after_the_start_pieces_are_small_and_each_waits_for_as_long_as_the_last_took(segment: Segment) -> None:
    engine, pauses, now = Engine(), list[tuple[float, int]](), [0.0]
    took = iter([9.0, 9.0, 0.25, 0.5, 5.0, 0.125])

    def prepare(populated: int, *, at_start: bool = False) -> int:
        now[0] += next(took)
        return engine.prepare(populated, at_start=at_start)

    def pause(seconds: float) -> bool:
        pauses.append((seconds, len(engine.asked)))
        return False

    preparation = Preparation(prepare, 100, needs_leave=lambda: True, later_piece_slots=96)
    populator = Populator(segment, lambda slots: None, step_bytes=MIB, preparation=preparation, clock=lambda: now[0], pause=pause)
    assert populator.first_slots() == 128
    populator.allow()
    populator.start()
    assert populator.wait(WAIT_S)
    assert engine.asked == [100, 128, 224, 320, 416, 512]
    assert pauses == [(0.0, 2), (0.25, 3), (0.5, 4), (LONGEST_PAUSE_S, 5)]


def test_close_ends_a_pause(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(populate, "LONGEST_PAUSE_S", 3600.0)
    engine, now = Engine(), [0.0]

    def prepare(populated: int, *, at_start: bool = False) -> int:
        now[0] += 3600.0
        return engine.prepare(populated)

    populator = Populator(segment, lambda slots: None, step_bytes=4 * MIB, preparation=gpu(prepare, 8), clock=lambda: now[0])
    populator.allow()
    populator.start()
    assert engine.was_asked.acquire(timeout=WAIT_S)
    assert populator.close(WAIT_S)
    assert engine.asked == [8]


def test_waiting_to_be_allowed_ends_with_close(segment: Segment) -> None:
    engine = Engine()
    populator = Populator(segment, lambda slots: None, step_bytes=MIB, preparation=gpu(engine.prepare, 100))
    populator.start()
    until(lambda: segment.populated_slots == 512)
    assert populator.close(WAIT_S)
    assert engine.asked == []


def test_close_waits_for_one_piece_and_not_for_all(segment: Segment) -> None:
    reached, go_on = threading.Event(), threading.Event()
    engine = Engine()

    def prepare(populated: int, *, at_start: bool = False) -> int:
        reached.set()
        go_on.wait(WAIT_S)
        return engine.prepare(populated)

    populator = Populator(segment, lambda slots: None, step_bytes=4 * MIB, preparation=gpu(prepare, 100))
    populator.allow()
    populator.start()
    assert reached.wait(WAIT_S)
    assert not populator.close(0)
    go_on.set()
    assert populator.close(WAIT_S)
    assert engine.asked == [100]


def test_an_engine_that_fails_ends_the_populator_alone(segment: Segment) -> None:
    def prepare(populated: int, *, at_start: bool = False) -> int:
        raise CopyError("the device is gone")

    populator = Populator(segment, lambda slots: None, step_bytes=MIB, preparation=gpu(prepare, 100))
    populator.allow()
    populator.start()
    assert populator.wait(WAIT_S)
    assert isinstance(populator.error, CopyError)


def test_a_crew_takes_longer_steps_but_not_beyond_what_may_be_taken() -> None:
    segment = Segment.create(40 * MIB, 1 * MIB)
    left = iter([9 * MIB, 20 * MIB, 1 * MIB])
    engine, grown = Engine(), list[int]()
    preparation = gpu(engine.prepare, 1000, Together())
    populator = Populator(segment, grown.append, headroom=lambda: next(left), step_bytes=2 * MIB, preparation=preparation)
    assert populator.first_slots(WAIT_S) == 29
    segment.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = threading.Event()
    for _ in range(10_000):
        if condition():
            return
        deadline.wait(0.002)
    raise AssertionError("not within 20 s")
