"""Which RDMA device a rank uses: the nearest by NUMA distance, else in blocks of ranks. Plain functions over sysfs.

Sources: Documentation/ABI/stable/sysfs-class-infiniband and sysfs-devices-node of the Linux kernel; the blocks are as AIBrix documents
them (8 GPUs, 2 devices: ranks 0 to 3 use the first, 4 to 7 the second).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvoffload.errors import UnsupportedError

SYSFS = Path("/sys")
_FAR = 1 << 30
_DEVICE = re.compile(r"([A-Za-z0-9_.-]{1,63})(?::(\d{1,5}))?")  # IB_DEVICE_NAME_MAX is 64, with the final zero


@dataclass(frozen=True, slots=True)
class Device:
    """``name`` as in /sys/class/infiniband; ``gid_index`` of its port's table, None: whoever connects finds one."""

    name: str
    gid_index: int | None = None


def parse_device(text: str) -> Device:
    """``mlx5_1`` or, with the index of a GID, ``mlx5_1:7``. Raises UnsupportedError."""
    match = _DEVICE.fullmatch(text.strip())
    if match is None:
        raise UnsupportedError(f"l2.devices: {text!r} is no device: write mlx5_0, or mlx5_0:7 with the index of a GID")
    return Device(match[1], None if match[2] is None else int(match[2]))


def parse_devices(texts: Iterable[str]) -> tuple[Device, ...]:
    """In their order. Raises UnsupportedError, also for a device that is named twice."""
    devices = tuple(parse_device(text) for text in texts)
    names = [device.name for device in devices]
    if len(set(names)) < len(names):
        raise UnsupportedError(f"l2.devices names a device twice: {', '.join(names)}")
    return devices


def devices_here(sysfs: Path = SYSFS) -> tuple[Device, ...]:
    """All that the kernel has, by name, the numbers in it as numbers."""
    try:
        names = [entry.name for entry in (sysfs / "class/infiniband").iterdir()]
    except OSError:
        return ()
    by_number = sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
    return tuple(Device(name) for name in by_number)


def has_device(name: str, sysfs: Path = SYSFS) -> bool:
    """Asked first because the native client, given a name that does not exist, takes another device and says nothing."""
    return (sysfs / "class/infiniband" / name).is_dir()


def numa_node_of(device: str, sysfs: Path = SYSFS) -> int | None:
    """The NUMA node that the device hangs on; None where the machine has no such thing, or does not tell."""
    return _number(sysfs / "class/infiniband" / device / "device/numa_node")


def numa_node_of_cpus(cpus: Iterable[int], sysfs: Path = SYSFS) -> int | None:
    """The one NUMA node that has all of these CPUs (those that a rank may run on); None where they are spread over several."""
    wanted = set(cpus)
    for folder in (sysfs / "devices/system/node").glob("node[0-9]*"):
        if wanted and wanted <= _listed(folder / "cpulist"):
            return int(folder.name.removeprefix("node"))
    return None


def numa_distance(from_node: int, to_node: int | None, sysfs: Path = SYSFS) -> int:
    """As the firmware tells it: 10 within a node. Very far where that is not known."""
    if to_node is None:
        return _FAR
    try:
        distances = (sysfs / f"devices/system/node/node{from_node}/distance").read_text().split()
        return int(distances[_online(sysfs).index(to_node)])
    except (OSError, ValueError, IndexError):
        return 10 if from_node == to_node else _FAR


def choose_device(devices: Sequence[Device], rank: int, ranks: int, numa_node: int | None = None, sysfs: Path = SYSFS) -> Device | None:
    """The device for ``rank`` of ``ranks`` on this machine, whose memory is on ``numa_node`` (None: not known); None of none.

    Of those that are equally near it is one in blocks of ranks.
    """
    if not devices:
        return None
    near = list(devices)
    if numa_node is not None:
        distances = [numa_distance(numa_node, numa_node_of(device.name, sysfs), sysfs) for device in devices]
        near = [device for device, distance in zip(devices, distances, strict=True) if distance == min(distances)]
    return near[min(rank * len(near) // max(1, ranks), len(near) - 1)]


def _online(sysfs: Path) -> list[int]:
    """The columns of a distance file: there is one for each node that is online, whatever its number."""
    return sorted(int(folder.name.removeprefix("node")) for folder in (sysfs / "devices/system/node").glob("node[0-9]*"))


def _number(path: Path) -> int | None:
    try:
        number = int(path.read_text())
    except (OSError, ValueError):
        return None
    return number if number >= 0 else None


def _listed(path: Path) -> set[int]:
    """``0-3,8`` as numbers (Documentation/admin-guide/cputopology)."""
    try:
        parts = [part.partition("-") for part in path.read_text().strip().split(",") if part]
        return {cpu for first, _, last in parts for cpu in range(int(first), int(last or first) + 1)}
    except (OSError, ValueError):
        return set()
