"""Every call of the driver fails once: no call of ours ends before its copies, nothing leaks, nothing hangs."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

import numpy as np
import pytest
from tests.copy.rigs import WAIT_S, ids
from tests.cuda.rigs import CudaRig, Running
from tests.cuda.standin import Code, Effect, Machine, Standin

from kvoffload.copy.cuda import Mark
from kvoffload.cuda.driver import CudaError
from kvoffload.cuda.settings import CopyMode, GpuCopySettings
from kvoffload.cuda.streams import Event, EventPool
from kvoffload.errors import CopyError, EngineLost, UnsupportedError

pytestmark = pytest.mark.cuda

WAYS = {
    "dma": GpuCopySettings(copy=CopyMode.DMA, descriptors_per_call=5),
    "kernel": GpuCopySettings(copy=CopyMode.KERNEL, descriptors_per_call=2),
    "single": GpuCopySettings(copy=CopyMode.SINGLE, descriptors_per_call=5),
    "unpinned": GpuCopySettings(pin=False),
}
FOUR = np.arange(4, dtype=np.int64)
NONE = np.zeros(4, np.int64)


@dataclass
class Scene:
    """One copy on a fresh machine. The mark is taken before calls are counted."""

    standin: Standin
    settings: GpuCopySettings
    what: str

    def rig(self) -> CudaRig:
        self.standin.reset()
        return CudaRig.plain(self.standin, self.settings)

    def copy(self, rig: CudaRig) -> None:
        mark = rig.engine.mark()
        self.standin.clear_calls()
        self.run(rig, mark)

    def run(self, rig: CudaRig, mark: object) -> None:
        if self.what == "save":
            assert rig.engine.save(FOUR, FOUR + 4, NONE, mark).all()
            assert [rig.slot(number + 4) for number in range(4)] == [rig.block(number) for number in range(4)]
        else:
            rig.engine.load(FOUR, FOUR + 4, mark)
            assert [rig.block(number + 4) for number in range(4)] == [rig.slot(number) for number in range(4)]

    def functions(self) -> list[str]:
        """What the driver is asked for, in a copy of which nothing fails."""
        rig = self.rig()
        rig.engine.save(FOUR, FOUR, NONE, rig.engine.mark())
        self.copy(rig)
        found = self.standin.functions()
        rig.close()
        return found


@pytest.fixture(params=["save", "load"])
def what(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(WAYS))
def scene(request: pytest.FixtureRequest, standin: Standin, what: str) -> Scene:
    return Scene(standin, WAYS[request.param], what)


@pytest.mark.parametrize("effect", list(Effect))
def test_every_call_of_a_copy_fails_once(scene: Scene, effect: Effect) -> None:
    functions = scene.functions()
    assert len(functions) >= 6
    for at, function in enumerate(functions, start=1):
        rig = scene.rig()
        rig.engine.save(FOUR, FOUR, NONE, rig.engine.mark())
        lane = rig.lane(scene.what)
        scene.standin.delay(lane, 0.002)  # so that what is not waited for is still under way
        scene.standin.fail("*", Code.UNKNOWN, at + 4, effect=effect)  # behind what the mark asks for
        with pytest.raises(CudaError, match=rf"^{function} failed.*: CUDA_ERROR_UNKNOWN \(999\): .*doctor --gpu"):
            scene.copy(rig)
        assert scene.standin.stream(lane).pending == 0, f"after {function} failed a copy was still under way"
        scene.standin.delay(lane, 0)
        scene.copy(rig)
        rig.close()
        scene.standin.check()


@pytest.mark.parametrize("way", list(WAYS))
def test_the_engine_is_lost_where_the_end_of_a_copy_is_not_known(
    standin: Standin, what: str, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene(standin, WAYS[way], what)
    rig = scene.rig()
    standin.fail("cuEventSynchronize", Code.UNKNOWN)
    standin.fail("cuStreamSynchronize", Code.OPERATING_SYSTEM, times=2)
    with pytest.raises(EngineLost, match="not known whether a copy has ended: cuEventSynchronize failed"):
        scene.copy(rig)
    assert "does not say whether a copy has ended" in caplog.text
    for other in ("save", "load"):
        standin.clear_calls()
        with pytest.raises(
            CopyError, match="the GPU's copy engine is lost, nothing is copied any more: cuEventSynchronize failed"
        ) as later:
            Scene(standin, WAYS[way], other).run(rig, object())
        assert not isinstance(later.value, EngineLost), "it has touched nothing"
        assert standin.functions() == []
    held = rig.segment.array
    standin.wait_idle()
    standin.clear_calls()
    rig.close()
    assert standin.functions() == [], "what a copy may still touch is not given back"
    assert held.nbytes
    standin.reset()


@pytest.mark.parametrize("code", [Code.ILLEGAL_ADDRESS, Code.ECC_UNCORRECTABLE, Code.LAUNCH_FAILED])
def test_a_context_that_breaks_during_a_copy(scene: Scene, code: Code) -> None:
    rig = scene.rig()
    standin = scene.standin
    standin.fail_operation(code, rig.lane(scene.what))
    with pytest.raises(EngineLost, match=rf"\({code.value}\): the GPU's context is broken and this engine process must be restarted"):
        scene.copy(rig)
    with pytest.raises(CopyError, match="lost"):
        rig.engine.load(FOUR, FOUR, rig.engine.mark())
    rig.close()
    standin.reset()


def test_a_context_that_the_engine_broke(scene: Scene) -> None:
    rig = scene.rig()
    scene.standin.break_context(Code.ILLEGAL_ADDRESS)
    mark = rig.engine.mark()  # does not raise
    with pytest.raises(CopyError, match=r"nothing was copied: .* could not be marked: .*CUDA_ERROR_ILLEGAL_ADDRESS"):
        scene.run(rig, mark)
    rig.close()
    scene.standin.reset()


def test_an_operation_that_fails_alone_fails_its_copy_alone(scene: Scene) -> None:
    rig = scene.rig()
    kind = {"dma": "batch", "kernel": "kernel"}.get(next(name for name, way in WAYS.items() if way is scene.settings), "copy")
    scene.standin.fail_operation(Code.UNKNOWN, rig.lane(scene.what), kind, sticky=False)
    with pytest.raises(CudaError, match="CUDA_ERROR_UNKNOWN"):
        scene.copy(rig)
    rig.engine.save(FOUR, FOUR, NONE, rig.engine.mark())
    rig.engine.load(FOUR, FOUR + 4, rig.engine.mark())
    assert [rig.block(number + 4) for number in range(4)] == [rig.block(number) for number in range(4)]
    rig.close()


@pytest.mark.parametrize("function", ["cuStreamIsCapturing", "cuEventRecord", "cuEventCreate", "cuCtxPushCurrent", "cuCtxPopCurrent"])
def test_a_mark_that_fails_raises_with_the_copy(standin: Standin, function: str) -> None:
    rig = CudaRig.plain(standin)
    held = [rig.engine.mark() for _ in range(40)]  # the next event has to be created
    marks: list[object] = []

    def mark() -> None:
        standin.fail(function, Code.UNKNOWN)
        marks.append(rig.engine.mark())

    Running(mark).result()  # in a thread where the context has still to be bound
    for _ in range(2):
        with pytest.raises(CopyError, match=f"nothing was copied: what it was to come after could not be marked: {function} failed"):
            rig.engine.save(ids(1), ids(1), ids(0), marks[0])
    assert rig.engine.save(ids(1), ids(1), ids(0), held[0]).all()
    assert rig.engine.save(ids(1), ids(1), ids(0), rig.engine.mark()).all()
    rig.close()


def test_a_mark_that_fails_in_torch_or_the_bindings_raises_with_the_copy(standin: Standin) -> None:
    rig = CudaRig.plain(standin)

    def current_stream() -> int:
        raise RuntimeError("torch has lost its device")

    works, rig.cuda.gpu = rig.cuda.gpu, replace(rig.cuda.gpu, current_stream=current_stream)
    mark = rig.engine.mark()
    with pytest.raises(CopyError, match=r"nothing was copied: .* could not be marked: torch has lost its device"):
        rig.engine.save(ids(1), ids(1), ids(0), mark)
    rig.cuda.gpu = works
    assert rig.engine.save(ids(1), ids(1), ids(0), rig.engine.mark()).all()
    rig.close()


def test_an_engine_that_is_closed_while_it_asks_for_the_stream(standin: Standin) -> None:
    rig = CudaRig.plain(standin)
    stream = rig.stream

    def current_stream() -> int:
        rig.engine.close()
        return stream

    rig.cuda.gpu = replace(rig.cuda.gpu, current_stream=current_stream)
    mark = rig.engine.mark()
    assert isinstance(mark, Mark)
    assert mark.event is None
    assert standin.calls("cuEventRecord") == []
    rig.close()


class Pausing:
    """As the engine's events; recording one takes until it is let go on."""

    def __init__(self, events: EventPool) -> None:
        self._events = events
        self.is_recording, self.go_on = threading.Event(), threading.Event()

    def take(self) -> Event:
        return self._events.take()

    def record(self, event: Event, stream: int) -> None:
        self.is_recording.set()
        assert self.go_on.wait(WAIT_S)
        self._events.record(event, stream)


