from __future__ import annotations

import threading
import time

import anyio
import pytest

from kvoffload.testing.clock import VirtualLoop, run_virtually, virtual_backend


@pytest.mark.anyio
async def test_an_hour_passes_at_once() -> None:
    began, real = anyio.current_time(), time.monotonic()
    await anyio.sleep(3600)
    assert anyio.current_time() - began == pytest.approx(3600)
    assert time.monotonic() - real < 10


@pytest.mark.anyio
async def test_sleepers_wake_in_the_order_of_their_deadlines() -> None:
    woken: list[tuple[float, float]] = []
    began = anyio.current_time()

    async def sleeper(seconds: float) -> None:
        await anyio.sleep(seconds)
        woken.append((seconds, anyio.current_time() - began))

    async with anyio.create_task_group() as tasks:
        for seconds in (5.0, 0.5, 86_400.0, 1e-6, 50.0):
            tasks.start_soon(sleeper, seconds)
    assert [seconds for seconds, _ in woken] == [1e-6, 0.5, 5.0, 50.0, 86_400.0]
    assert all(at == pytest.approx(seconds) for seconds, at in woken)


@pytest.mark.anyio
async def test_a_timeout_is_exact() -> None:
    began = anyio.current_time()
    with anyio.move_on_after(10) as scope:
        await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert anyio.current_time() - began == pytest.approx(10)


@pytest.mark.anyio
async def test_input_comes_before_a_jump() -> None:
    """A byte that is there already is read, and no time passes, however short the timeout."""
    began = anyio.current_time()
    left, right = await _socket_pair()
    async with left, right:
        await left.send(b"x")
        with anyio.fail_after(1e-3):
            assert await right.receive() == b"x"
    assert anyio.current_time() == began


async def _socket_pair() -> tuple[anyio.abc.UNIXSocketStream, anyio.abc.UNIXSocketStream]:
    import socket

    from anyio.abc import UNIXSocketStream

    left, right = socket.socketpair()
    return await UNIXSocketStream.from_socket(left), await UNIXSocketStream.from_socket(right)


def test_the_clock_begins_at_zero_and_moves_only_forwards() -> None:
    loop = VirtualLoop()
    try:
        assert loop.time() == 0.0
        loop.advance(1.5)
        assert loop.time() == 1.5
        with pytest.raises(ValueError, match="backwards"):
            loop.advance(-1)
    finally:
        loop.close()


def test_without_a_deadline_it_waits_for_threads() -> None:
    async def wait_for_a_thread() -> float:
        await anyio.to_thread.run_sync(started.wait)
        return anyio.current_time()

    started = threading.Event()
    threading.Timer(0.05, started.set).start()
    assert run_virtually(wait_for_a_thread) == 0.0


def test_grace_lets_a_thread_finish_before_the_jump() -> None:
    async def race() -> bool:
        with anyio.move_on_after(1) as scope:
            await anyio.to_thread.run_sync(started.wait, abandon_on_cancel=True)
        return scope.cancelled_caught

    started = threading.Event()
    threading.Timer(0.05, started.set).start()
    name, options = virtual_backend("asyncio", grace_s=30.0)
    assert not anyio.run(race, backend=name, backend_options=options)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_run_virtually_passes_arguments_and_result(backend: str) -> None:
    async def sleep_for(seconds: float) -> float:
        await anyio.sleep(seconds)
        return anyio.current_time()

    assert run_virtually(sleep_for, 1000.0, backend=backend) == pytest.approx(1000.0)
