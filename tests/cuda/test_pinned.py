"""A segment's memory as the driver is asked to pin it: where pieces end, what is refused, and that all of it is given back."""

from __future__ import annotations

import mmap
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.cuda.standin import Code, Standin

from kvoffload.cuda import pinned
from kvoffload.cuda.driver import Driver
from kvoffload.cuda.pinned import DEVICEMAP, PORTABLE, PinnedSegment, advice
from kvoffload.segment import Segment

pytestmark = pytest.mark.cuda

PAGE = mmap.PAGESIZE
MIB = 1 << 20
SLOT = 3 * PAGE
"""No piece of so many MiB is a whole number of these."""
SLOTS = 2000
PIECE_SLOTS = MIB // SLOT


@pytest.fixture
def driver(standin: Standin) -> Iterator[Driver]:
    standin.configure(register_needs_populated=True)
    opened = Driver.open(0)
    yield opened
    opened.close()


@pytest.fixture
def segment(driver: Driver) -> Iterator[Segment]:
    made = Segment.create(SLOTS * SLOT, SLOT)
    made.populate_next(made.num_bytes)
    yield made
    made.close()


@pytest.fixture
def memory(driver: Driver, segment: Segment) -> Iterator[PinnedSegment]:
    made = PinnedSegment(driver, segment, piece_bytes=MIB)
    yield made
    made.close()


def registered(standin: Standin) -> list[tuple[int, int, int]]:
    """Address, bytes and flags of all that was asked for, in order."""
    found = [list(call.arguments.values()) for call in standin.calls("cuMemHostRegister")]
    return [(int(address), int(num_bytes), int(flags)) for address, num_bytes, flags, *_ in found]


def unregistered(standin: Standin) -> list[int]:
    return [int(next(iter(call.arguments.values()))) for call in standin.calls("cuMemHostUnregister")]


