"""The machine around the GPU: its memory, and what this process may do with it."""

from __future__ import annotations

import mmap
import os
import platform
import resource
from pathlib import Path

from kvoffload.copy.choose import why_no_gpu
from kvoffload.cuda.numa import cpus_of
from kvoffload.doctor.report import Finding, Section
from kvoffload.errors import CapacityError
from kvoffload.limits import available_bytes

_GIB = 1 << 30
_CONTAINERS = {"docker": ".dockerenv", "podman": "run/.containerenv", "kubernetes": "run/secrets/kubernetes.io"}


def machine(root: Path = Path("/")) -> Section:
    """CPUs, memory, limits."""
    allowed = os.sched_getaffinity(0)
    nodes = sorted(int(path.name[4:]) for path in (root / "sys/devices/system/node").glob("node[0-9]*"))
    spread = ", ".join(f"{len(cpus_of(node, root / 'sys') & allowed)} of node {node}" for node in nodes)
    return Section(
        "machine",
        (
            Finding("kernel", f"{platform.system()} {platform.release()} {platform.machine()}, pages of {mmap.PAGESIZE >> 10} KiB"),
            Finding("container", container(root) or "none seen"),
            Finding("CPUs of this process", f"{len(allowed)}" + (f" ({spread})" if spread else "")),
            Finding("memory", _memory(root)),
            Finding("memory that may be taken", _available(root)),
            Finding("limit on locked memory", memlock()),
        ),
    )


def engine() -> Section:
    """Which copy engine there would be."""
    why = why_no_gpu()
    if why is None:
        text = "cuda, where vLLM's KV cache is in a GPU; `kvoffload doctor --gpu` proves it"
    else:
        text = f"host: the CPU copies, where vLLM's KV cache is in ordinary memory; no other can be, as there is {why}"
    return Section("copy engine", (Finding("would be chosen", text),))


def memlock() -> str:
    """RLIMIT_MEMLOCK, in words."""
    soft, hard = (_limit(value) for value in resource.getrlimit(resource.RLIMIT_MEMLOCK))
    return soft if soft == hard else f"{soft}, may be raised to {hard}"


def container(root: Path = Path("/")) -> str | None:
    """What kind, as far as it leaves signs."""
    signs = [kind for kind, sign in _CONTAINERS.items() if (root / sign).exists()]
    if "microsoft" in _read(root / "proc/sys/kernel/osrelease").lower():
        signs.append("WSL")
    return ", ".join(signs) or None


def _limit(value: int) -> str:
    return "none" if value == resource.RLIM_INFINITY else f"{value / (1 << 20):g} MiB"


def _memory(root: Path) -> str:
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemTotal" and value.split():
            return f"{int(value.split()[0]) * 1024 / _GIB:.1f} GiB"
    return "not known"


def _available(root: Path) -> str:
    try:
        found = available_bytes(str(root / "proc"), str(root / "sys/fs/cgroup"))
    except CapacityError as error:
        return str(error)
    return f"{found.bytes / _GIB:.1f} GiB, says {found.source}"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
