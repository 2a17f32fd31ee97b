"""What the link between a GPU and host memory gives at most: one large copy of pinned memory, each way and both ways at once."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass

from kvoffload.bench.gpu_clock import Clock
from kvoffload.cuda.driver import Driver
from kvoffload.cuda.streams import EventPool, Stream


@dataclass(frozen=True, slots=True)
class Peak:
    """GB/s, the best of some copies; ``both`` is the sum of both ways."""

    to_gpu: float
    to_host: float
    both: float


def measure_peak(driver: Driver, device: int, host: int, num_bytes: int, copies: int) -> Peak:
    """``device`` and ``host`` are addresses of ``num_bytes`` each; host memory is pinned, in one registration. Raises CudaError."""
    driver.bind()
    half = num_bytes // 2
    with ExitStack() as undo:
        streams = (undo.enter_context(closing(Stream(driver))), undo.enter_context(closing(Stream(driver))))
        events = undo.enter_context(closing(EventPool(driver, prepared=2)))
        clock = undo.enter_context(closing(Clock(driver, streams[0])))

        def copy(target: int, source: int, size: int, stream: Stream) -> None:
            driver.call("cuMemcpyAsync", target, source, size, stream.handle)

        def both() -> None:
            begun, ended = events.take(), events.take()
            streams[0].record(begun)
            streams[1].wait(begun)
            copy(device, host, half, streams[0])
            copy(host + half, device + half, half, streams[1])
            streams[1].record(ended)
            streams[0].wait(ended)

        def best(work: object, size: int) -> float:
            assert callable(work)
            return size / min(clock.seconds(work) for _ in range(copies + 1)) / 1e9

        try:
            return Peak(
                to_gpu=best(lambda: copy(device, host, num_bytes, streams[0]), num_bytes),
                to_host=best(lambda: copy(host, device, num_bytes, streams[0]), num_bytes),
                both=best(both, 2 * half),
            )
        finally:
            for stream in streams:
                stream.synchronize()
