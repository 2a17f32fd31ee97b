"""Captures of graphs as the stand-in plays them: states, modes, and what invalidates them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.cuda.standin import CaptureMode, Code, Standin
from tests.cuda.standin_rig import Gpu, opened, running

pytestmark = pytest.mark.cuda

NONE, ACTIVE, INVALIDATED = 0, 1, 2


@pytest.fixture
def gpu(standin: Standin) -> Iterator[Gpu]:
    with opened(standin) as device:
        yield device


def status(gpu: Gpu, stream: int) -> int:
    return int(gpu.do("cuStreamIsCapturing", stream))


def test_a_capture_through_the_driver(gpu: Gpu) -> None:
    stream, mode = gpu.stream(), gpu.driver.CUstreamCaptureMode
    assert status(gpu, stream) == NONE
    gpu.do("cuStreamBeginCapture", stream, mode.CU_STREAM_CAPTURE_MODE_GLOBAL)
    assert status(gpu, stream) == ACTIVE
    assert gpu.standin.calls("cuStreamIsCapturing")[-1].capturing
    graph = gpu.do("cuStreamEndCapture", stream)
    assert status(gpu, stream) == NONE
    assert not gpu.standin.calls("cuStreamIsCapturing")[-1].capturing
    assert [item.kind for item in gpu.standin.live()].count("graph") == 1
    gpu.do("cuGraphDestroy", graph)


def test_an_unsafe_call_invalidates_it(gpu: Gpu) -> None:
    engine = gpu.standin.engine_stream()
    gpu.standin.begin_capture(engine)
    assert gpu.call("cuMemAlloc", 16)[0] == Code.STREAM_CAPTURE_UNSUPPORTED
    gpu.standin.expect("capture-unsafe")
    assert status(gpu, engine) == INVALIDATED
    assert not gpu.standin.end_capture(engine)


def test_what_is_captured_does_not_run(gpu: Gpu) -> None:
    kv, engine = gpu.device(), gpu.standin.engine_stream()
    with gpu.standin.capture(engine):
        gpu.do("cuMemsetD8Async", kv.ctypes.data, 1, 64, engine)
    gpu.standin.wait_idle()
    assert (kv == 0).all()
    gpu.standin.expect("capture-stream")


def test_work_in_other_streams_is_allowed_meanwhile(gpu: Gpu) -> None:
    """What CUDA calls safe. (Of ours nothing is made at all then: `Call.capturing` shows it.)"""
    slots, kv, stream, event, engine = gpu.pinned(), gpu.device(value=5), gpu.stream(), gpu.event(), gpu.standin.engine_stream()
    with gpu.standin.capture(engine):
        assert gpu.batch(stream, [(slots, kv, 64)]) == 0
        gpu.record(event, stream)
        gpu.wait(stream, event)
    gpu.do("cuStreamSynchronize", stream)
    assert (slots[:64] == 5).all()


def test_the_legacy_default_stream_does_not_go_with_a_capture_of_a_blocking_stream(gpu: Gpu) -> None:
    engine, event = gpu.standin.engine_stream(blocking=True), gpu.event()
    gpu.standin.begin_capture(engine)
    assert gpu.call("cuStreamIsCapturing", 0)[0] == Code.STREAM_CAPTURE_IMPLICIT
    assert gpu.call("cuEventRecord", event, 0)[0] == Code.STREAM_CAPTURE_IMPLICIT
    gpu.standin.expect("capture-stream")
    assert not gpu.standin.end_capture(engine)


def test_an_event_of_a_capture_cannot_be_waited_for(gpu: Gpu) -> None:
    engine, event = gpu.standin.engine_stream(), gpu.event()
    with gpu.standin.capture(engine):
        gpu.record(event, engine)
    gpu.standin.expect("capture-stream")
    assert gpu.call("cuEventSynchronize", event)[0] == Code.CAPTURED_EVENT
    gpu.standin.expect("capture-isolation")
    gpu.record(event, engine)
    gpu.do("cuEventSynchronize", event)


def test_another_thread_cannot_end_it(gpu: Gpu) -> None:
    stream, mode = gpu.stream(), gpu.driver.CUstreamCaptureMode
    gpu.do("cuStreamBeginCapture", stream, mode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)

    def end() -> int:
        gpu.bind()
        return gpu.call("cuStreamEndCapture", stream)[0]

    with running(end) as other:
        assert other.join() == Code.STREAM_CAPTURE_WRONG_THREAD
    gpu.standin.expect("capture-ending")
    gpu.do("cuGraphDestroy", gpu.do("cuStreamEndCapture", stream))


def test_modes_of_capture(gpu: Gpu) -> None:
    """Another thread's capture matters only if it is global and this thread's mode is too."""
    event, stream, engine = gpu.event(), gpu.stream(), gpu.standin.engine_stream()
    gpu.record(event, stream)
    mode = gpu.driver.CUstreamCaptureMode
    for capturing, own, safe in (
        (CaptureMode.GLOBAL, mode.CU_STREAM_CAPTURE_MODE_GLOBAL, False),
        (CaptureMode.GLOBAL, mode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, True),
        (CaptureMode.GLOBAL, mode.CU_STREAM_CAPTURE_MODE_RELAXED, True),
        (CaptureMode.THREAD_LOCAL, mode.CU_STREAM_CAPTURE_MODE_GLOBAL, True),
        (CaptureMode.RELAXED, mode.CU_STREAM_CAPTURE_MODE_GLOBAL, True),
    ):

        def elsewhere(own: Any = own) -> int:
            gpu.bind()
            gpu.do("cuThreadExchangeStreamCaptureMode", own)
            return gpu.call("cuEventSynchronize", event)[0]

        gpu.standin.begin_capture(engine, capturing)
        with running(elsewhere) as other:
            assert (other.join() == 0) == safe, (capturing, own)
        assert gpu.standin.end_capture(engine) == safe
    gpu.standin.expect("capture-unsafe")
