"""Random programs on several streams: what is ordered by events comes out as if the calls had been done one after another."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.cuda.standin import BatchOrder, Machine, Standin
from tests.cuda.standin_rig import PAGE, STREAM, Gpu, opened

pytestmark = pytest.mark.cuda

STREAMS, PIECES, CALLS = 3, 16, 60
PIECE = PAGE // PIECES


@pytest.fixture(params=range(12))
def gpu(standin: Standin, request: pytest.FixtureRequest) -> Iterator[Gpu]:
    standin.reset(Machine(seed=request.param, jitter_us=200, batch_order=BatchOrder.SHUFFLED))
    with opened(standin) as device:
        yield device


class Program:
    """The same calls, made to the stand-in and, at once, to ``expected``."""

    def __init__(self, gpu: Gpu, seed: int) -> None:
        self.gpu, self.random = gpu, random.Random(seed)
        self.streams = [gpu.stream() for _ in range(STREAMS)]
        self.slots, self.kv = gpu.pinned(1), gpu.device(PAGE)
        self.expected: tuple[NDArray[np.uint8], NDArray[np.uint8]] = (self.slots.copy(), self.kv.copy())

    def piece(self, memory: NDArray[np.uint8], number: int) -> NDArray[np.uint8]:
        return memory[number * PIECE : (number + 1) * PIECE]

    def behind_all_others(self, stream: int) -> None:
        for other in self.streams:
            if other != stream:
                event = self.gpu.event()
                self.gpu.record(event, other)
                self.gpu.wait(stream, event)

    def step(self) -> None:
        stream = self.random.choice(self.streams)
        self.behind_all_others(stream)
        kind, value = self.random.choice(["set", "save", "load"]), self.random.randrange(256)
        chosen = self.random.sample(range(PIECES), 4)
        slots, kv = self.expected
        if kind == "set":
            self.gpu.do("cuMemsetD8Async", self.piece(self.kv, chosen[0]).ctypes.data, value, PIECE, stream)
            self.piece(kv, chosen[0])[:] = value
            return
        pairs = list(zip(chosen, self.random.sample(range(PIECES), 4), strict=True))
        into, out_of = (self.slots, self.kv) if kind == "save" else (self.kv, self.slots)
        assert self.gpu.batch(stream, [(self.piece(into, i), self.piece(out_of, j), PIECE) for i, j in pairs], order=STREAM) == 0
        target, source = (slots, kv) if kind == "save" else (kv, slots)
        for i, j in pairs:
            self.piece(target, i)[:] = self.piece(source, j)


def test_what_is_ordered_comes_out_as_written(gpu: Gpu) -> None:
    program = Program(gpu, gpu.standin.machine.seed)
    for _ in range(CALLS):
        program.step()
    gpu.do("cuCtxSynchronize")
    assert gpu.standin.violations() == []
    assert [memory.tobytes() for memory in (program.slots, program.kv)] == [memory.tobytes() for memory in program.expected]


def test_one_wait_less_is_seen(gpu: Gpu) -> None:
    """Whatever the streams' threads make of it: all of them are held until the last call."""
    program = Program(gpu, gpu.standin.machine.seed)
    for stream in program.streams:
        gpu.standin.hold(stream)
    for _ in range(CALLS):
        program.step()
    left_out, stream = program.random.sample(program.streams, 2)
    gpu.do("cuMemsetD8Async", program.kv.ctypes.data, 1, PAGE, left_out)
    gpu.standin.forgive("race")  # of that one itself, which waits for nobody
    gpu.do("cuMemsetD8Async", program.kv.ctypes.data, 2, PAGE, stream)
    for each in program.streams:
        gpu.standin.release(each)
    gpu.do("cuCtxSynchronize")
    gpu.standin.expect("race")
