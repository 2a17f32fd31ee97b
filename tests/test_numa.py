"""Where memory near the GPU is found, and the threads that take it there. The tree of /sys is made up; the threads are real."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvoffload.cuda.numa import BoundThreads, cpus_near, cpus_of, node_of
from kvoffload.errors import CapacityError
from kvoffload.segment import Segment

ALLOWED = frozenset(os.sched_getaffinity(0))
MIB = 1 << 20


def machine(root: Path, node: int | str = 1, **cpulists: str) -> Path:
    """A /sys with one GPU on this node, and nodes with these CPUs."""
    device = root / "bus/pci/devices/0000:3b:00.0"
    device.mkdir(parents=True)
    (device / "numa_node").write_text(f"{node}\n")
    for name, cpus in cpulists.items():
        place = root / "devices/system/node" / name
        place.mkdir(parents=True)
        (place / "cpulist").write_text(f"{cpus}\n")
    return root


@pytest.mark.parametrize("address", ["0000:3b:00.0", "0000:3B:00.0", "00000000:3B:00.0", " 0:3B:00.0"])
def test_a_device_is_found_however_its_address_is_written(tmp_path: Path, address: str) -> None:
    assert node_of(address, machine(tmp_path)) == 1


@pytest.mark.parametrize("node", [-1, "", "none"])
def test_a_machine_that_does_not_say_has_no_node(tmp_path: Path, node: int | str) -> None:
    assert node_of("0000:3b:00.0", machine(tmp_path, node)) is None


def test_an_unknown_device_has_no_node(tmp_path: Path) -> None:
    assert node_of("0000:3c:00.0", machine(tmp_path)) is None
    assert node_of("", tmp_path) is None


def test_the_cpus_of_a_node(tmp_path: Path) -> None:
    root = machine(tmp_path, node0="0-3,8", node1="4-5", node2="", node3="1-x")
    assert cpus_of(0, root) == {0, 1, 2, 3, 8}
    assert cpus_of(1, root) == {4, 5}
    assert cpus_of(2, root) == cpus_of(3, root) == cpus_of(4, root) == set()


def test_near_are_those_of_the_gpus_node_that_this_process_may_use(tmp_path: Path) -> None:
    mine = min(ALLOWED)
    root = machine(tmp_path, node0="0-1023", node1=f"{mine},5000")
    assert cpus_near("0000:3B:00.0", root) == {mine}


def test_a_process_kept_elsewhere_stays_there(tmp_path: Path) -> None:
    assert cpus_near("0000:3B:00.0", machine(tmp_path, node1="5000-5001")) == ALLOWED


@pytest.mark.parametrize("node", [-1, 7])
def test_without_a_node_or_its_cpus_all_will_do(tmp_path: Path, node: int) -> None:
    assert cpus_near("0000:3b:00.0", machine(tmp_path, node)) == ALLOWED
    assert cpus_near(None, tmp_path) == ALLOWED


@pytest.mark.parametrize(("cpus", "threads"), [(1, 2), (2, 2), (5, 5), (8, 8), (64, 8)])
def test_how_many_threads(cpus: int, threads: int) -> None:
    assert BoundThreads(frozenset(range(cpus))).threads == threads


def run_each(crew: BoundThreads, count: int, part: Callable[[int], None]) -> None:
    crew.run([lambda number=number: part(number) for number in range(count)])  # type: ignore[misc]


def test_parts_run_at_once_each_on_the_cpus_given() -> None:
    mine = frozenset([max(ALLOWED)])
    meeting = threading.Barrier(3)
    seen: dict[int, frozenset[int]] = {}

    def part(number: int) -> None:
        meeting.wait(20)
        seen[number] = frozenset(os.sched_getaffinity(0))

    run_each(BoundThreads(mine), 3, part)
    assert seen == dict.fromkeys(range(3), mine)
    assert frozenset(os.sched_getaffinity(0)) == ALLOWED, "the thread that asked is not bound"


def test_parts_are_as_nice_as_who_asks() -> None:
    seen: list[int] = []

    def ask() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        run_each(BoundThreads(ALLOWED), 2, lambda number: seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(20)
    assert seen == [10, 10]


@pytest.mark.parametrize("cpus", [frozenset([5000]), frozenset[int]()])
def test_a_refusal_to_be_bound_is_no_error(cpus: frozenset[int]) -> None:
    seen: list[frozenset[int]] = []
    run_each(BoundThreads(cpus), 2, lambda number: seen.append(frozenset(os.sched_getaffinity(0))))
    assert seen == [ALLOWED, ALLOWED]


def test_all_have_ended_when_one_failed_and_the_first_failure_is_told() -> None:
    first_may_fail = threading.Event()
    ended: list[int] = []

    def part(number: int) -> None:
        if number == 1:
            first_may_fail.wait(20)
            raise CapacityError("one")
        if number == 2:
            first_may_fail.set()
            raise CapacityError("two")
        ended.append(number)

    with pytest.raises(CapacityError, match="one"):
        run_each(BoundThreads(ALLOWED), 5, part)
    assert sorted(ended) == [0, 3, 4]


def test_where_no_thread_is_to_be_had_this_one_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    seen: list[tuple[int, frozenset[int]]] = []
    monkeypatch.setattr(threading.Thread, "start", start)
    run_each(BoundThreads(frozenset([max(ALLOWED)])), 3, lambda number: seen.append((number, frozenset(os.sched_getaffinity(0)))))
    assert seen == [(0, ALLOWED), (1, ALLOWED), (2, ALLOWED)]


def test_a_segment_is_populated_by_all_of_them() -> None:
    segment = Segment.create(64 * MIB, 8192)
    crew = BoundThreads(ALLOWED)
    assert segment.populate_next(16 * MIB, crew) == 2048
    assert os.fstat(segment.fd).st_blocks * 512 == 16 * MIB
    assert segment.populate_next(1 << 40, crew) == segment.slots
    assert os.fstat(segment.fd).st_blocks * 512 == 64 * MIB
    segment.close()