def test_closing_waits_for_a_mark_that_is_being_recorded(standin: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = CudaRig.plain(standin)
    pausing = Pausing(rig.cuda._events)
    monkeypatch.setattr(rig.cuda, "_events", pausing)
    marking = Running(rig.engine.mark)
    assert pausing.is_recording.wait(WAIT_S)
    closing = Running(rig.engine.close)
    closing._thread.join(0.1)
    assert closing.is_running
    assert standin.calls("cuEventDestroy") == []
    pausing.go_on.set()
    marking.result()
    closing.result()
    assert standin.violations() == []
    rig.close()


# ---------------------------------------------------------------- making and closing one


@pytest.mark.parametrize(("copy", "expected"), [(CopyMode.AUTO, {"refused", "made"}), (CopyMode.SINGLE, {"refused"})])
def test_every_call_of_making_an_engine_fails_once(standin: Standin, copy: CopyMode, expected: set[str]) -> None:
    """Either there is an engine that works, or nothing is left of it."""
    settings = GpuCopySettings(copy=copy)
    CudaRig.plain(standin, settings, prepared=False).close()
    standin.reset()
    rig = CudaRig.plain(standin, settings, prepared=False)
    calls = len(standin.functions())
    rig.close()
    assert calls > 25
    outcomes = set()
    for at in range(1, calls + 1):
        for code in (Code.UNKNOWN, Code.OUT_OF_MEMORY):
            standin.reset(Machine())
            standin.fail("*", code, at)
            try:
                rig = CudaRig.plain(standin, settings, prepared=False)
            except (UnsupportedError, CudaError) as error:
                outcomes.add("refused" if any(word in str(error) for word in ("failed", "does not have")) else str(error))
            else:
                rig.engine.save(ids(*range(8)), ids(*range(8)), ids(*[0] * 8), rig.engine.mark())
                rig.engine.load(ids(*range(8)), ids(*range(8)), rig.engine.mark())
                assert rig.slot(7) == rig.block(7)
                rig.close()
                outcomes.add("made")
            standin.check()
    assert outcomes == expected


def test_every_call_of_closing_fails_once(standin: Standin) -> None:
    def make() -> CudaRig:
        standin.reset()
        rig = CudaRig.plain(standin)
        rig.engine.save(ids(*range(8)), ids(*range(8)), ids(*[0] * 8), rig.engine.mark())
        rig.engine.load(ids(*range(8)), ids(*range(8)), rig.engine.mark())
        standin.wait_idle()
        standin.clear_calls()
        return rig

    make().engine.close()
    calls = standin.functions()
    assert len(calls) > 20
    assert calls[-1] == "cuDevicePrimaryCtxRelease"
    for at in range(1, len(calls) + 1):
        rig = make()
        standin.fail("*", Code.UNKNOWN, at)
        rig.close()
        standin.check(leaks=at < len(calls))  # what the error kept from being given back does not count
    standin.reset()


def test_closing_waits_for_no_longer_than_the_copies(standin: Standin) -> None:
    rig = CudaRig.plain(standin)
    rig.engine.save(ids(*range(8)), ids(*range(8)), ids(*[0] * 8), rig.engine.mark())
    rig.engine.close()
    rig.engine.close()
    standin.check()
    rig.close()
