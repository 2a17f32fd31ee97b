"""A rank's half on a GPU, from its tensors to its end: what is pinned when, what no graph capture may meet, what is given back."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.copy.rigs import WAIT_S
from tests.cuda.rigs import aligned
from tests.cuda.standin import Code, Standin

from kvoffload import populate
from kvoffload.bridge import LoopThread
from kvoffload.config import Config
from kvoffload.copy import cuda
from kvoffload.copy.engine import CopyEngine
from kvoffload.cuda import pinned
from kvoffload.errors import CopyError, KVOffloadError, LayoutError
from kvoffload.ledger import Ledger
from kvoffload.messages import LoadBlocks, SegmentGrown
from kvoffload.runtime import rank as rank_module
from kvoffload.runtime.worker import FromRank, Rank, WorkerRuntime
from kvoffload.segment import STEP_BYTES

pytestmark = pytest.mark.cuda

MIB = 1 << 20
BLOCKS, LAYERS, PAGE = 8, 3, 8192
SLOT = LAYERS * PAGE + 4096
PIECE_SLOTS = 4 * MIB // SLOT
STEPS = 4
SLOTS = STEPS * STEP_BYTES // SLOT
IN_A_STEP = STEP_BYTES // SLOT


class GpuTensor(torch.Tensor):
    """A tensor of ordinary memory that says it were on a GPU, which the stand-in plays."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)


def on_gpu(standin: Standin) -> dict[str, Any]:
    caches: list[NDArray[np.uint8]] = [aligned((BLOCKS, PAGE)) for _ in range(LAYERS)]
    for cache in caches:
        standin.device_memory(cache)
        cache[:] = np.random.default_rng(7).integers(0, 256, cache.shape, dtype=np.uint8)
    return {f"layers.{number}": torch.from_numpy(cache).as_subclass(GpuTensor) for number, cache in enumerate(caches)}


def settings(**gpu: object) -> Config:
    return Config.load({"l1": {"capacity_bytes": STEPS * STEP_BYTES, "reserve_bytes": 0}, "gpu": {"pin_piece_bytes": 4 * MIB, **gpu}}, {})


class Half:
    """A worker's runtime on the stand-in; its hub only listens."""

    def __init__(self, standin: Standin, **gpu: object) -> None:
        self.standin = standin
        self.stream = standin.engine_stream()
        config = settings(**gpu)
        self.rank = Rank.prepare(config, 0, on_gpu(standin), BLOCKS, lambda engine: engine, lambda: self.stream)
        self.loop = LoopThread("worker", lambda error: None)
        self.loop.start()
        self.runtime = WorkerRuntime(config, self.rank, self.loop.call_soon)
        self.loop.submit(self.runtime.run)
        self.told: list[FromRank] = []
        self.ledger = Ledger(BLOCKS)

    def start(self) -> None:
        self.runtime.start()
        self.runtime.attach(self.ledger, self.told.append)

    @property
    def pinned(self) -> int:
        assert self.rank.gpu is not None
        return self.rank.gpu.pinned.pinned_slots

    def usable(self) -> int:
        return max((message.slots for message in self.told if isinstance(message, SegmentGrown)), default=0)

    def close(self) -> bool:
        return self.runtime.close(WAIT_S)

    def end(self) -> None:
        self.close()
        assert self.loop.stop(WAIT_S)
        self.ledger.close()


@pytest.fixture(autouse=True)
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(populate, "CREW_STEP_BYTES", STEP_BYTES)


@pytest.fixture
def half(request: pytest.FixtureRequest, standin: Standin) -> Iterator[Half]:
    made = Half(standin, **getattr(request, "param", {"pin_at_start_s": 0}))
    yield made
    made.end()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.002)


# ------------------------------------------------------------ at the start


def test_the_proof_goes_the_way_that_blocks_will_go(half: Half) -> None:
    names = half.standin.functions()
    assert "cuMemHostRegister" in names
    assert names.index("cuMemHostRegister") < names.index("cuMemcpyBatchAsync")
    assert half.pinned == IN_A_STEP


@pytest.mark.parametrize("half", [{"pin_at_start_s": 3600}], indirect=True)
def test_with_time_all_is_pinned_before_the_start_is_over(half: Half) -> None:
    half.runtime.start()
    assert half.pinned == SLOTS
    half.standin.clear_calls()
    half.runtime.attach(half.ledger, half.told.append)
    until(lambda: half.usable() == SLOTS)
    assert half.runtime._populator.wait(WAIT_S)
    assert half.standin.functions() == []


def test_without_time_the_first_step_is_pinned_and_used(half: Half) -> None:
    half.start()
    until(lambda: half.usable() == IN_A_STEP)
    assert half.pinned == IN_A_STEP


