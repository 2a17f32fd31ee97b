"""The slots of one rank: a memfd made by its worker half, populated bit by bit, mapped by the hub."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from kvoffload.errors import CapacityError, MisuseError
from kvoffload.memfd import check_memfd, close_fd, create_memfd, map_memfd, unmap

_MADV_POPULATE_WRITE = 23  # Linux 5.14, include/uapi/asm-generic/mman-common.h; not in Python's mmap module
STEP_BYTES = 16 << 20
_PAGE = mmap.PAGESIZE

# Through ctypes because it releases the interpreter lock; mmap.madvise of CPython 3.11 holds it, 3 to 10 ms for each step.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.restype = ctypes.c_int


class Crew(Protocol):
    """Threads that populate memory together: several are faster, and pages lie near the CPU that touches them first."""

    @property
    def threads(self) -> int: ...

    def run(self, parts: Sequence[Callable[[], None]]) -> None:
        """Run all parts, at once as far as can be; when this returns, or raises the error of the first that failed, all have ended."""
        ...


class Segment:
    """``slots`` slots of ``slot_bytes`` each, in shared memory. `array` is flat uint8; slot *i* starts at ``i * slot_bytes``."""

    def __init__(self, fd: int, slots: int, slot_bytes: int, *, populated: bool) -> None:
        self.fd = fd
        self.slots = slots
        self.slot_bytes = slot_bytes
        self.num_bytes = slots * slot_bytes
        self._mapping = map_memfd(fd, self.num_bytes, writable=True)
        # Out of core dumps (it may be huge, and it holds users' text), and not copied or kept alive by forked children.
        self._mapping.madvise(mmap.MADV_DONTDUMP)
        self._mapping.madvise(mmap.MADV_DONTFORK)
        self.array: NDArray[np.uint8] = np.frombuffer(self._mapping, dtype=np.uint8, count=self.num_bytes)
        self.address: int = self.array.ctypes.data
        self._populated_bytes = self.num_bytes if populated else 0
        self._can_advise = True
        self._closed = False

    @classmethod
    def create(cls, capacity_bytes: int, slot_bytes: int) -> Self:
        """As many slots as fit into ``capacity_bytes``; no memory is taken until `populate_next`. Raises CapacityError."""
        if slot_bytes < 1:
            raise MisuseError(f"a slot cannot have {slot_bytes} bytes")
        slots = capacity_bytes // slot_bytes
        if slots < 1:
            raise CapacityError(f"{capacity_bytes} bytes hold no slot of {slot_bytes}: raise l1.capacity_gb")
        fd = create_memfd("kvoffload-segment", slots * slot_bytes)
        try:
            return cls(fd, slots, slot_bytes, populated=False)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int, slots: int, slot_bytes: int) -> Self:
        """Map the segment of another process. Takes over ``fd``. Raises PeerError when it is too small or not sealed."""
        check_memfd(fd, slots * slot_bytes, "segment")
        return cls(fd, slots, slot_bytes, populated=True)

    @property
    def populated_slots(self) -> int:
        """Slots that lie wholly in memory already taken."""
        return self._populated_bytes // self.slot_bytes

    @property
    def unpopulated_bytes(self) -> int:
        """What is still to be taken."""
        return self.num_bytes - self._populated_bytes

    def slot(self, index: int) -> NDArray[np.uint8]:
        """The bytes of one slot, header first."""
        if not 0 <= index < self.slots:
            raise MisuseError(f"slot {index} is not one of {self.slots}")
        return self.array[index * self.slot_bytes : (index + 1) * self.slot_bytes]

    def populate_next(self, step_bytes: int = STEP_BYTES, crew: Crew | None = None) -> int:
        """Take the next ``step_bytes`` of memory, lock released, here or by ``crew``; gives the slots usable so far.

        Raises CapacityError when there is no memory: what was taken before stays usable. One thread at a time.
        """
        keep = self.array  # taken before the check: it keeps the mapping, should another thread close the segment meanwhile
        if self._closed:
            raise MisuseError("the segment is closed")
        start = self._populated_bytes
        end = min(self.num_bytes, -(-(start + step_bytes) // _PAGE) * _PAGE)
        if start < end and crew is None:
            self._populate(start, end)
            self._populated_bytes = end
        elif start < end:
            assert crew is not None
            self._populate_by(crew, start, end)
        del keep
        return self.populated_slots

    def _populate_by(self, crew: Crew, start: int, end: int) -> None:
        share = max(_PAGE, -(-(end - start) // crew.threads // _PAGE) * _PAGE)
        starts = range(start, end, share)
        done = dict.fromkeys(starts, False)

        def populate(first: int) -> None:
            self._populate(first, min(end, first + share))
            done[first] = True

        try:
            crew.run([partial(populate, first) for first in starts])
        finally:
            self._populated_bytes = next((first for first in starts if not done[first]), end)
            if self._populated_bytes < end:  # others got memory behind the part that got none: give it back, it is short
                with contextlib.suppress(OSError):
                    self._mapping.madvise(mmap.MADV_REMOVE, self._populated_bytes, end - self._populated_bytes)

    def _populate(self, start: int, end: int) -> None:
        if self._can_advise:
            first = start // _PAGE * _PAGE
            code = self._advise_populate(self.address + first, end - first)
            while code == errno.EINTR:
                code = self._advise_populate(self.address + first, end - first)
            if code == 0:
                return
            if code != errno.EINVAL:
                raise CapacityError(f"no memory for bytes {start} to {end} of the segment: {os.strerror(code)}")
            self._can_advise = False
        # Older kernels: allocating first turns "no memory" into an error, where touching the pages would end us with SIGBUS.
        try:
            os.posix_fallocate(self.fd, start, end - start)
        except OSError as error:
            raise CapacityError(f"no memory for bytes {start} to {end} of the segment: {error}") from error
        ctypes.memset(self.address + start, 0, end - start)

    def _advise_populate(self, address: int, num_bytes: int) -> int:
        """0 or the errno."""
        return 0 if _libc.madvise(address, num_bytes, _MADV_POPULATE_WRITE) == 0 else ctypes.get_errno()

    def close(self) -> None:
        """Let go of the memory; whoever still holds `array` keeps it, and another process its mapping. May be called twice."""
        if not self._closed:
            self._closed = True
            self.array = np.empty(0, dtype=np.uint8)
            close_fd(self.fd)
            unmap(self._mapping)
