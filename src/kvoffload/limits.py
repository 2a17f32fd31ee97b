"""How much memory this process may still take: the machine's, and that of every control group it is in.

Files and figures: Documentation/admin-guide/cgroup-v2.rst ("Memory") and cgroup-v1/memory.rst of the Linux kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kvoffload.errors import CapacityError

_UNLIMITED = 1 << 60  # v1 says "no limit" as a huge number, rounded down to pages
DEFAULT_RESERVE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Available:
    """``bytes`` that may still be taken, and which figure said so."""

    bytes: int
    source: str


def available_bytes(proc_root: str = "/proc", cgroup_root: str = "/sys/fs/cgroup") -> Available:
    """The smallest of MemAvailable and (limit - use) of every control group above this process.

    Raises CapacityError if nothing can be read.
    """
    bounds = [*_machine(Path(proc_root)), *_groups(Path(proc_root), Path(cgroup_root))]
    if not bounds:
        raise CapacityError(f"cannot tell how much memory there is: {proc_root}/meminfo gives no MemAvailable")
    return min(bounds, key=lambda bound: bound.bytes)


def check_capacity(
    capacity_bytes: int,
    reserve_bytes: int = DEFAULT_RESERVE_BYTES,
    *,
    proc_root: str = "/proc",
    cgroup_root: str = "/sys/fs/cgroup",
) -> Available:
    """Raise CapacityError unless ``capacity_bytes`` can be taken and ``reserve_bytes`` are left to everybody else."""
    available = available_bytes(proc_root, cgroup_root)
    if capacity_bytes + reserve_bytes > available.bytes:
        fits = max(0, available.bytes - reserve_bytes)
        raise CapacityError(
            f"L1 of {_gib(capacity_bytes)} with {_gib(reserve_bytes)} left to others does not fit into the {_gib(available.bytes)} "
            f"available ({available.source}): set l1.capacity_gb to at most {fits / (1 << 30):.2f}, lower l1.reserve_bytes, "
            "or raise the memory limit"
        )
    return available


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB"


def _machine(proc: Path) -> Iterator[Available]:
    kib = _field(proc / "meminfo", "MemAvailable:")
    if kib is not None:
        yield Available(kib * 1024, f"MemAvailable of {proc / 'meminfo'}")


def _groups(proc: Path, root: Path) -> Iterator[Available]:
    """A process has one path per v1 hierarchy, and one in the v2 hierarchy (``0::path``); either may hold the memory controller."""
    text = _read(proc / "self" / "cgroup") or ""
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            for mount in (root, root / "unified"):
                for group in _up_from(mount, path):
                    yield from _v2(group)
        elif "memory" in controllers.split(","):
            for group in _up_from(root / "memory", path):
                yield from _v1(group)


def _up_from(mount: Path, path: str) -> Iterator[Path]:
    """This process's group under ``mount`` and everything above it.

    In a container the path may be the host's while the mount shows only a lower part of the tree (down to the own group as its
    root): then the longest tail of the path that is there is the own group, at worst the mount's root.
    """
    parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
    for skipped in range(len(parts) + 1):
        group = mount.joinpath(*parts[skipped:])
        if group.is_dir():
            yield group
            while group != mount:
                group = group.parent
                yield group
            return


def _v2(group: Path) -> Iterator[Available]:
    used = _number(group / "memory.current")
    if used is None:
        return
    used -= _field(group / "memory.stat", "inactive_file") or 0
    for name in ("memory.max", "memory.high"):  # above "high" a group is not killed, but throttled to a crawl
        limit = _number(group / name)  # "max" is no number: no limit
        if limit is not None:
            yield Available(max(0, limit - used), f"{group / name}")


def _v1(group: Path) -> Iterator[Available]:
    used = _number(group / "memory.usage_in_bytes")
    if used is None:
        return
    stat = group / "memory.stat"
    reclaimable = _field(stat, "total_inactive_file")
    used -= reclaimable if reclaimable is not None else _field(stat, "inactive_file") or 0
    # The hierarchical limit also counts ancestors that a container cannot see.
    for limit, name in (
        (_number(group / "memory.limit_in_bytes"), "memory.limit_in_bytes"),
        (_field(stat, "hierarchical_memory_limit"), "memory.stat (hierarchical_memory_limit)"),
    ):
        if limit is not None and limit < _UNLIMITED:
            yield Available(max(0, limit - used), f"{group / name}")


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return None


def _number(path: Path) -> int | None:
    text = (_read(path) or "").strip()
    return int(text) if text.isdecimal() else None


def _field(path: Path, name: str) -> int | None:
    for line in (_read(path) or "").splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == name and words[1].isdecimal():
            return int(words[1])
    return None