@pytest.mark.parametrize("half", [{"pin_at_start_s": 3600}], indirect=True)
def test_the_log_says_how_much_is_pinned(half: Half, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kvoffload")
    half.start()
    [line] = [record.getMessage() for record in caplog.records if "ready to copy" in record.getMessage()]
    assert "engine=cuda" in line
    assert "KV is on cuda:0, Stand-in GPU" in line
    assert "pinned_gib=0.06 of_gib=0.06" in line


# ------------------------------------------------------------ after the start: nothing while a graph may be captured


def test_nothing_is_called_from_the_start_to_the_first_step(half: Half) -> None:
    half.start()
    half.standin.clear_calls()
    with half.standin.capture(half.standin.engine_stream()):
        until(lambda: half.rank.segment.populated_slots == SLOTS)
        assert not half.runtime._populator.wait(0.05)
        assert half.standin.functions() == []
    assert half.usable() == IN_A_STEP
    half.runtime.mark()
    until(lambda: half.usable() == SLOTS)
    assert half.pinned == SLOTS
    sizes = [int(list(call.arguments.values())[1]) for call in half.standin.calls("cuMemHostRegister")]
    assert max(sizes) == PIECE_SLOTS * SLOT


def test_a_mark_within_a_capture_is_no_step(half: Half) -> None:
    half.start()
    until(lambda: half.rank.segment.populated_slots == SLOTS)
    with half.standin.capture(half.stream):
        half.runtime.mark()
        assert not half.runtime._populator.wait(0.05)
    assert half.pinned == IN_A_STEP
    half.runtime.mark()
    until(lambda: half.usable() == SLOTS)


def test_marks_before_the_hub_came_and_those_of_the_proof_are_no_leave(half: Half) -> None:
    half.runtime.start()
    half.rank.engine.mark()
    half.runtime.attach(half.ledger, half.told.append)
    until(lambda: half.rank.segment.populated_slots == SLOTS)
    assert not half.runtime._populator.wait(0.05)
    assert half.pinned == IN_A_STEP


def test_pieces_are_smaller_while_the_model_runs(half: Half, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_module, "LATER_PIECE_BYTES", MIB)
    late = WorkerRuntime(settings(pin_at_start_s=0), half.rank, half.loop.call_soon)
    late.start()
    half.standin.clear_calls()
    late.attach(half.ledger, half.told.append)
    late.mark()
    assert late._populator.wait(WAIT_S)
    assert half.pinned == SLOTS
    sizes = [int(list(call.arguments.values())[1]) for call in half.standin.calls("cuMemHostRegister")]
    assert MIB - SLOT < max(sizes) <= MIB
    assert late.hands.close(WAIT_S)


def test_slots_are_reported_as_they_are_pinned(half: Half) -> None:
    half.start()
    until(lambda: half.rank.segment.populated_slots == SLOTS)
    half.standin.delay_calls("cuMemHostRegister", 0.05)
    half.runtime.mark()
    until(lambda: half.usable() == SLOTS)
    reported = [message.slots for message in half.told if isinstance(message, SegmentGrown)]
    assert len(reported) > 3
    assert reported == sorted(reported)


# ------------------------------------------------------------ refusals


@pytest.mark.parametrize("pinned_mib", [0, 4, 20])
def test_refused_memory_is_used_all_the_same(standin: Standin, caplog: pytest.LogCaptureFixture, pinned_mib: int) -> None:
    caplog.set_level(logging.INFO, "kvoffload")
    standin.configure(register_total_bytes=pinned_mib * MIB)
    half = Half(standin, pin_at_start_s=3600)
    half.start()
    until(lambda: half.usable() == SLOTS)
    assert half.pinned <= pinned_mib * MIB // SLOT
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if "the driver pins no more" in line]) == 1
    assert [line for line in lines if "ready to copy" in line and "not pinned: cuMemHostRegister failed" in line]
    half.end()


