"""What our copies cost a kernel that runs meanwhile: memory set and copied within the GPU, with and without them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing

from kvoffload.bench.gpu_clock import Clock
from kvoffload.bench.gpu_rates import Repeated
from kvoffload.cuda.driver import Driver
from kvoffload.cuda.streams import Stream
from kvoffload.doctor.gpu_memory import DeviceMemory


class RunningKernel:
    """A loop over ``memory``, limited by the GPU's memory as decoding is: one half set, then copied to the other. To be closed."""

    def __init__(self, driver: Driver, memory: DeviceMemory, wanted_s: float) -> None:
        self._driver, self._memory, self._half = driver, memory, memory.num_bytes // 2
        self._rounds = 4
        with ExitStack() as undo:
            driver.bind()
            self._stream = undo.enter_context(closing(Stream(driver)))
            self._clock = undo.enter_context(closing(Clock(driver, self._stream)))
            undo.callback(self._settle)
            self.seconds()
            self._rounds = max(4, min(20_000, round(self._rounds * wanted_s / self.seconds())))
            self._undo = undo.pop_all()

    def seconds(self) -> float:
        """Of so many rounds as take about the time wanted."""
        return self._clock.seconds(self._run)

    def slowdown_percent(self, copies: Callable[[], None], repeats: int) -> float:
        """How much longer it takes while ``copies`` is called again and again; the median of pairs, alone and not. Raises CudaError."""
        ratios = []
        for _ in range(repeats):
            alone = self.seconds()
            background = Repeated(copies)
            try:
                background.wait_first()
                ratios.append(self.seconds() / alone)
            finally:
                background.stop()
        ratios.sort()
        return (ratios[len(ratios) // 2] - 1) * 100

    def close(self) -> None:
        self._undo.close()

    def _settle(self) -> None:
        """What it still does is at memory that goes next."""
        self._driver.bind()
        self._stream.synchronize()

    def _run(self) -> None:
        first, second, stream = self._memory.address, self._memory.address + self._half, self._stream.handle
        for number in range(self._rounds):
            self._driver.call("cuMemsetD8Async", first, number & 255, self._half, stream)
            self._driver.call("cuMemcpyDtoDAsync", second, first, self._half, stream)
