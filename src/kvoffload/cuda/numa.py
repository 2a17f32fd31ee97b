"""Memory near the GPU: which CPUs are on its NUMA node, and threads on them that touch pages first, which places them there.

Pinned pages never move: those on another node than the GPU's are slower to copy for good.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvoffload.observe.logs import get_logger

log = get_logger("numa")

FEWEST_THREADS, MOST_THREADS = 2, 8


def node_of(pci_bus_id: str, sys_root: Path = Path("/sys")) -> int | None:
    """The NUMA node of a device, by its address on the PCI bus ("0000:3B:00.0"); None where there is none, or nothing says so.

    Source: Documentation/ABI/testing/sysfs-bus-pci of the Linux kernel, ``numa_node``; -1 is "not known".
    """
    domain, _, rest = pci_bus_id.strip().lower().partition(":")
    name = f"{domain[-4:].zfill(4)}:{rest}"  # nvidia-smi writes domains of eight digits
    try:
        node = int((sys_root / "bus/pci/devices" / name / "numa_node").read_text())
    except (OSError, ValueError) as error:
        log.debug("the GPU's NUMA node is not known", device=name, reason=str(error))
        return None
    return node if node >= 0 else None


def cpus_of(node: int, sys_root: Path = Path("/sys")) -> frozenset[int]:
    """The CPUs of a NUMA node; none where it has none, or nothing says so."""
    try:
        return frozenset(_parsed((sys_root / "devices/system/node" / f"node{node}" / "cpulist").read_text()))
    except (OSError, ValueError) as error:
        log.debug("the CPUs of a NUMA node are not known", node=node, reason=str(error))
        return frozenset()


def cpus_near(pci_bus_id: str | None, sys_root: Path = Path("/sys")) -> frozenset[int]:
    """CPUs whose memory is near this device, of those that this process may use where there are any; else all that it may use."""
    allowed = frozenset(os.sched_getaffinity(0))
    node = node_of(pci_bus_id, sys_root) if pci_bus_id is not None else None
    near = cpus_of(node, sys_root) if node is not None else frozenset[int]()
    return near & allowed or allowed


def _parsed(cpulist: str) -> list[int]:
    """``0-3,8`` as its numbers."""
    cpus: list[int] = []
    for part in cpulist.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


@dataclass(frozen=True, slots=True)
class BoundThreads:
    """A `kvoffload.segment.Crew` of threads that are bound to ``cpus``. It holds none: they begin and end with each `run`."""

    cpus: frozenset[int]

    @property
    def threads(self) -> int:
        return max(FEWEST_THREADS, min(MOST_THREADS, len(self.cpus)))

    def run(self, parts: Sequence[Callable[[], None]]) -> None:
        """Run each part in a thread of its own, as nice as this one, and wait for all. Raises the error of the first that failed."""
        errors: dict[int, BaseException] = {}

        def run(number: int, bound: bool = True) -> None:
            try:
                if bound:
                    _bind(self.cpus)
                parts[number]()
            except BaseException as error:
                errors[number] = error

        started: list[threading.Thread] = []
        for number in range(len(parts)):
            thread = threading.Thread(target=run, args=(number,), name="kvoffload-touch", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # a limit on threads: then without, and wherever this thread is
                log.debug("no thread to populate memory with", reason=str(error))
                run(number, bound=False)
            else:
                started.append(thread)
        for thread in started:
            thread.join()
        if errors:
            raise errors[min(errors)]


def _bind(cpus: frozenset[int]) -> None:
    """Keep this thread to these CPUs. A refusal is no error: memory then comes from another node."""
    try:
        os.sched_setaffinity(0, cpus)
    except (OSError, ValueError) as error:
        log.debug("a thread is not bound to the GPU's NUMA node", reason=str(error))