def test_pinning_switched_off(standin: Standin, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kvoffload")
    half = Half(standin, pin=False, pin_at_start_s=3600)
    half.start()
    until(lambda: half.usable() == SLOTS)
    assert standin.calls("cuMemHostRegister") == []
    assert "not pinned: gpu.pin is false" in caplog.text
    half.end()


@pytest.mark.parametrize("mode", ["off", "refused", "refused at the second piece"])
def test_what_will_not_be_pinned_holds_nothing_up(standin: Standin, mode: str) -> None:
    """No time at the start buys anything, and nothing of the driver is to come that a graph's capture had to be over for."""
    if mode != "off":
        standin.configure(register_total_bytes=STEP_BYTES + (4 * MIB if "second" in mode else -STEP_BYTES))
    half = Half(standin, pin=mode != "off", pin_at_start_s=3600)
    half.runtime.start()
    assert half.rank.segment.populated_slots < SLOTS - IN_A_STEP
    standin.clear_calls()
    with standin.capture(standin.engine_stream()):
        half.runtime.attach(half.ledger, half.told.append)
        until(lambda: half.usable() == SLOTS)
        assert standin.functions() == []
    half.end()


# ------------------------------------------------------------ ends


@pytest.mark.parametrize("half", [{"pin_at_start_s": 3600}, {"pin_at_start_s": 0}], indirect=True)
def test_closed_all_is_given_back_before_it_is_unmapped(half: Half) -> None:
    half.start()
    assert half.close()
    assert half.standin.live() == []
    assert len(half.rank.segment.array) == 0
    names = [name for name in half.standin.functions() if name in ("cuStreamDestroy", "cuMemHostUnregister")]
    assert names == sorted(names, key=("cuStreamDestroy", "cuMemHostUnregister").index), "streams end first"
    assert names[-1] == "cuMemHostUnregister"


def test_closed_while_it_waits_for_the_first_step(half: Half) -> None:
    half.start()
    until(lambda: half.rank.segment.populated_slots == SLOTS)
    assert half.close()
    assert half.standin.live() == []


def test_closed_while_it_pins_the_piece_under_way_is_the_last(half: Half) -> None:
    half.start()
    until(lambda: half.rank.segment.populated_slots == SLOTS)
    half.standin.clear_calls()
    half.standin.delay_calls("cuMemHostRegister", 0.1)
    half.runtime.mark()
    half.standin.wait_calls("cuMemHostRegister")
    assert half.close()
    assert len(half.standin.calls("cuMemHostRegister")) <= 2
    assert half.standin.live() == []


def test_turned_off_before_the_first_step_it_pins_nothing_more(half: Half) -> None:
    half.start()
    half.runtime.turn_off("no use", quiet=True)
    half.runtime.mark()
    assert half.runtime._populator.wait(WAIT_S)
    assert half.pinned == IN_A_STEP


def test_a_copy_that_does_not_end_leaves_all_in_place(half: Half) -> None:
    half.start()
    half.standin.hold(half.stream)
    half.standin.write(half.stream, 0, b"")
    half.runtime.load(LoadBlocks(1, "r", (0,), (1,), half.runtime.mark()))
    half.standin.wait_blocked("cuEventSynchronize")
    assert not half.runtime.close(0.3)
    assert half.standin.calls("cuMemHostUnregister") == []
    assert len(half.rank.segment.array) == half.rank.segment.num_bytes
    half.standin.release(half.stream)
    assert half.runtime.hands.close(WAIT_S)
    half.rank.close()
    assert half.standin.live() == []


# ------------------------------------------------------------ what cannot be made


LEFT = {"cuEventQuery": "event", "cuDevicePrimaryCtxRelease": "primary context"}
"""What is rightly left where these fail: an event that may be pending, and what cannot be given back."""


def test_whatever_call_fails_nothing_is_left(standin: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of the driver in turn, from the first to the end of the engine."""
    monkeypatch.setattr(pinned, "_still_registered", [])
    config = Config.load({"l1": {"capacity_bytes": 2 * MIB, "reserve_bytes": 0}, "gpu": {"pin_piece_bytes": MIB}}, {})
    stream, caches = standin.engine_stream(), on_gpu(standin)
    failures = 0
    for at in range(1, 1000):
        standin.clear_calls()
        standin.fail("*", Code.INVALID_VALUE, at=at)
        try:
            rank = Rank.prepare(config, 0, caches, BLOCKS, lambda engine: engine, partial(int, stream))
        except KVOffloadError:
            failures += 1
        else:
            rank.close()
        names = standin.functions()
        if len(names) < at:
            break
        standin.check(leaks=False)
        if left := [item.kind for item in standin.live()]:
            assert left == [LEFT.get(names[at - 1])], f"call {at} of {names}"
            standin.reset()
            stream, caches = standin.engine_stream(), on_gpu(standin)
    else:
        pytest.fail("it never came to its end")
    assert failures > 10
    standin.reset()


def test_slots_that_a_lost_engine_may_still_touch_stay_mapped(standin: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []
    monkeypatch.setattr(cuda, "_lost_engines", kept)
    stream, caches = standin.engine_stream(), on_gpu(standin)
    standin.fail_operation(Code.ILLEGAL_ADDRESS, kind="batch")
    gc.collect()
    before = mapped()
    with pytest.raises(LayoutError, match="ILLEGAL_ADDRESS"):
        Rank.prepare(settings(), 0, caches, BLOCKS, lambda engine: engine, lambda: stream)
    gc.collect()
    assert mapped() == before + 1
    standin.reset()
    kept.clear()
    gc.collect()
    assert mapped() == before


def mapped() -> int:
    return Path("/proc/self/maps").read_text().count("kvoffload-segment")


def test_what_was_pinned_for_a_proof_that_fails_is_given_back(standin: Standin) -> None:
    def wrap(engine: CopyEngine) -> CopyEngine:
        raise CopyError("no")

    stream = standin.engine_stream()
    with pytest.raises(CopyError):
        Rank.prepare(settings(), 0, on_gpu(standin), BLOCKS, wrap, lambda: stream)
    assert len(standin.calls("cuMemHostUnregister")) == len(standin.calls("cuMemHostRegister")) > 0
    assert standin.live() == []
