"""A segment's memory, page-locked for the GPU: registered piece by piece, and given back before it is unmapped."""

from __future__ import annotations

import math
import mmap
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvoffload.cuda.driver import CudaError, Driver
from kvoffload.observe.logs import get_logger
from kvoffload.segment import Segment

log = get_logger("pinned")

PORTABLE, DEVICEMAP = 1, 2
"""CU_MEMHOSTREGISTER_PORTABLE: pinned for all contexts; CU_MEMHOSTREGISTER_DEVICEMAP: kernels may use it (cuda.h). Not write-combined,
which registered memory never is: checksums and sends read slots, and reading write-combined memory is prohibitively slow."""

_GIB = 1 << 30
_ABOUT_MEMORY = frozenset((1, 2, 304, 712, 800, 801, 999))
"""CUresult that is an answer to the registration itself. Any other tells of something worse, and its own text says what to do."""

_still_registered: list[NDArray[np.uint8]] = []
"""Memory that the driver would not give back. It stays mapped: another mapping in its place would be taken for pinned."""


class PinnedSegment:
    """Pins the slots of ``segment`` in pieces of at most ``piece_bytes`` (and of at least one slot).

    A piece begins and ends on a boundary of pages and of slots, so that no copy of a slot lies in two registrations, which the
    driver refuses. What is pinned is always the slots before `pinned_slots`. Once a piece is refused nothing more is tried: the
    rest is used as it is, unpinned. ``pin`` False: all of it.
    """

    def __init__(self, driver: Driver, segment: Segment, *, piece_bytes: int, pin: bool = True) -> None:
        self._driver = driver
        self._segment = segment
        self._array = segment.array  # held: the addresses stay good
        self._address = segment.address
        # So many slots together are whole pages. One, but for pages of 64 KiB (arm64), of which a slot may be a part.
        self._unit = math.lcm(segment.slot_bytes, mmap.PAGESIZE) // segment.slot_bytes
        self._piece_slots = self.slots_of(piece_bytes)
        self._lock = threading.Lock()
        self._pieces: list[int] = []  # addresses, in the order of registration
        self._pinned_slots = self._usable = 0
        self._is_closed = self._is_hidden = False
        self.refused: str | None = None if pin else "gpu.pin is false"
        """Why the slots from `pinned_slots` on are not pinned and will not be."""
        self.device_pointer_is_host_pointer = True
        """Whether kernels may use the host's addresses of all that is pinned. Where nothing is pinned it says nothing."""

    def slots_of(self, piece_bytes: int) -> int:
        """How many slots a piece of at most so many bytes has; as few as can be pinned at all where these are more."""
        return max(1, piece_bytes // (self._unit * self._segment.slot_bytes)) * self._unit

    @property
    def pinned_slots(self) -> int:
        """Slots 0 to this, without it, are pinned."""
        return self._pinned_slots

    @property
    def pinned_bytes(self) -> int:
        return self._pinned_slots * self._segment.slot_bytes

    def is_pinned(self, slots: NDArray[np.int64]) -> NDArray[np.bool_]:
        """For each of these slots."""
        flags: NDArray[np.bool_] = slots < self._pinned_slots
        return np.zeros_like(flags) if self._is_hidden else flags

    @contextmanager
    def taken_for_unpinned(self) -> Iterator[None]:
        """Within this no slot counts as pinned: for a proof of how copies go where the driver pins no more."""
        self._is_hidden = True
        try:
            yield
        finally:
            self._is_hidden = False

    def prepare(self, populated: int) -> int:
        """Pin what is whole of the slots before ``populated``, whose memory has been taken; the slots that may be used.

        Blocks for some 0.1 s per GiB. Never while a CUDA graph is captured, by whichever thread: registering would break that. Does
        not raise when the driver refuses; raises CudaError when this thread cannot use the device at all.
        """
        with self._lock:
            if self._is_closed:
                return self._usable
            if self.refused is None:
                self._pin_up_to(populated)
            whole = populated if self.refused is not None else self._pinned_slots
            self._usable = max(self._usable, whole)
            return self._usable

    def _pin_up_to(self, populated: int) -> None:
        whole = populated if populated >= self._segment.slots else populated - populated % self._unit
        if self._pinned_slots >= whole:
            return
        self._driver.bind()
        while self._pinned_slots < whole:
            end = min(self._pinned_slots + self._piece_slots, whole)
            try:
                self._register(self._pinned_slots, end)
            except CudaError as error:
                self._refuse(error)
                return
            self._pinned_slots = end

    def _register(self, first: int, end: int) -> None:
        address = self._address + first * self._segment.slot_bytes
        num_bytes = (end - first) * self._segment.slot_bytes
        num_bytes += -num_bytes % mmap.PAGESIZE  # the very last one: the mapping goes on to the end of its page
        self._driver.call("cuMemHostRegister", address, num_bytes, PORTABLE | DEVICEMAP)
        self._pieces.append(address)
        if self.device_pointer_is_host_pointer:
            try:
                self.device_pointer_is_host_pointer = int(self._driver.call("cuMemHostGetDevicePointer", address, 0)) == address
            except CudaError as error:
                self.device_pointer_is_host_pointer = False  # DMA does not mind
                log.debug("kernels cannot use pinned memory", reason=str(error))
                self._drain()

    def _refuse(self, error: CudaError) -> None:
        self.refused = f"{error.function} failed: {error.name} ({error.code})"
        self._drain()
        segment = self._segment
        log.warning(
            "the driver pins no more of L1: copies of the rest are several times slower",
            pinned_gib=round(self.pinned_bytes / _GIB, 2),
            of_gib=round(segment.num_bytes / _GIB, 2),
            reason=self.refused,
            advice="; ".join(advice(error.name)) if error.code in _ABOUT_MEMORY else str(error),
        )

    def _drain(self) -> None:
        """An error that the driver keeps for the next call is answered to this one, and not to somebody else's.

        (The runtime API's last error, which torch looks at, is not touched by calls of the driver API.)
        """
        with suppress(CudaError):
            self._driver.call("cuCtxGetDevice")

    def close(self) -> None:
        """Give everything back, the last piece first. Nothing may be copied any more. May be called twice, and from any thread."""
        with self._lock:
            self._is_closed = True
            if not self._pieces:
                return
            try:
                self._driver.bind()
            except CudaError as error:
                self._keep(error)
                return
            failed: CudaError | None = None
            while self._pieces:
                try:
                    self._driver.call("cuMemHostUnregister", self._pieces.pop())
                except CudaError as error:
                    failed = failed or error
            self._pinned_slots = 0
            if failed is not None:
                self._drain()
                self._keep(failed)

    def _keep(self, error: CudaError) -> None:
        self._pieces.clear()
        _still_registered.append(self._array)
        log.warning("the driver does not give pinned memory back: it stays taken until this process ends", reason=str(error))


def advice(error_name: str, root: Path = Path("/")) -> Iterator[str]:
    """What may help where the driver refuses to pin memory, most likely first."""
    if "OUT_OF_MEMORY" in error_name:
        yield "less memory (l1.capacity_gb) may fit"
    if "ALREADY_REGISTERED" in error_name:
        yield "something else in this process has pinned it: please report this"
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    is_container = any((root / sign).exists() for sign in (".dockerenv", "run/.containerenv", "run/secrets/kubernetes.io"))
    if limit != resource.RLIM_INFINITY:
        here, there = "ulimit -l unlimited, or LimitMEMLOCK=infinity", "docker run --ulimit memlock=-1, or the capability IPC_LOCK"
        yield f"the limit on locked memory is {limit / (1 << 20):g} MiB: raise it ({there if is_container else here})"
    elif is_container:
        yield "this is a container, whose runtime may forbid it: try the capability IPC_LOCK"
    with suppress(OSError, UnicodeDecodeError):
        if "microsoft" in (root / "proc/sys/kernel/osrelease").read_text().lower():
            yield "WSL pins only a part of its memory: give it more (.wslconfig), or take less (l1.capacity_gb)"
    yield "gpu.pin = false says that this is known"
