"""Errors, delays and completions that never come, as a test asks the stand-in for them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from tests.cuda.standin import Code, Effect, Standin
from tests.cuda.standin_rig import ANY, Gpu, opened, running

pytestmark = pytest.mark.cuda


@pytest.fixture
def gpu(standin: Standin) -> Iterator[Gpu]:
    with opened(standin) as device:
        yield device


def test_the_nth_call_fails(gpu: Gpu) -> None:
    gpu.standin.fail("cuEventCreate", Code.OUT_OF_MEMORY, at=2, times=2)
    assert [gpu.call("cuEventCreate", 3)[0] for _ in range(4)] == [0, 2, 2, 0]
    gpu.standin.fail("*", Code.UNKNOWN, at=3)
    assert [gpu.call("cuDriverGetVersion")[0] for _ in range(4)] == [0, 0, 999, 0]
    for event in gpu.standin.live("event"):
        gpu.do("cuEventDestroy", event.handle)


@pytest.mark.parametrize(("effect", "made"), [(Effect.NONE, 0), (Effect.PARTIAL, 2), (Effect.ALL, 4)])
def test_a_call_that_fails_may_have_done_something(gpu: Gpu, effect: Effect, made: int) -> None:
    slots, kv, stream = gpu.pinned(), gpu.device(value=1), gpu.stream()
    gpu.standin.fail("cuMemcpyBatchAsync", Code.UNKNOWN, effect=effect)
    assert gpu.batch(stream, [(slots[64 * i :], kv[64 * i :], 64) for i in range(4)]) == Code.UNKNOWN
    gpu.do("cuStreamSynchronize", stream)
    assert sum(int(slots[64 * i]) for i in range(4)) == made


def test_what_an_injected_error_kept_alive_is_no_leak(gpu: Gpu) -> None:
    event = int(gpu.do("cuEventCreate", 3))
    gpu.standin.fail("cuEventDestroy", Code.UNKNOWN)
    assert gpu.call("cuEventDestroy", event)[0] == Code.UNKNOWN
    assert gpu.standin.live("event") == []
    gpu.record(event, gpu.stream())  # and yet it is there


def test_a_sticky_error_breaks_the_context(gpu: Gpu) -> None:
    slots, kv, stream, event = gpu.pinned(), gpu.device(value=1), gpu.stream(), int(gpu.do("cuEventCreate", 3))
    gpu.standin.hold(stream)
    gpu.standin.fail_operation(Code.ILLEGAL_ADDRESS, kind="batch", at=2)
    for i in range(3):
        assert gpu.batch(stream, [(slots[128 * i :], kv[128 * i :], 64), (slots[128 * i + 64 :], kv[128 * i + 64 :], 64)]) == 0
    gpu.record(event, stream)
    gpu.standin.release(stream)
    assert gpu.call("cuEventSynchronize", event)[0] == Code.ILLEGAL_ADDRESS
    assert slots[: 6 * 64 : 64].tolist() == [1, 1, 0, 1, 0, 0]  # one done, one half done, one not at all
    assert gpu.batch(stream, [(slots, kv, 64)]) == Code.ILLEGAL_ADDRESS
    assert gpu.call("cuStreamCreate", 1)[0] == Code.ILLEGAL_ADDRESS
    assert gpu.call("cuEventDestroy", event)[0] == Code.ILLEGAL_ADDRESS
    assert gpu.standin.live("event") == []  # destroyed all the same
    assert gpu.standin.violations() == []


def test_an_error_of_one_operation_is_told_once(gpu: Gpu) -> None:
    slots, kv, stream, first, second = gpu.pinned(), gpu.device(value=1), gpu.stream(), gpu.event(), gpu.event()
    gpu.standin.fail_operation(Code.UNKNOWN, stream=stream, sticky=False)
    assert gpu.batch(stream, [(slots, kv, 64)]) == 0
    gpu.record(first, stream)
    assert gpu.batch(stream, [(slots[64:], kv[64:], 64)]) == 0
    gpu.record(second, stream)
    assert [gpu.call("cuEventSynchronize", event)[0] for event in (first, second)] == [Code.UNKNOWN, 0]
    assert (slots[0], slots[64]) == (0, 1)
    gpu.do("cuStreamSynchronize", stream)
    gpu.standin.fail_operation(Code.UNKNOWN, stream=stream, sticky=False)
    assert gpu.batch(stream, [(slots, kv, 64)]) == 0
    assert [gpu.call("cuStreamSynchronize", stream)[0] for _ in range(2)] == [Code.UNKNOWN, 0]


def test_the_engine_can_break_the_context_too(gpu: Gpu) -> None:
    stream, event = gpu.stream(), gpu.event()
    gpu.standin.hold(stream)
    gpu.record(event, stream)

    def wait() -> int:
        gpu.bind()
        return gpu.call("cuEventSynchronize", event)[0]

    with running(wait) as waiting:
        gpu.standin.wait_blocked("cuEventSynchronize")
        gpu.standin.break_context(Code.ECC_UNCORRECTABLE)
        assert waiting.join() == Code.ECC_UNCORRECTABLE


def test_a_completion_that_never_comes_ends_with_the_reset(gpu: Gpu) -> None:
    slots, kv, stream, event = gpu.pinned(), gpu.device(), gpu.stream(), gpu.event()
    gpu.standin.hold(stream)
    assert gpu.batch(stream, [(slots, kv, 64)]) == 0
    gpu.record(event, stream)

    def wait() -> int:
        gpu.bind()
        return gpu.call("cuEventSynchronize", event)[0]

    with running(wait) as waiting:
        gpu.standin.wait_blocked("cuEventSynchronize")
        assert gpu.call("cuEventQuery", event)[0] == Code.NOT_READY
        gpu.forget()
        gpu.standin.reset()
        assert waiting.join() == Code.DEINITIALIZED
    assert gpu.standin.threads() == 0
    assert (gpu.standin.calls(), gpu.standin.violations(), gpu.standin.live()) == ([], [], [])


def test_a_thread_of_before_the_reset_has_no_context(gpu: Gpu) -> None:
    gpu.forget()
    gpu.standin.reset()
    gpu.do("cuInit", 0)
    assert gpu.call("cuStreamCreate", 1)[0] == Code.INVALID_CONTEXT
    gpu.standin.expect("context")


def test_calls_and_operations_can_be_slow(gpu: Gpu) -> None:
    stream, event = gpu.stream(), gpu.event()
    gpu.standin.delay_calls("cuEventRecord", 0.02)
    start = time.monotonic()
    gpu.record(event, stream)
    assert time.monotonic() - start >= 0.02
    gpu.standin.delay(stream, 0.03)
    gpu.record(event, stream)
    gpu.do("cuEventSynchronize", event)
    assert time.monotonic() - start >= 0.07


def test_waits_are_bounded(gpu: Gpu) -> None:
    stream = gpu.stream()
    gpu.standin.hold(stream)
    reading = gpu.standin.read(stream, gpu.device(), 16)
    for wait in (
        lambda: gpu.standin.wait_calls("cuMemAlloc", timeout_s=0.01),
        lambda: gpu.standin.wait_blocked("cuEventSynchronize", timeout_s=0.01),
        lambda: gpu.standin.wait_pending(stream, 2, timeout_s=0.01),
        lambda: gpu.standin.wait_executed(stream, 1, timeout_s=0.01),
        lambda: gpu.standin.wait_paused(stream, timeout_s=0.01),
        lambda: gpu.standin.wait_idle(timeout_s=0.01),
        lambda: reading.result(timeout_s=0.01),
    ):
        with pytest.raises(TimeoutError):
            wait()
    gpu.standin.release(stream)
    assert (reading.result() == 0).all()


def test_streams_can_be_held_from_the_start(gpu: Gpu) -> None:
    gpu.standin.hold_new_streams()
    stream, kv = gpu.stream(), gpu.device()
    gpu.standin.hold_new_streams(False)
    gpu.do("cuMemsetD8Async", kv.ctypes.data, 1, 64, stream)
    assert gpu.standin.stream(stream).is_held
    assert gpu.standin.stream(stream).kinds == ("set",)
    gpu.standin.release(stream)
    gpu.do("cuStreamSynchronize", stream)
    assert kv[0] == 1


def test_leaks_of_every_kind_are_seen(gpu: Gpu) -> None:
    gpu.stream()
    gpu.event()
    gpu.pinned()
    memory, host = gpu.do("cuMemAlloc", 64), gpu.do("cuMemHostAlloc", 64, 0)
    gpu.standin.engine_stream()
    gpu.device()
    kinds = sorted(item.kind for item in gpu.standin.live())
    assert kinds == ["device memory", "event", "host memory", "primary context", "registration", "stream"]
    gpu.do("cuMemFree", memory)
    gpu.do("cuMemFreeHost", host)


def test_the_log_has_arguments_results_and_threads(gpu: Gpu) -> None:
    slots, kv, stream = gpu.pinned(), gpu.device(), gpu.stream()
    gpu.standin.clear_calls()
    assert gpu.batch(stream, [(kv, slots, 64)], order=ANY) == 0
    gpu.do("cuStreamSynchronize", stream)
    assert gpu.standin.functions() == ["cuMemcpyBatchAsync", "cuStreamSynchronize"]
    call = gpu.standin.calls("cuMemcpyBatchAsync")[0]
    expected = {"form": "13000", "count": 1, "stream": stream, "orders": [ANY], "sizes": [64]}
    expected |= {"targets": [kv.ctypes.data], "sources": [slots.ctypes.data], "attributes": 1}
    assert call.arguments == expected
    assert (call.code, call.capturing) == (0, False)
