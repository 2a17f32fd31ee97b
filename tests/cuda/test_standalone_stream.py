"""KV without vLLM: what is stored is what the stream that it is computed in has written, not what the blocks held when asked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.copy.rigs import WAIT_S
from tests.cuda.standin import Standin
from tests.cuda.test_startup import PAGE, on_gpu, settings

import kvoffload
from kvoffload.errors import MisuseError
from kvoffload.standalone import Runtime

pytestmark = [pytest.mark.cuda, pytest.mark.anyio, pytest.mark.real_clock]

BLOCK_SIZE = 4


@dataclass
class Stream:
    """As torch.cuda.Stream; the handle may be changed, as torch's current stream may."""

    cuda_stream: int


@asynccontextmanager
async def registered(tensors: dict[str, Any], stream: Stream | int) -> AsyncIterator[Runtime]:
    async with kvoffload.open_runtime(settings(pin_at_start_s=0)) as runtime:
        with anyio.fail_after(WAIT_S):
            await runtime.register(tensors, block_size=BLOCK_SIZE, stream=stream)
        yield runtime


def array_of(tensor: torch.Tensor) -> NDArray[np.uint8]:
    array: NDArray[np.uint8] = tensor.as_subclass(torch.Tensor).numpy()
    return array


def compute(standin: Standin, stream: int, tensors: dict[str, Any], block: int, byte: int) -> None:
    for tensor in tensors.values():
        standin.write(stream, array_of(tensor)[block], np.full(PAGE, byte, np.uint8))


async def in_thread(call: partial[None]) -> None:
    """A wait of the stand-in, which must not stop the loop. (It is bounded.)"""
    await anyio.to_thread.run_sync(call)


@pytest.mark.parametrize("as_handle", [False, True])
async def test_a_save_waits_for_the_stream_that_kv_is_computed_in(standin: Standin, as_handle: bool) -> None:
    tensors, own = on_gpu(standin), standin.engine_stream()
    tokens = list(range(BLOCK_SIZE))
    async with registered(tensors, own if as_handle else Stream(own)) as runtime:
        standin.hold(own)
        compute(standin, own, tensors, 3, 0xC3)
        before = len(standin.calls("cuEventRecord"))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(runtime.save, tokens, [3])
            await in_thread(partial(standin.wait_blocked, "cuEventSynchronize"))
            assert standin.calls("cuEventRecord")[before].arguments["stream"] == own
            assert array_of(tensors["layers.0"])[3, 0] != 0xC3
            standin.release(own)
        compute(standin, own, tensors, 3, 0)
        async with runtime.match(tokens) as hit:
            assert hit.tokens == BLOCK_SIZE
            await runtime.load(hit, [6])
        assert all((array_of(tensor)[6] == 0xC3).all() for tensor in tensors.values())
        standin.wait_idle(own)


async def test_a_load_comes_after_what_the_stream_still_does_to_its_blocks(standin: Standin) -> None:
    tensors, own = on_gpu(standin), standin.engine_stream()
    tokens = list(range(BLOCK_SIZE))
    async with registered(tensors, Stream(own)) as runtime:
        kept = array_of(tensors["layers.1"])[3].copy()
        await runtime.save(tokens, [3])
        async with runtime.match(tokens) as hit, anyio.create_task_group() as tasks:
            standin.hold(own)
            compute(standin, own, tensors, 6, 0)
            tasks.start_soon(partial(runtime.load, hit, [6]))
            await in_thread(partial(standin.wait_blocked, "cuEventSynchronize"))
            standin.release(own)
        standin.wait_idle(own)
        assert np.array_equal(array_of(tensors["layers.1"])[6], kept)


async def test_the_stream_is_that_of_the_call_also_where_the_call_waits_for_room(standin: Standin) -> None:
    """Torch's current stream is the thread's: when a waiting task goes on it may be any other task's."""
    tensors = on_gpu(standin)
    first, second, other = (standin.engine_stream() for _ in range(3))
    current = Stream(first)
    async with registered(tensors, current) as runtime:
        runtime._saves_room = anyio.Semaphore(1)
        standin.hold(first)
        compute(standin, first, tensors, 1, 1)
        before = len(standin.calls("cuEventRecord"))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(runtime.save, list(range(BLOCK_SIZE)), [1])
            await in_thread(partial(standin.wait_blocked, "cuEventSynchronize"))
            current.cuda_stream = second
            tasks.start_soon(runtime.save, list(range(100, 100 + BLOCK_SIZE)), [2])
            with anyio.fail_after(WAIT_S):
                while runtime._saves_room.statistics().tasks_waiting == 0:  # noqa: ASYNC110  no event of the runtime's says so
                    await anyio.sleep(0.002)
            current.cuda_stream = other
            standin.release(first)
        marked = [call.arguments["stream"] for call in standin.calls("cuEventRecord")[before:]]
        assert {first, second} <= set(marked)
        assert other not in marked


@pytest.mark.parametrize("stream", ["0", True, 1.5, Stream("0")])  # type: ignore[arg-type]
async def test_what_is_no_stream_is_refused(standin: Standin, stream: Any) -> None:
    async with kvoffload.open_runtime(settings()) as runtime:
        with pytest.raises(MisuseError, match=r"stream= is a torch\.cuda\.Stream"):
            await runtime.register(on_gpu(standin), block_size=BLOCK_SIZE, stream=stream)
