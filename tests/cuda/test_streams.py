from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.cuda.standin import Standin

from kvoffload.cuda.driver import CudaError, Driver
from kvoffload.cuda.streams import EventPool, Stream

pytestmark = pytest.mark.cuda

BLOCKING_SYNC_WITHOUT_TIMING = 3
NON_BLOCKING = 1


@pytest.fixture
def driver(standin: Standin) -> Iterator[Driver]:
    opened = Driver.open(0)
    opened.bind()
    yield opened
    opened.close()


def test_a_stream_is_non_blocking_and_of_the_lowest_priority(standin: Standin, driver: Driver) -> None:
    stream = Stream(driver)
    state = standin.stream(stream.handle)
    least, greatest = driver.call("cuCtxGetStreamPriorityRange")
    assert (state.flags, state.priority) == (NON_BLOCKING, least)
    assert least > greatest
    stream.close()
    stream.close()


def test_an_event_orders_two_streams(standin: Standin, driver: Driver) -> None:
    pool, first, second = EventPool(driver), Stream(driver), Stream(driver)
    event = pool.take()
    standin.hold(first.handle)
    first.record(event)
    second.wait(event)
    assert standin.stream(second.handle).kinds == ("wait",)
    standin.release(first.handle)
    second.synchronize()
    assert standin.stream(second.handle).pending == 0
    for part in (pool, first, second):
        part.close()


def test_events_sleep_and_do_not_time(standin: Standin, driver: Driver) -> None:
    pool = EventPool(driver, prepared=2)
    events = [pool.take() for _ in range(3)]
    assert {call.arguments["flags"] for call in standin.calls("cuEventCreate")} == {BLOCKING_SYNC_WITHOUT_TIMING}
    assert len({event.handle for event in events}) == len(standin.calls("cuEventCreate")) == 3
    del events
    pool.close()


def test_an_event_comes_back_with_its_last_reference_and_without_a_call(standin: Standin, driver: Driver) -> None:
    pool = EventPool(driver, prepared=1)
    event = pool.take()
    handle, also = event.handle, event
    standin.clear_calls()
    del event
    assert pool.take().handle != handle
    standin.clear_calls()
    del also
    assert standin.functions() == []
    assert handle in {pool.take().handle, pool.take().handle}
    pool.close()


def test_closing_destroys_what_somebody_still_holds(standin: Standin, driver: Driver) -> None:
    pool = EventPool(driver, prepared=2)
    held = pool.take()
    pool.close()
    assert standin.live("event") == []
    standin.clear_calls()
    del held
    assert standin.functions() == []
    pool.close()


def test_an_event_that_is_still_to_come_is_left_to_the_driver(standin: Standin, driver: Driver) -> None:
    pool, stream = EventPool(driver, prepared=2), Stream(driver)
    event = pool.take()
    standin.hold(stream.handle)
    stream.record(event)
    pool.close()
    assert [live.handle for live in standin.live("event")] == [event.handle]
    standin.release(stream.handle)
    stream.synchronize()
    stream.close()
    driver.call("cuEventDestroy", event.handle)


@pytest.mark.parametrize("function", ["cuEventQuery", "cuEventDestroy"])
def test_closing_goes_on_after_an_error(standin: Standin, driver: Driver, function: str) -> None:
    pool, stream = EventPool(driver, prepared=3), Stream(driver)
    for event in [pool.take() for _ in range(3)]:
        stream.record(event)
    stream.synchronize()
    stream.close()
    standin.fail(function, 999)
    pool.close()
    assert len(standin.calls("cuEventDestroy")) == 3


def test_what_fails_raises(standin: Standin, driver: Driver) -> None:
    stream = Stream(driver)
    standin.fail("cuStreamSynchronize", 719)
    with pytest.raises(CudaError, match="cuStreamSynchronize failed: CUDA_ERROR_LAUNCH_FAILED"):
        stream.synchronize()
    stream.close()
