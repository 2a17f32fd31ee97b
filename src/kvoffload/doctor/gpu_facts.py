"""What the driver and the kernel say of a GPU and of its link."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvoffload.cuda.driver import CudaError, Driver
from kvoffload.cuda.numa import node_of
from kvoffload.doctor.report import Finding

NOT_A_GPU = "this is a stand-in for the driver, no GPU: no figure here says anything about one"

_GENERATIONS = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}
"""GT/s of each generation of PCI Express."""


@dataclass(frozen=True, slots=True)
class Link:
    """Of PCI Express: GT/s and lanes, as they are now and at most. A GPU that has nothing to do slows its link down."""

    speed: float
    width: int
    most_speed: float
    most_width: int

    def __str__(self) -> str:
        now, most = _words(self.speed, self.width), _words(self.most_speed, self.most_width)
        return now if now == most else f"{now} now, {most} at most"


def link_of(pci_bus_id: str, sys_root: Path = Path("/sys")) -> Link | None:
    """None where the kernel does not say. Source: Documentation/ABI/testing/sysfs-bus-pci, ``current_link_speed`` and its like."""
    domain, _, rest = pci_bus_id.strip().lower().partition(":")
    device = sys_root / "bus/pci/devices" / f"{domain[-4:].zfill(4)}:{rest}"
    try:
        texts = [(device / name).read_text() for name in ("current_link_speed", "current_link_width", "max_link_speed", "max_link_width")]
        speed, width, most_speed, most_width = (float(text.split()[0]) for text in texts)
    except (OSError, ValueError, IndexError):
        return None
    return Link(speed, int(width), most_speed, int(most_width))


def device_facts(driver: Driver, root: Path = Path("/")) -> Iterator[Finding]:
    """Those that do not change while the program runs. Raises CudaError."""
    if is_stand_in():
        yield Finding("NOT A GPU", NOT_A_GPU)
    yield Finding("GPU", f"{driver.name}, compute capability {driver.capability[0]}.{driver.capability[1]}, number {driver.ordinal}")
    version = driver.driver_version
    yield Finding("driver", f"knows CUDA up to {version // 1000}.{version % 1000 // 10}{_kernel_module(root)}")
    yield Finding("libcuda", " ".join(libraries()) or "not seen in this process")
    yield Finding("PCI", driver.pci_bus_id)
    node = node_of(driver.pci_bus_id, root / "sys")
    yield Finding("NUMA node", "not known, or only one" if node is None else str(node))
    driver.bind()
    free, total = driver.call("cuMemGetInfo")
    yield Finding("memory of the GPU", f"{free / (1 << 30):.1f} of {total / (1 << 30):.1f} GiB free")
    for name, attribute in _ATTRIBUTES.items():
        try:
            yield Finding(name, str(driver.attribute(attribute)))
        except (CudaError, AttributeError) as error:  # one that this driver, or these bindings, do not know
            yield Finding(name, f"not known: {error}")


def link_fact(driver: Driver, root: Path = Path("/")) -> Finding:
    """To be asked for while or right after something was copied."""
    link = link_of(driver.pci_bus_id, root / "sys")
    return Finding("PCI Express link", "not known: the kernel does not say" if link is None else str(link))


def libraries(maps: Path = Path("/proc/self/maps")) -> list[str]:
    """The files that are libcuda in this process."""
    try:
        lines = maps.read_text().splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if Path(path).name.startswith("libcuda.so"))


def is_stand_in() -> bool:
    """Whether tests put something in place of the driver, whose speed must not be taken for a GPU's."""
    for path in libraries():
        try:
            if hasattr(ctypes.CDLL(path), "standin_reset"):
                return True
        except OSError:
            continue
    return False


_ATTRIBUTES = {
    "multiprocessors": "MULTIPROCESSOR_COUNT",
    "copy engines": "ASYNC_ENGINE_COUNT",
    "kernels use host pointers": "CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM",
    "host memory can be registered": "HOST_REGISTER_SUPPORTED",
    "reads pageable memory": "PAGEABLE_MEMORY_ACCESS",
    "shares memory with the CPU": "INTEGRATED",
    "compute mode": "COMPUTE_MODE",
}


def _words(speed: float, width: int) -> str:
    generation = _GENERATIONS.get(speed)
    return f"{f'generation {generation}' if generation else f'{speed:g} GT/s'} x{width}"


def _kernel_module(root: Path) -> str:
    try:
        line = (root / "proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return ""
    return f"; {line.strip()}"
