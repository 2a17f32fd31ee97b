"""Which RDMA device a rank gets, over trees that look like sysfs."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvoffload.errors import UnsupportedError
from kvoffload.l2.rdma_devices import (
    Device,
    choose_device,
    devices_here,
    has_device,
    numa_distance,
    numa_node_of,
    numa_node_of_cpus,
    parse_devices,
)


def a_machine(root: Path, devices: dict[str, int], nodes: dict[int, tuple[str, str]]) -> Path:
    """``devices``: NUMA node by name; ``nodes``: CPUs and distances by number."""
    for name, node in devices.items():
        (root / "class/infiniband" / name / "device").mkdir(parents=True)
        (root / "class/infiniband" / name / "device/numa_node").write_text(f"{node}\n")
    for number, (cpus, distances) in nodes.items():
        folder = root / f"devices/system/node/node{number}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cpus}\n")
        (folder / "distance").write_text(f"{distances}\n")
    return root


TWO = {0: ("0-3,8-11", "10 21"), 1: ("4-7,12-15", "21 10")}


def names(*devices: str) -> list[Device]:
    return [Device(name) for name in devices]


def test_devices_with_and_without_a_gid() -> None:
    assert parse_devices(["mlx5_0", " mlx5_1:7 "]) == (Device("mlx5_0"), Device("mlx5_1", 7))
    assert parse_devices([]) == ()


@pytest.mark.parametrize("text", ["", "mlx5_0:", "mlx5_0:x", "mlx5_0:7:8", "../mlx5_0", "mlx5 0", "a" * 64, "mlx5_0:123456"])
def test_what_is_no_device(text: str) -> None:
    with pytest.raises(UnsupportedError, match=r"l2\.devices"):
        parse_devices([text])


def test_a_device_named_twice() -> None:
    with pytest.raises(UnsupportedError, match="twice"):
        parse_devices(["mlx5_0", "mlx5_0:3"])


def test_what_the_machine_has(tmp_path: Path) -> None:
    assert devices_here(tmp_path) == ()
    a_machine(tmp_path, {"mlx5_10": 0, "mlx5_2": 1, "irdma0": -1}, TWO)
    assert [device.name for device in devices_here(tmp_path)] == ["irdma0", "mlx5_2", "mlx5_10"]
    assert has_device("mlx5_2", tmp_path)
    assert not has_device("mlx5_3", tmp_path)
    assert [numa_node_of(name, tmp_path) for name in ("mlx5_2", "irdma0", "none")] == [1, None, None]


def test_the_numa_node_of_cpus(tmp_path: Path) -> None:
    a_machine(tmp_path, {}, TWO)
    assert numa_node_of_cpus({4, 5, 12}, tmp_path) == 1
    assert numa_node_of_cpus({0, 11}, tmp_path) == 0
    assert numa_node_of_cpus({3, 4}, tmp_path) is None
    assert numa_node_of_cpus(set(), tmp_path) is None
    assert numa_node_of_cpus({99}, tmp_path) is None


def test_distances_where_node_numbers_have_gaps(tmp_path: Path) -> None:
    """The columns are those of the nodes that are online."""
    a_machine(tmp_path, {}, {0: ("0", "10 21 31"), 2: ("1", "21 10 25"), 8: ("2", "31 25 10")})
    assert [numa_distance(0, to, tmp_path) for to in (0, 2, 8)] == [10, 21, 31]
    assert numa_distance(8, 2, tmp_path) == 25
    assert numa_distance(0, None, tmp_path) > numa_distance(0, 8, tmp_path)
    assert numa_distance(0, 5, tmp_path) > numa_distance(0, 8, tmp_path)


def test_blocks_of_ranks_as_aibrix_documents_them() -> None:
    devices = names("nic0", "nic1")
    chosen = [choose_device(devices, rank, 8) for rank in range(8)]
    assert [device and device.name for device in chosen] == ["nic0"] * 4 + ["nic1"] * 4


@pytest.mark.parametrize(("ranks", "count"), [(1, 1), (1, 4), (4, 8), (8, 3), (3, 2), (16, 5)])
def test_blocks_are_in_order_and_equal_within_one(ranks: int, count: int) -> None:
    devices = names(*(f"nic{index}" for index in range(count)))
    chosen = [devices.index(device) for rank in range(ranks) if (device := choose_device(devices, rank, ranks)) is not None]
    assert chosen == sorted(chosen)
    assert len(chosen) == ranks
    uses = [chosen.count(index) for index in set(chosen)]
    assert max(uses) - min(uses) <= 1
    assert len(uses) == min(ranks, count)


def test_a_rank_beyond_the_last_and_no_ranks() -> None:
    assert choose_device(names("a", "b"), 5, 2) == Device("b")
    assert choose_device(names("a"), 0, 0) == Device("a")
    assert choose_device([], 0, 1) is None


def test_the_nearest_by_numa_distance(tmp_path: Path) -> None:
    a_machine(tmp_path, {"mlx5_0": 0, "mlx5_1": 1, "mlx5_2": 0, "mlx5_3": 1}, TWO)
    devices = names("mlx5_0", "mlx5_1", "mlx5_2", "mlx5_3")
    near_0 = [choose_device(devices, rank, 4, 0, tmp_path) for rank in range(4)]
    near_1 = [choose_device(devices, rank, 4, 1, tmp_path) for rank in range(4)]
    assert [device and device.name for device in near_0] == ["mlx5_0", "mlx5_0", "mlx5_2", "mlx5_2"]
    assert [device and device.name for device in near_1] == ["mlx5_1", "mlx5_1", "mlx5_3", "mlx5_3"]


def test_a_device_whose_place_is_known_before_one_whose_is_not(tmp_path: Path) -> None:
    a_machine(tmp_path, {"mlx5_0": -1, "mlx5_1": 1}, TWO)
    assert choose_device(names("mlx5_0", "mlx5_1"), 0, 2, 0, tmp_path) == Device("mlx5_1")
    assert choose_device(names("mlx5_0"), 0, 2, 0, tmp_path) == Device("mlx5_0")
