"""The proof on a GPU: layouts of all kinds there and back by every way of copying, byte by byte, and behind what the GPU computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvoffload.copy.engine import CopyEngine
from kvoffload.copy.host import HostCopyEngine
from kvoffload.copy.proof import UNTOUCHED, prove
from kvoffload.cuda.driver import Driver
from kvoffload.cuda.settings import CopyMode, GpuCopySettings
from kvoffload.doctor.gpu_layouts import Cache
from kvoffload.doctor.gpu_memory import DeviceMemory, Mirrored, Rig, Twins
from kvoffload.doctor.report import Finding, State, collected_warnings
from kvoffload.errors import KVOffloadError, LayoutError
from kvoffload.layout import HEADER_BYTES, MAX_ALIGNMENT
from kvoffload.ledger import Ledger
from kvoffload.segment import Segment

TROUBLE = (KVOffloadError, OSError, MemoryError, RuntimeError)
"""What may go wrong on a machine. RuntimeError: how cuda-bindings say that a driver does not have a function."""

WrapEngine = Callable[[CopyEngine], CopyEngine]


@dataclass(frozen=True, slots=True)
class Way:
    """A way of copying, as the settings choose it."""

    name: str
    mode: CopyMode
    pin: bool = True

    def settings(self, base: GpuCopySettings) -> GpuCopySettings:
        return replace(base, copy=self.mode, pin=self.pin)


WAYS = (
    Way("DMA", CopyMode.DMA),
    Way("kernel", CopyMode.KERNEL),
    Way("single copies", CopyMode.SINGLE),
    Way("unpinned", CopyMode.DMA, pin=False),
)


def check_cache(driver: Driver, cache: Cache, base: GpuCopySettings, busy: DeviceMemory, wrap: WrapEngine) -> Iterator[Finding]:
    """One finding for each way. ``busy`` is memory that the GPU is kept busy with. Raises nothing that a machine can be blamed for."""
    for way in WAYS:
        name = f"{cache.name}, {way.name}"
        try:
            with collected_warnings() as warnings, closing(Twins(driver, cache)) as twins:
                why_not = _check(driver, twins, way, base, busy, wrap)
        except TROUBLE as error:
            yield Finding(name, str(error) or repr(error), State.FAILED)
            continue
        if way.mode is CopyMode.KERNEL and twins.layout.alignment < MAX_ALIGNMENT and len(warnings) == 1:
            yield Finding(name, f"right, by DMA: the kernel leaves an alignment of {twins.layout.alignment} bytes to it", State.OK)
        elif why_not:
            yield Finding(name, f"right, but by another way: {why_not}", State.MISSING)
        elif warnings:
            yield Finding(name, f"right, but: {'; '.join(dict.fromkeys(warnings))}", State.MISSING)
        else:
            yield Finding(name, f"{cache.num_blocks} blocks of {twins.layout.payload_bytes >> 10} KiB, there and back", State.OK)


def obstacle(rig: Rig, settings: GpuCopySettings) -> str | None:
    """Why what these settings ask for cannot be done here, where the engine does it otherwise without a word."""
    if settings.pin and rig.pinned.pinned_slots < rig.segment.slots:
        return f"host memory is not pinned: {rig.pinned.refused}"
    if settings.copy is CopyMode.KERNEL and not rig.pinned.device_pointer_is_host_pointer:
        return "kernels cannot use pinned memory, as the GPU does not know it by the CPU's address"
    return None


def _check(driver: Driver, twins: Twins, way: Way, base: GpuCopySettings, busy: DeviceMemory, wrap: WrapEngine) -> str | None:
    settings = way.settings(base)
    count = twins.cache.num_blocks
    if twins.layout.digest() != twins.host_layout.digest():
        raise LayoutError("a layout has another digest in a GPU than in ordinary memory")
    with closing(Rig(driver.ordinal, twins.layout, count, settings)) as rig, closing(rig.engine(settings)) as made, ExitStack() as undo:
        engine = wrap(made)
        prove(twins.layout, Mirrored(engine, twins), twins.views, rig.segment, rig.ledger)
        expected = Segment.create(rig.segment.num_bytes, rig.segment.slot_bytes)
        undo.callback(expected.close)
        expected.populate_next(expected.num_bytes)
        host_ledger = undo.enter_context(closing(Ledger(count)))
        with closing(HostCopyEngine(twins.host_layout, expected, host_ledger)) as host:
            _round_trip(engine, twins, rig.segment, host, expected)
            try:
                _in_order(engine, twins, rig, host, expected, busy)
            finally:
                rig.settle()  # before the engine ends, whose marks are in the stream
        return obstacle(rig, settings)


def _round_trip(engine: CopyEngine, twins: Twins, slots_of: Segment, host: HostCopyEngine, expected: Segment) -> None:
    """All blocks into slots, half of them back into others: memory as a whole must be what the host's engine makes of its twin."""
    random, count = np.random.default_rng(0x6B76), twins.cache.num_blocks
    twins.host[:] = random.integers(0, 256, twins.host.nbytes, dtype=np.uint8)
    twins.push()
    for segment in (slots_of, expected):
        segment.array[:] = UNTOUCHED
    blocks, slots, epochs = random.permutation(count), random.permutation(count), np.zeros(count, np.int64)
    if not engine.save(blocks, slots, epochs, engine.mark()).all():
        raise LayoutError("a save says that its blocks were overwritten, though nothing else runs")
    host.save(blocks, slots, epochs)
    _expect("slots after a save", slots_of.array, expected.array, slots_of.slot_bytes)
    _expect("the GPU's memory after a save", twins.pull(), twins.host)
    some, others = slots[: count // 2], random.permutation(count)[: count // 2]
    engine.load(some, others, engine.mark())
    host.load(some, others)
    _expect("the GPU's memory after a load", twins.pull(), twins.host)
    _expect("slots after a load", slots_of.array, expected.array, slots_of.slot_bytes)


def _in_order(engine: CopyEngine, twins: Twins, rig: Rig, host: HostCopyEngine, expected: Segment, busy: DeviceMemory) -> None:
    """What the stream has yet to write is saved as it will be, and loaded over."""
    count = twins.cache.num_blocks
    blocks, epochs = np.arange(count), np.zeros(count, np.int64)

    def compute(byte: int) -> object:
        """Keeps the GPU busy and only then writes; the mark behind it."""
        for _ in range(_ROUNDS):
            busy.fill_async(byte, rig.stream)
        twins.memory.fill_async(byte, rig.stream)
        return engine.mark()

    for segment in (rig.segment, expected):
        segment.array[:] = UNTOUCHED
    engine.save(blocks, blocks, epochs, compute(0x5A))
    twins.host[:] = 0x5A
    host.save(blocks, blocks, epochs)
    _expect("slots saved behind what the GPU was computing", rig.segment.array, expected.array, rig.segment.slot_bytes)
    for segment in (rig.segment, expected):
        segment.array.reshape(count, -1)[:, HEADER_BYTES:] = 0xC3
    engine.load(blocks, blocks, compute(0))
    rig.settle()
    twins.host[:] = 0
    host.load(blocks, blocks)
    _expect("blocks loaded behind what the GPU was computing", twins.pull(), twins.host)


_ROUNDS = 8
"""Some milliseconds of a GPU, where it has memory to spare: a copy that does not wait is there first."""


def _expect(what: str, found: NDArray[np.uint8], expected: NDArray[np.uint8], slot_bytes: int = 0) -> None:
    if np.array_equal(found, expected):
        return
    wrong = np.flatnonzero(found != expected)
    first = int(wrong[0])
    place = f"byte {first % slot_bytes} of slot {first // slot_bytes}" if slot_bytes else f"byte {first}"
    raise LayoutError(f"WRONG BYTES: {what}: {len(wrong)} differ, first {place}: {found[first]:#04x} and not {expected[first]:#04x}")
