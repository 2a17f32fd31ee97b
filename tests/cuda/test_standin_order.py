"""When the stand-in reads and writes: as late, and as early, as CUDA may."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from tests.cuda.standin import BatchOrder, Standin
from tests.cuda.standin_rig import ANY, BLOCKING_SYNC, DURING_API_CALL, PAGE, STREAM, Gpu, opened, pages, running

pytestmark = pytest.mark.cuda


@pytest.fixture
def gpu(standin: Standin) -> Iterator[Gpu]:
    with opened(standin) as device:
        yield device


@pytest.mark.parametrize(("order", "seen"), [(STREAM, 9), (DURING_API_CALL, 0), (ANY, 0)])
def test_when_a_source_is_read(gpu: Gpu, order: int, seen: int) -> None:
    """A save that is wrongly of order ANY stores what was there before the step."""
    slots, kv, stream = gpu.pinned(), gpu.device(), gpu.stream()
    gpu.standin.hold(stream)
    gpu.standin.write(stream, kv, b"\x09" * 64)
    assert gpu.batch(stream, [(slots, kv, 64)], order=order) == 0
    gpu.standin.release(stream)
    gpu.do("cuStreamSynchronize", stream)
    assert (slots[:64] == seen).all()
    if order == ANY:
        gpu.standin.expect("source-changed")


def test_a_destination_is_written_only_when_the_stream_gets_there(gpu: Gpu) -> None:
    slots, kv, stream = gpu.pinned(), gpu.device(), gpu.stream()
    slots[:64] = 5
    gpu.standin.hold(stream)
    before = gpu.standin.read(stream, kv, 64)
    assert gpu.batch(stream, [(kv, slots, 64)], order=ANY) == 0
    after = gpu.standin.read(stream, kv, 64)
    assert (kv == 0).all()
    gpu.standin.release(stream)
    assert (before.result() == 0).all()
    assert (after.result() == 5).all()


def test_arrays_of_pointers_may_be_used_again_at_once(gpu: Gpu) -> None:
    """`batch` makes new arrays for each call and lets them go: what is copied was fixed by the call."""
    slots, kv, stream = gpu.pinned(), gpu.device(), gpu.stream()
    kv[:] = np.arange(kv.size, dtype=np.uint64) % 251
    gpu.standin.hold(stream)
    for i in range(16):
        assert gpu.batch(stream, [(slots[64 * i :], kv[64 * (15 - i) :], 64)]) == 0
    gpu.standin.release(stream)
    gpu.do("cuStreamSynchronize", stream)
    assert (slots[: 16 * 64].reshape(16, 64) == kv[: 16 * 64].reshape(16, 64)[::-1]).all()


def test_without_a_wait_a_save_takes_what_was_there_before(gpu: Gpu) -> None:
    slots, kv, stream, engine = gpu.pinned(), gpu.device(value=1), gpu.stream(), gpu.standin.engine_stream()
    gpu.standin.hold(engine)
    gpu.standin.write(engine, kv, b"\x02" * 64)
    assert gpu.batch(stream, [(slots, kv, 64)]) == 0
    gpu.do("cuStreamSynchronize", stream)
    assert (slots[:64] == 1).all()
    gpu.standin.expect("race")  # it was seen even where the bytes happened to be right
    gpu.standin.release(engine)


def test_with_a_wait_it_takes_what_the_engine_wrote(gpu: Gpu) -> None:
    slots, kv, stream, engine, mark = gpu.pinned(), gpu.device(value=1), gpu.stream(), gpu.standin.engine_stream(), gpu.event()
    gpu.standin.hold(engine)
    gpu.standin.write(engine, kv, b"\x02" * 64)
    gpu.record(mark, engine)
    gpu.standin.write(engine, kv[64:], b"\x03" * 64)  # the next step, which the save does not wait for
    gpu.wait(stream, mark)
    assert gpu.batch(stream, [(slots, kv, 64)]) == 0
    assert gpu.standin.stream(stream).kinds == ("wait", "batch")
    gpu.standin.step(engine, 2)
    gpu.do("cuStreamSynchronize", stream)
    assert (slots[:64] == 2).all()
    assert gpu.standin.stream(engine).pending == 1
    gpu.standin.release(engine)


def test_a_wait_is_for_the_record_that_was_last_when_it_was_made(gpu: Gpu) -> None:
    first, second, event = gpu.stream(), gpu.stream(), gpu.event()
    gpu.record(event, first)
    gpu.wait(second, event)
    gpu.standin.wait_idle(first)
    gpu.standin.hold(first)
    gpu.record(event, first)
    gpu.do("cuStreamSynchronize", second)  # does not hang: the newer record is none of its business
    assert gpu.call("cuEventQuery", event)[0] == 600
    gpu.standin.release(first)
    gpu.do("cuEventSynchronize", event)
    assert gpu.call("cuEventQuery", event)[0] == 0


def test_one_stream_is_first_in_first_out_and_streams_overtake_each_other(gpu: Gpu) -> None:
    kv, early, late = gpu.device(), gpu.stream(), gpu.stream()
    gpu.standin.hold(early)
    for value in (1, 2):
        gpu.do("cuMemsetD8Async", kv.ctypes.data, value, 64, early)
        gpu.do("cuMemsetD8Async", kv.ctypes.data + 64, 10 * value, 64, late)
    gpu.do("cuStreamSynchronize", late)
    assert (kv[0], kv[64]) == (0, 20)
    gpu.standin.step(early)
    gpu.standin.wait_executed(early, 1)
    assert kv[0] == 1
    gpu.standin.release(early)
    gpu.do("cuStreamSynchronize", early)
    assert kv[0] == 2


@pytest.mark.parametrize(("order", "first"), [(BatchOrder.REVERSED, 3), (BatchOrder.GIVEN, 0)])
def test_a_batch_stops_between_its_copies(gpu: Gpu, order: BatchOrder, first: int) -> None:
    gpu.standin.configure(batch_order=order)
    slots, kv, stream = gpu.pinned(), gpu.device(value=4), gpu.stream()
    gpu.standin.pause_inside(stream, 1)
    assert gpu.batch(stream, [(slots[64 * i :], kv[64 * i :], 64) for i in range(4)]) == 0
    gpu.standin.wait_paused(stream)
    assert [i for i in range(4) if slots[64 * i]] == [first]
    gpu.standin.release(stream)
    gpu.do("cuStreamSynchronize", stream)
    assert (slots[: 4 * 64] == 4).all()


def test_a_shuffled_batch_is_complete_too(gpu: Gpu) -> None:
    gpu.standin.configure(batch_order=BatchOrder.SHUFFLED, jitter_us=50)
    slots, kv, stream = gpu.pinned(), gpu.device(), gpu.stream()
    kv[:] = np.random.default_rng(0).integers(0, 256, kv.size)
    assert gpu.batch(stream, [(slots[64 * i :], kv[64 * i :], 64) for i in range(64)]) == 0
    gpu.do("cuStreamSynchronize", stream)
    assert (slots[: 64 * 64] == kv[: 64 * 64]).all()


def test_a_copy_to_pageable_memory_is_over_when_the_call_is(gpu: Gpu) -> None:
    memory, kv, stream = pages(1), gpu.device(value=6), gpu.stream()
    gpu.standin.hold(stream)

    def copy() -> None:
        gpu.bind()
        gpu.do("cuMemcpyDtoHAsync", memory.ctypes.data, kv.ctypes.data, 64, stream)

    with running(copy):
        gpu.standin.wait_blocked("cuMemcpyDtoHAsync")
        assert (memory == 0).all()
        gpu.standin.release(stream)
    assert (memory[:64] == 6).all()


def test_a_copy_from_pageable_memory_has_read_it_when_the_call_is_over(gpu: Gpu) -> None:
    memory, kv, stream = pages(1), gpu.device(), gpu.stream()
    memory[:] = 7
    gpu.standin.hold(stream)
    gpu.do("cuMemcpyHtoDAsync", kv.ctypes.data, memory.ctypes.data, 64, stream)
    memory[:] = 8
    gpu.standin.release(stream)
    gpu.do("cuStreamSynchronize", stream)
    assert (kv[:64] == 7).all()


def test_the_legacy_default_stream_waits_for_blocking_streams_and_they_for_it(gpu: Gpu) -> None:
    blocking, free = gpu.stream(flags=0), gpu.stream()
    first, last = gpu.event(), gpu.event()
    gpu.standin.hold(blocking)
    gpu.record(gpu.event(), blocking)
    gpu.record(first, 0)
    gpu.record(gpu.event(), free)
    gpu.do("cuStreamSynchronize", free)
    with pytest.raises(TimeoutError):
        gpu.standin.wait_idle(1, timeout_s=0.05)
    assert gpu.call("cuEventQuery", first)[0] == 600
    gpu.standin.release(blocking)
    gpu.do("cuEventSynchronize", first)
    gpu.standin.hold(1)
    gpu.record(first, 0)
    gpu.record(last, blocking)
    with pytest.raises(TimeoutError):
        gpu.standin.wait_idle(blocking, timeout_s=0.05)
    assert gpu.call("cuEventQuery", last)[0] == 600
    gpu.standin.release(1)
    gpu.do("cuEventSynchronize", last)


def test_elapsed_time_is_that_between_two_records(gpu: Gpu) -> None:
    stream, first, last = gpu.stream(), gpu.event(BLOCKING_SYNC), gpu.event(BLOCKING_SYNC)
    gpu.record(first, stream)
    gpu.standin.delay(stream, 0.02)
    gpu.record(last, stream)
    assert gpu.call("cuEventElapsedTime", first, last)[0] == 600
    gpu.do("cuEventSynchronize", last)
    assert gpu.do("cuEventElapsedTime", first, last) >= 20


def test_races_are_seen_once_and_only_where_nothing_orders(gpu: Gpu) -> None:
    kv, first, second, event = gpu.device(), gpu.stream(), gpu.stream(), gpu.event()
    gpu.standin.hold(first)
    gpu.do("cuMemsetD8Async", kv.ctypes.data, 1, 64, first)
    gpu.record(event, first)
    gpu.wait(second, event)
    gpu.do("cuMemsetD8Async", kv.ctypes.data, 2, 64, second)  # ordered by the event
    gpu.do("cuMemsetD8Async", kv.ctypes.data + PAGE, 3, 64, first)
    gpu.do("cuMemsetD8Async", kv.ctypes.data + PAGE + 64, 3, 64, second)  # other bytes
    assert gpu.standin.violations() == []
    gpu.do("cuMemsetD8Async", kv.ctypes.data + PAGE, 4, 1, second)  # the event was recorded before what it would have to wait for
    assert len(gpu.standin.expect("race")) == 1
    gpu.standin.configure(report_races=False)
    gpu.do("cuMemsetD8Async", kv.ctypes.data + PAGE, 4, 1, second)
    gpu.standin.release(first)
    gpu.standin.wait_idle()
