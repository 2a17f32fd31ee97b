from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from kvoffload.errors import CapacityError, MisuseError, PeerError
from kvoffload.segment import Segment

MIB = 1 << 20
WAIT_S = 20.0


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = Segment.create(4 * MIB + 100, 8192)
    yield made
    made.close()


def resident_bytes(segment: Segment) -> int:
    """What the memfd really occupies."""
    return os.fstat(segment.fd).st_blocks * 512


def test_as_many_slots_as_fit(segment: Segment) -> None:
    assert segment.slots == 512
    assert len(segment.array) == 4 * MIB
    assert segment.address == segment.array.ctypes.data
    assert segment.address % 4096 == 0
    segment.slot(3)[:] = 7
    assert segment.array[3 * 8192 - 1] == 0
    assert segment.array[3 * 8192 : 4 * 8192].min() == 7
    assert segment.array[4 * 8192] == 0
    for wrong in (-1, 512):
        with pytest.raises(MisuseError):
            segment.slot(wrong)


def test_no_room_for_one_slot() -> None:
    with pytest.raises(CapacityError, match="hold no slot"):
        Segment.create(4096, 8192)


def test_populating_takes_memory_step_by_step(segment: Segment) -> None:
    assert resident_bytes(segment) == 0
    assert segment.populated_slots == 0
    assert segment.populate_next(MIB) == 128
    assert resident_bytes(segment) == MIB
    assert segment.populate_next(1) == 128  # rounded up to a page, which is half a slot
    assert segment.populate_next(MIB) == 256
    while segment.populate_next(MIB) < segment.slots:
        pass
    assert resident_bytes(segment) == 4 * MIB
    assert segment.populate_next(MIB) == 512


def test_slots_that_are_no_whole_pages() -> None:
    segment = Segment.create(100_000, 3000)
    grown = [segment.populate_next(4096)]
    while grown[-1] < segment.slots:
        grown.append(segment.populate_next(4096))
    assert grown[0] == 1
    assert grown == sorted(grown)
    assert grown[-1] == 33
    segment.close()


class OldKernel(Segment):
    """Where madvise knows no MADV_POPULATE_WRITE."""

    calls = 0

    def _advise_populate(self, address: int, num_bytes: int) -> int:
        self.calls += 1
        return errno.EINVAL


def test_old_kernels_populate_by_writing() -> None:
    segment = OldKernel.create(4 * MIB, 8192)
    assert segment.populate_next(MIB) == 128
    assert segment.populate_next(MIB) == 256
    assert resident_bytes(segment) == 2 * MIB
    assert segment.calls == 1  # asked once
    assert not segment.array[: 2 * MIB].any()


class FullMachine(Segment):
    """Memory for three steps."""

    left = 3

    def _advise_populate(self, address: int, num_bytes: int) -> int:
        if not self.left:
            return errno.ENOMEM
        self.left -= 1
        return super()._advise_populate(address, num_bytes)


class Interrupted(Segment):
    """A signal comes in every other call."""

    is_interrupted = False

    def _advise_populate(self, address: int, num_bytes: int) -> int:
        self.is_interrupted = not self.is_interrupted
        return errno.EINTR if self.is_interrupted else super()._advise_populate(address, num_bytes)


def test_signals_do_not_matter() -> None:
    segment = Interrupted.create(4 * MIB, 8192)
    assert segment.populate_next(MIB) == 128
    assert resident_bytes(segment) == MIB


def test_out_of_memory_keeps_what_there_is() -> None:
    segment = FullMachine.create(4 * MIB, 8192)
    segment.populate_next(MIB)
    segment.populate_next(MIB)
    segment.populate_next(MIB)
    for _ in range(2):
        with pytest.raises(CapacityError, match="no memory for bytes 3145728"):
            segment.populate_next(MIB)
    assert segment.populated_slots == 384


def test_populating_lets_other_threads_run() -> None:
    # With the interpreter lock held through the call, no Python code could see it half done.
    for _ in range(20):
        segment = Segment.create(256 * MIB, 4096)
        thread = threading.Thread(target=segment.populate_next, args=(256 * MIB,))
        thread.start()
        is_half_done = False
        while thread.is_alive() and not is_half_done:
            is_half_done = 0 < resident_bytes(segment) < 256 * MIB
        thread.join(WAIT_S)
        segment.close()
        if is_half_done:
            return
    pytest.fail("never seen half done")


