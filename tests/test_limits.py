from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from kvoffload.errors import CapacityError
from kvoffload.limits import Available, available_bytes, check_capacity

GIB = 1 << 30
NO_LIMIT_V1 = "9223372036854771712"


class Machine:
    """A fake /proc and /sys/fs/cgroup."""

    def __init__(self, root: Path) -> None:
        self.proc, self.cgroup = root / "proc", root / "cgroup"
        self.cgroup.mkdir()
        (self.proc / "self").mkdir(parents=True)
        self.memory(8 * GIB)
        self.groups("0::/")

    def memory(self, available_bytes: int) -> None:
        text = f"MemTotal:       99999999 kB\nMemFree:              5 kB\nMemAvailable:  {available_bytes // 1024} kB\n"
        (self.proc / "meminfo").write_text(text)

    def groups(self, text: str) -> None:
        (self.proc / "self" / "cgroup").write_text(text + "\n")

    def group(self, path: str, files: Mapping[str, object]) -> None:
        directory = self.cgroup / path
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (directory / name).write_text(f"{content}\n")

    def available(self) -> Available:
        return available_bytes(str(self.proc), str(self.cgroup))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def v2(limit: object, used: int, inactive_file: int = 0, high: object = "max") -> dict[str, object]:
    stat = f"anon 5\nfile 6\ninactive_anon 7\ninactive_file {inactive_file}"
    return {"memory.max": limit, "memory.high": high, "memory.current": used, "memory.stat": stat}


def v1(limit: object, used: int, total_inactive_file: int = 0, hierarchical: object = NO_LIMIT_V1) -> dict[str, object]:
    stat = f"cache 1\ninactive_file 1\nhierarchical_memory_limit {hierarchical}\ntotal_inactive_file {total_inactive_file}"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}


def test_without_limits_the_machine_counts(machine: Machine) -> None:
    machine.group("", {"memory.stat": "inactive_file 5"})  # the real root has no memory.max
    assert machine.available() == Available(8 * GIB, f"MemAvailable of {machine.proc / 'meminfo'}")


def test_v2_own_limit_and_page_cache_that_can_go(machine: Machine) -> None:
    machine.groups("0::/pod/container")
    machine.group("pod", v2("max", 3 * GIB))
    machine.group("pod/container", v2(4 * GIB, 3 * GIB, inactive_file=GIB))
    assert machine.available().bytes == 2 * GIB
    assert machine.available().source.endswith("pod/container/memory.max")


def test_v2_an_ancestor_is_tighter(machine: Machine) -> None:
    machine.groups("0::/pod/container")
    machine.group("pod", v2(4 * GIB, 3 * GIB))
    machine.group("pod/container", v2(6 * GIB, GIB))
    assert machine.available().bytes == GIB
    assert machine.available().source.endswith("pod/memory.max")


def test_v2_the_throttling_limit_counts(machine: Machine) -> None:
    machine.groups("0::/a")
    machine.group("a", v2(6 * GIB, GIB, high=3 * GIB))
    assert machine.available().bytes == 2 * GIB


def test_v2_in_a_container_whose_mount_is_its_own_group(machine: Machine) -> None:
    # With a cgroup namespace the path is "/", without one it is the host's, which does not exist below the mount.
    machine.group("", v2(4 * GIB, GIB))
    for path in ("/", "/kubepods/pod1/abc", "/../sibling"):
        machine.groups(f"0::{path}")
        assert machine.available().bytes == 3 * GIB


def test_v2_below_the_visible_part_of_the_tree(machine: Machine) -> None:
    machine.groups("0::/docker/abc/worker")
    machine.group("", v2(5 * GIB, GIB))
    machine.group("worker", v2(3 * GIB, GIB))
    assert machine.available().bytes == 2 * GIB


def test_over_the_limit_is_nothing_left(machine: Machine) -> None:
    machine.groups("0::/a")
    machine.group("a", v2(GIB, 2 * GIB))
    assert machine.available().bytes == 0


def test_v1_limits_of_all_ancestors(machine: Machine) -> None:
    machine.groups("5:cpu,cpuacct:/other\n4:memory:/docker/abc\n0::/")
    machine.group("memory", v1(NO_LIMIT_V1, 9 * GIB))
    machine.group("memory/docker", v1(6 * GIB, 4 * GIB))
    machine.group("memory/docker/abc", v1(5 * GIB, 2 * GIB, total_inactive_file=GIB))
    assert machine.available().bytes == 2 * GIB
    assert machine.available().source.endswith("docker/memory.limit_in_bytes")


def test_v1_page_cache_counts_with_the_children_s(machine: Machine) -> None:
    machine.groups("4:memory:/a")
    machine.group("memory/a", v1(5 * GIB, 4 * GIB, total_inactive_file=2 * GIB))
    assert machine.available().bytes == 3 * GIB


def test_v1_a_limit_above_what_the_container_sees(machine: Machine) -> None:
    machine.groups("4:memory:/docker/abc")
    machine.group("memory", v1(NO_LIMIT_V1, GIB, hierarchical=3 * GIB))
    assert machine.available().bytes == 2 * GIB


def test_hybrid_v1_memory_beside_v2(machine: Machine) -> None:
    machine.groups("4:memory:/a\n0::/b")
    machine.group("memory/a", v1(4 * GIB, GIB))
    machine.group("unified/b", {"cgroup.procs": ""})
    assert machine.available().bytes == 3 * GIB


def test_unreadable_figures_are_no_limits(machine: Machine) -> None:
    machine.groups("not a line\n\n0::/a")
    machine.group("a", {"memory.max": "banana", "memory.current": "", "memory.stat": "inactive_file"})
    assert machine.available().bytes == 8 * GIB


def test_nothing_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="cannot tell"):
        available_bytes(str(tmp_path), str(tmp_path))


def test_check_capacity_says_what_to_do(machine: Machine) -> None:
    roots = {"proc_root": str(machine.proc), "cgroup_root": str(machine.cgroup)}
    assert check_capacity(7 * GIB, GIB, **roots).bytes == 8 * GIB
    with pytest.raises(CapacityError) as caught:
        check_capacity(7 * GIB + 1, GIB, **roots)
    text = str(caught.value)
    assert "8.00 GiB available" in text
    assert "MemAvailable" in text
    assert "l1.capacity_gb to at most 7.00" in text


def test_this_machine() -> None:
    available = available_bytes()
    total_kib = int(Path("/proc/meminfo").read_text().split()[1])
    assert 0 < available.bytes <= total_kib * 1024
