"""Nothing of ours gets into a CUDA graph, and no graph is spoilt by us."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.copy.rigs import ids
from tests.cuda.rigs import CudaRig, Running
from tests.cuda.standin import CaptureMode, Code, Standin

from kvoffload.copy.choose import make_engine
from kvoffload.copy.cuda import CudaCopyEngine
from kvoffload.cuda.settings import CopyMode, GpuCopySettings
from kvoffload.errors import CopyError
from kvoffload.ledger import Ledger

pytestmark = pytest.mark.cuda

PIECE = 4096
"""Of one slot."""


@pytest.fixture
def rig(standin: Standin) -> Iterator[CudaRig]:
    made = CudaRig.plain(standin, GpuCopySettings(pin_piece_bytes=PIECE))
    yield made
    made.close()


@pytest.fixture
def fresh(standin: Standin) -> Iterator[CudaRig]:
    """All slots are in memory, none is prepared."""
    made = CudaRig.plain(standin, GpuCopySettings(pin_piece_bytes=PIECE), prepared=False)
    made.segment.populate_next(made.segment.num_bytes)
    yield made
    made.close()


@pytest.mark.parametrize("mode", list(CaptureMode))
def test_a_mark_in_a_captured_stream_records_nothing(rig: CudaRig, standin: Standin, mode: CaptureMode) -> None:
    recorded = len(standin.calls("cuEventRecord"))
    standin.begin_capture(rig.stream, mode)
    mark = rig.engine.mark()
    assert len(standin.calls("cuEventRecord")) == recorded
    assert standin.end_capture(rig.stream)
    for _ in range(2):
        with pytest.raises(CopyError, match="a CUDA graph was being captured when it was marked"):
            rig.engine.save(ids(1), ids(1), ids(0), mark)
    with pytest.raises(CopyError, match="a CUDA graph was being captured when it was marked"):
        rig.engine.load(ids(1), ids(1), mark)
    rig.engine.save(ids(1), ids(1), ids(0), rig.engine.mark())


def test_a_mark_in_the_default_stream_while_a_stream_is_captured(rig: CudaRig, standin: Standin) -> None:
    """Asking for the status of the legacy default stream is answered by an error then."""
    engine = make_engine(rig.layout, rig.segment, rig.ledger, GpuCopySettings(pin=False), lambda: 0)
    captured = standin.engine_stream(blocking=True)
    standin.begin_capture(captured)
    mark = engine.mark()
    assert standin.calls("cuStreamIsCapturing")[-1].code == Code.STREAM_CAPTURE_IMPLICIT
    assert standin.end_capture(captured)
    with pytest.raises(CopyError, match="graph was being captured"):
        engine.save(ids(1), ids(1), ids(0), mark)
    assert engine.save(ids(1), ids(1), ids(0), engine.mark()).all()
    engine.close()


@pytest.mark.parametrize("copy", [CopyMode.DMA, CopyMode.KERNEL, CopyMode.SINGLE])
@pytest.mark.parametrize("pin", [True, False])
def test_a_copy_meets_a_capture_of_another_thread(standin: Standin, copy: CopyMode, pin: bool) -> None:
    """It should not happen, and where it does neither is harmed."""
    rig = CudaRig.plain(standin, GpuCopySettings(copy=copy, pin=pin))
    marks = rig.engine.mark(), rig.engine.mark()
    captured = standin.engine_stream()
    standin.begin_capture(captured)
    assert Running(lambda: rig.engine.save(ids(1), ids(1), ids(0), marks[0])).result().all()
    Running(lambda: rig.engine.load(ids(1), ids(2), marks[1])).result()
    assert standin.end_capture(captured)
    assert rig.block(2) == rig.block(1)
    rig.close()


def test_the_threads_own_mode_is_put_back(rig: CudaRig, standin: Standin) -> None:
    """vLLM's thread proves the layout: what it calls later is not to be let through because of that."""
    rig.engine.save(ids(1), ids(1), ids(0), rig.engine.mark())
    with pytest.raises(CopyError, match="names block 9"):
        rig.engine.save(ids(9), ids(1), ids(0), rig.engine.mark())
    standin.fail("cuEventSynchronize", Code.UNKNOWN)
    with pytest.raises(CopyError, match="cuEventSynchronize failed"):
        rig.engine.save(ids(1), ids(1), ids(0), rig.engine.mark())
    captured = standin.engine_stream()
    standin.begin_capture(captured)
    Running(lambda: None).result()
    with pytest.raises(CopyError, match="cuStreamSynchronize failed: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
        rig.cuda.gpu.driver.call("cuStreamSynchronize", rig.stream)
    assert not standin.end_capture(captured)
    standin.expect("capture-unsafe")


# ---------------------------------------------------------------- when memory is registered


def registrations(standin: Standin) -> int:
    return len(standin.calls("cuMemHostRegister"))


def test_at_start_all_is_registered_at_once(fresh: CudaRig, standin: Standin) -> None:
    assert fresh.engine.prepare_slots(3, at_start=True) == 3
    assert registrations(standin) == 3
    assert fresh.engine.prepare_slots(8, at_start=True) == 8


def test_after_the_start_nothing_is_registered_before_the_first_step(fresh: CudaRig, standin: Standin) -> None:
    assert fresh.engine.prepare_slots(3, at_start=True) == 3
    for populated in (5, 8):
        assert fresh.engine.prepare_slots(populated) == 3
    assert registrations(standin) == 3
    fresh.engine.mark()
    assert fresh.engine.prepare_slots(8) == 8
    assert registrations(standin) == 8


def test_a_mark_during_a_capture_is_no_step(fresh: CudaRig, standin: Standin) -> None:
    fresh.engine.prepare_slots(3, at_start=True)
    standin.begin_capture(fresh.stream)
    fresh.engine.mark()
    assert fresh.engine.prepare_slots(8) == 3
    assert standin.end_capture(fresh.stream)
    assert registrations(standin) == 3


def test_marks_of_the_start_up_proof_are_no_steps(fresh: CudaRig, standin: Standin) -> None:
    fresh.engine.mark()
    fresh.engine.prepare_slots(3, at_start=True)
    assert fresh.engine.prepare_slots(8) == 3
    fresh.engine.mark()
    fresh.engine.use_ledger(Ledger(8))
    assert fresh.engine.prepare_slots(8) == 3
    fresh.engine.mark()
    assert fresh.engine.prepare_slots(8) == 8


def test_registering_meets_a_capture_of_another_thread(fresh: CudaRig, standin: Standin) -> None:
    fresh.engine.mark()
    captured = standin.engine_stream()
    standin.begin_capture(captured)
    assert Running(lambda: fresh.engine.prepare_slots(8)).result() == 8
    assert standin.end_capture(captured)


def test_a_closed_engine_registers_nothing(fresh: CudaRig, standin: Standin) -> None:
    fresh.engine.prepare_slots(3, at_start=True)
    fresh.engine.close()
    assert isinstance(fresh.engine, CudaCopyEngine)
    assert fresh.engine.prepare_slots(8, at_start=True) == 3
    assert registrations(standin) == 3