def test_pieces_follow_each_other_and_end_on_slots(standin: Standin, segment: Segment, memory: PinnedSegment) -> None:
    assert memory.prepare(SLOTS) == SLOTS
    place = segment.address
    pieces = registered(standin)
    assert len(pieces) == -(-SLOTS // PIECE_SLOTS)
    for address, num_bytes, flags in pieces:
        assert address == place
        assert 0 < num_bytes <= MIB
        assert num_bytes % SLOT == 0
        assert (address % PAGE, num_bytes % PAGE) == (0, 0)
        assert flags == PORTABLE | DEVICEMAP
        place += num_bytes
    assert place == segment.address + segment.num_bytes
    assert (memory.pinned_slots, memory.pinned_bytes, memory.refused) == (SLOTS, segment.num_bytes, None)
    assert memory.device_pointer_is_host_pointer


def test_what_is_pinned_grows_with_what_is_populated_and_never_twice(standin: Standin, memory: PinnedSegment) -> None:
    usable = [memory.prepare(populated) for populated in (0, 1, 1, PIECE_SLOTS, PIECE_SLOTS - 5, 3 * PIECE_SLOTS + 1)]
    assert usable == [0, 1, 1, PIECE_SLOTS, PIECE_SLOTS, 3 * PIECE_SLOTS + 1]
    assert [num_bytes // SLOT for _, num_bytes, _ in registered(standin)] == [1, PIECE_SLOTS - 1, PIECE_SLOTS, PIECE_SLOTS, 1]
    slots = np.array([0, 3 * PIECE_SLOTS, 3 * PIECE_SLOTS + 1, SLOTS - 1])
    assert memory.is_pinned(slots).tolist() == [True, True, False, False]


def test_a_slot_larger_than_a_piece_is_a_piece(standin: Standin, driver: Driver) -> None:
    segment = Segment.create(8 * MIB, 2 * MIB)
    segment.populate_next(8 * MIB)
    memory = PinnedSegment(driver, segment, piece_bytes=MIB)
    assert memory.prepare(3) == 3
    assert [num_bytes for _, num_bytes, _ in registered(standin)] == [2 * MIB] * 3
    memory.close()
    segment.close()


def test_slots_that_are_no_whole_pages_are_pinned_as_many_as_are(standin: Standin, driver: Driver) -> None:
    """As on machines with pages of 64 KiB: two registrations must not share a page."""
    size = PAGE + PAGE // 4
    segment = Segment.create(30 * size, size)
    segment.populate_next(segment.num_bytes)
    memory = PinnedSegment(driver, segment, piece_bytes=11 * size)
    assert memory.prepare(3) == 0
    assert memory.prepare(7) == 4
    assert memory.prepare(30) == 30
    sizes = [num_bytes for _, num_bytes, _ in registered(standin)]
    assert sizes == [4 * size, 8 * size, 8 * size, 8 * size, 2 * size + PAGE // 2]
    memory.close()
    segment.close()


@pytest.mark.parametrize("third", [False, True], ids=["first", "third"])
def test_refused_memory_is_used_unpinned_and_said_once(
    standin: Standin, segment: Segment, memory: PinnedSegment, caplog: pytest.LogCaptureFixture, third: bool
) -> None:
    standin.configure(register_total_bytes=2 * PIECE_SLOTS * SLOT + 100 if third else 100)
    pinned_slots = 2 * PIECE_SLOTS if third else 0
    assert memory.prepare(SLOTS - 1) == SLOTS - 1
    asked = len(registered(standin))
    assert memory.pinned_slots == pinned_slots
    assert memory.prepare(SLOTS) == SLOTS
    assert len(registered(standin)) == asked, "it is not asked again"
    assert memory.is_pinned(np.array([0, 2 * PIECE_SLOTS - 1, 2 * PIECE_SLOTS])).tolist() == [third, third, False]
    [warning] = [record.getMessage() for record in caplog.records]
    assert "cuMemHostRegister failed: CUDA_ERROR_OUT_OF_MEMORY (2)" in warning
    assert "less memory (l1.capacity_gb) may fit" in warning
    assert "gpu.pin = false" in warning
    assert memory.refused in warning if memory.refused else False
    memory.close()
    assert len(unregistered(standin)) == pinned_slots // PIECE_SLOTS


def test_a_broken_device_is_not_taken_for_a_lack_of_memory(
    standin: Standin, memory: PinnedSegment, caplog: pytest.LogCaptureFixture
) -> None:
    standin.fail("cuMemHostRegister", Code.ILLEGAL_ADDRESS)
    memory.prepare(SLOTS)
    assert "context is broken" in caplog.text
    assert "l1.capacity_gb" not in caplog.text


def test_a_refusal_is_drained_before_anybody_else_can_meet_it(standin: Standin, memory: PinnedSegment) -> None:
    """Where a driver answers the same error once more, to whoever calls next."""
    standin.fail("cuMemHostRegister", Code.OUT_OF_MEMORY)
    standin.fail("cuCtxGetDevice", Code.OUT_OF_MEMORY)
    memory.prepare(SLOTS)
    assert standin.functions()[-2:] == ["cuMemHostRegister", "cuCtxGetDevice"]
    assert memory.refused is not None


def test_pinning_may_be_switched_off(standin: Standin, driver: Driver, segment: Segment, caplog: pytest.LogCaptureFixture) -> None:
    memory = PinnedSegment(driver, segment, piece_bytes=MIB, pin=False)
    assert memory.prepare(7) == 7
    assert memory.prepare(SLOTS) == SLOTS
    assert not memory.is_pinned(np.array([0])).any()
    assert memory.refused == "gpu.pin is false"
    memory.close()
    assert registered(standin) == []
    assert caplog.records == []


def test_all_is_given_back_the_last_first_and_once(standin: Standin, memory: PinnedSegment) -> None:
    memory.prepare(SLOTS)
    assert len(standin.live("registration")) == len(registered(standin))
    memory.close()
    memory.close()
    assert unregistered(standin) == [address for address, _, _ in reversed(registered(standin))]
    assert standin.live("registration") == []
    assert memory.prepare(SLOTS) == SLOTS
    assert memory.pinned_slots == 0
    assert len(unregistered(standin)) == len(registered(standin)), "nothing is pinned once it is closed"


def test_it_may_be_closed_by_a_thread_that_never_used_the_device(standin: Standin, memory: PinnedSegment) -> None:
    memory.prepare(SLOTS)
    thread = threading.Thread(target=memory.close)
    thread.start()
    thread.join(20)
    assert standin.live("registration") == []


def test_and_pinned_by_another(standin: Standin, memory: PinnedSegment) -> None:
    thread = threading.Thread(target=memory.prepare, args=(SLOTS,))
    thread.start()
    thread.join(20)
    assert memory.pinned_slots == SLOTS


def test_what_is_not_given_back_stays_mapped(
    standin: Standin, segment: Segment, memory: PinnedSegment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept: list[object] = []
    monkeypatch.setattr(pinned, "_still_registered", kept)
    memory.prepare(SLOTS)
    standin.fail("cuMemHostUnregister", Code.LAUNCH_FAILED, at=2)
    memory.close()
    assert len(unregistered(standin)) == len(registered(standin)), "the others are"
    assert "does not give pinned memory back" in caplog.text
    [array] = kept
    address, num_bytes = segment.address, segment.num_bytes
    segment.close()
    assert isinstance(array, np.ndarray)
    assert (array.ctypes.data, array.nbytes) == (address, num_bytes)
    assert f"{address:x}-" in Path("/proc/self/maps").read_text()


def test_kernels_are_told_where_the_device_knows_the_memory_by_another_address(standin: Standin, memory: PinnedSegment) -> None:
    standin.configure(host_pointer_usable=False)
    assert memory.prepare(SLOTS) == SLOTS
    assert not memory.device_pointer_is_host_pointer
    assert memory.pinned_slots == SLOTS
    assert len(standin.calls("cuMemHostGetDevicePointer")) == 1


def test_memory_that_kernels_cannot_use_is_pinned_all_the_same(standin: Standin, memory: PinnedSegment) -> None:
    standin.fail("cuMemHostGetDevicePointer", Code.INVALID_VALUE)
    assert memory.prepare(SLOTS) == SLOTS
    assert not memory.device_pointer_is_host_pointer
    assert memory.refused is None


# ------------------------------------------------------------ what may help


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (8 * MIB, resource.RLIM_INFINITY))


def test_the_limit_on_locked_memory_is_named(limits: None, tmp_path: Path) -> None:
    first = next(advice("CUDA_ERROR_OPERATING_SYSTEM", tmp_path))
    assert first.startswith("the limit on locked memory is 8 MiB: raise it (ulimit -l")


@pytest.mark.parametrize("sign", [".dockerenv", "run/.containerenv", "run/secrets/kubernetes.io"])
def test_in_a_container_it_is_raised_from_outside(limits: None, tmp_path: Path, sign: str) -> None:
    (tmp_path / sign).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / sign).touch()
    assert "docker run --ulimit memlock=-1, or the capability IPC_LOCK" in "; ".join(advice("CUDA_ERROR_NOT_PERMITTED", tmp_path))


def test_without_a_limit_none_is_blamed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    assert list(advice("CUDA_ERROR_UNKNOWN", tmp_path)) == ["gpu.pin = false says that this is known"]
    (tmp_path / "proc/sys/kernel").mkdir(parents=True)
    (tmp_path / "proc/sys/kernel/osrelease").write_text("5.15.90.1-microsoft-standard-WSL2\n")
    (tmp_path / ".dockerenv").touch()
    container, wsl, _ = advice("CUDA_ERROR_UNKNOWN", tmp_path)
    assert "IPC_LOCK" in container
    assert ".wslconfig" in wsl


def test_memory_that_is_pinned_already_is_a_bug(limits: None, tmp_path: Path) -> None:
    assert "please report" in next(advice("CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", tmp_path))