def test_both_processes_see_the_same_bytes(segment: Segment) -> None:
    other = Segment.attach(os.dup(segment.fd), segment.slots, segment.slot_bytes)
    segment.slot(5)[:4] = [1, 2, 3, 4]
    assert other.slot(5)[:4].tolist() == [1, 2, 3, 4]
    assert other.populated_slots == other.slots
    other.close()
    assert segment.slot(5)[3] == 4


def test_attach_refuses_what_could_kill_the_process(segment: Segment) -> None:
    with pytest.raises(PeerError, match="were announced"):
        Segment.attach(segment.fd, segment.slots + 1, segment.slot_bytes)
    unsealed = os.memfd_create("unsealed")
    os.ftruncate(unsealed, MIB)
    with pytest.raises(PeerError, match="not sealed"):
        Segment.attach(unsealed, 1, 8192)
    os.close(unsealed)


def test_bytes_in_use_outlive_close() -> None:
    segment = Segment.create(MIB, 4096)
    slot = segment.slot(1)
    slot[:] = 9
    segment.close()
    segment.close()
    assert slot.sum() == 9 * 4096
    with pytest.raises(MisuseError, match="closed"):
        segment.populate_next()


def test_not_in_core_dumps_and_not_in_children(segment: Segment) -> None:
    first = f"{segment.address:x}-"
    flags = ""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith(first):
            found = True
        elif found and line.startswith("VmFlags:"):
            flags = line
            break
    assert {"dd", "dc"} <= set(flags.split())


def test_populated_memory_is_zero_and_writable(segment: Segment) -> None:
    segment.populate_next(MIB)
    assert not segment.array[:MIB].any()
    segment.array[:MIB] = np.arange(MIB, dtype=np.uint8)
    assert segment.array[MIB - 1] == 255


# ------------------------------------------------------------ by several threads


class Threads:
    """A crew whose parts run one after the other, the last first."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.parts: list[int] = []

    def run(self, parts: Sequence[Callable[[], None]]) -> None:
        self.parts.append(len(parts))
        errors: list[Exception] = []
        for part in reversed(parts):
            try:
                part()
            except CapacityError as error:
                errors.append(error)
        if errors:
            raise errors[-1]


class Recording(Segment):
    """Tells what is populated, and has no memory at ``full_from``."""

    full_from = 1 << 60

    def _advise_populate(self, address: int, num_bytes: int) -> int:
        self.__dict__.setdefault("asked", []).append((address - self.address, num_bytes))
        if address - self.address <= self.full_from < address - self.address + num_bytes:
            return errno.ENOMEM
        return super()._advise_populate(address, num_bytes)


@pytest.mark.parametrize(
    ("threads", "step", "parts"), [(2, MIB, 2), (3, MIB, 3), (8, 3 * 4096, 3), (3, 4097, 2), (4, 1, 1), (8, 4 * MIB, 8)]
)
def test_a_step_is_shared_out_in_whole_pages_without_a_gap(threads: int, step: int, parts: int) -> None:
    segment = Recording.create(4 * MIB, 4096)
    crew = Threads(threads)
    segment.populate_next(step, crew)
    assert crew.parts == [parts]
    place = 0
    for start, num_bytes in sorted(segment.__dict__["asked"]):
        assert start == place
        assert start % 4096 == 0
        place += num_bytes
    assert segment.populated_slots == place // 4096 == -(-step // 4096)
    assert resident_bytes(segment) == place
    segment.close()


def test_a_thread_without_memory_leaves_what_is_before_it_and_nothing_is_kept_behind() -> None:
    segment = Recording.create(4 * MIB, 8192)
    segment.full_from = MIB + MIB // 2
    segment.populate_next(MIB, Threads(4))
    with pytest.raises(CapacityError, match=f"no memory for bytes {MIB + MIB // 2} to"):
        segment.populate_next(MIB, Threads(4))
    assert segment.populated_slots == (MIB + MIB // 2) // 8192
    assert resident_bytes(segment) == MIB + MIB // 2
    segment.full_from = 1 << 60
    segment.populate_next(4 * MIB, Threads(4))
    assert segment.populated_slots == segment.slots
    segment.close()


def test_nothing_is_asked_of_the_threads_where_all_is_there(segment: Segment) -> None:
    crew = Threads(4)
    while segment.populate_next(4 * MIB, crew) < segment.slots:
        pass
    assert segment.populate_next(4 * MIB, crew) == 512
    assert crew.parts == [4]
    assert segment.unpopulated_bytes == 0
