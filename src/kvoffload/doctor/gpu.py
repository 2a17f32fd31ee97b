"""`kvoffload doctor --gpu`: everything that is tried on a GPU, one finding at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field

from kvoffload.copy.plan import plan_of
from kvoffload.cuda.batch import BatchEntry
from kvoffload.cuda.driver import Driver
from kvoffload.cuda.kernels import Kernels, load_image
from kvoffload.cuda.numa import BoundThreads, cpus_near
from kvoffload.cuda.pinned import PinnedSegment, advice
from kvoffload.cuda.settings import GpuCopySettings
from kvoffload.doctor.gpu_layouts import Cache, all_caches
from kvoffload.doctor.gpu_memory import DeviceMemory, Twins
from kvoffload.doctor.gpu_proof import TROUBLE, WrapEngine, check_cache
from kvoffload.doctor.report import Finding, State, collected_warnings
from kvoffload.limits import available_bytes
from kvoffload.segment import Segment

OLDEST_CAPABILITY = (8, 0)
"""Of the kernels that the package ships."""

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Scale:
    """How much memory is tried: pinned at most (a quarter of what there is), and to keep the GPU busy (an eighth of what is free)."""

    pin_bytes: int = _GIB
    busy_bytes: int = 512 << 20
    caches: tuple[Cache, ...] = field(default_factory=all_caches)


def check_gpu(
    driver: Driver, base: GpuCopySettings, scale: Scale | None = None, wrap: WrapEngine = lambda engine: engine
) -> Iterator[Finding]:
    """All checks, each a finding as soon as it is there; what goes wrong is one too. ``wrap``: as tests make an engine that fails."""
    scale = scale or Scale()
    yield _batches(driver)
    yield _kernels(driver, scale.caches[0])
    yield _pinning(driver, base, scale)
    try:
        driver.bind()
        free, _ = driver.call("cuMemGetInfo")
        busy = DeviceMemory(driver, max(1, min(scale.busy_bytes, int(free) // 8)))
    except TROUBLE as error:
        yield Finding("layouts", f"not tried, for want of the GPU's memory: {error}", State.FAILED)
        return
    for cache in scale.caches:
        yield from check_cache(driver, cache, base, busy, wrap)
    try:
        busy.close()
    except TROUBLE as error:
        yield Finding("memory given back", str(error), State.FAILED)


def _batches(driver: Driver) -> Finding:
    name = "batched DMA"
    try:
        driver.bind()
        with collected_warnings() as warnings:
            found = BatchEntry(driver)
    except TROUBLE as error:
        return Finding(name, str(error), State.FAILED)
    if not found.entry:
        return Finding(name, " ".join(warnings), State.MISSING)
    return Finding(name, f"cuMemcpyBatchAsync as CUDA {'12.8' if found.has_fail_index else '13.0'} has it", State.OK)


def _kernels(driver: Driver, cache: Cache) -> Finding:
    """Loads them outside of an engine, which would go on without."""
    name = "copy kernels"
    try:
        image_bytes = len(load_image())
        with closing(Twins(driver, cache)) as twins, closing(Segment.create(twins.layout.slot_bytes, twins.layout.slot_bytes)) as segment:
            driver.bind()
            Kernels(driver, twins.layout, plan_of(twins.layout), segment).close()
    except TROUBLE as error:
        is_too_old = driver.capability < OLDEST_CAPABILITY
        return Finding(
            name, f"this GPU is older than they: {error}" if is_too_old else str(error), State.MISSING if is_too_old else State.FAILED
        )
    major, minor = driver.capability
    return Finding(name, f"kv_copy.fatbin ({image_bytes} bytes) loads on compute capability {major}.{minor}", State.OK)


def _pinning(driver: Driver, base: GpuCopySettings, scale: Scale) -> Finding:
    """How long it takes to pin memory, or why it is refused: with the pieces, and the threads, that an engine uses."""
    name = "pinned memory"
    slot_bytes = 1 << 20
    try:
        wanted = max(slot_bytes, min(scale.pin_bytes, available_bytes().bytes // 4))
        with closing(Segment.create(wanted, slot_bytes)) as segment:
            crew = BoundThreads(cpus_near(driver.pci_bus_id))
            begun = time.monotonic()
            segment.populate_next(segment.num_bytes, crew)
            populated = time.monotonic()
            memory = PinnedSegment(driver, segment, piece_bytes=base.pin_piece_bytes)
            with collected_warnings() as warnings, closing(memory):
                memory.prepare(segment.slots)
                pinned = time.monotonic()
                pinned_bytes, refused = memory.pinned_bytes, memory.refused
                is_same_pointer = memory.device_pointer_is_host_pointer
                leaving = time.monotonic()
            given_back = time.monotonic()
            gib = segment.num_bytes / _GIB
    except TROUBLE as error:
        return Finding(name, str(error), State.FAILED)
    if refused is not None:
        reasons = "; ".join(advice(refused))
        return Finding(name, f"refused after {pinned_bytes / _GIB:.2f} of {gib:.2f} GiB: {refused}: {reasons}", State.FAILED)
    if warnings:
        return Finding(name, warnings[0], State.FAILED)
    text = (
        f"{gib:.2f} GiB: {(pinned - populated) / gib:.3f} s per GiB, given back in {(given_back - leaving) / gib:.3f}; "
        f"memory taken in {(populated - begun) / gib:.3f} by {crew.threads} threads"
    )
    if not is_same_pointer:
        return Finding(name, f"{text}; kernels cannot use it, as the GPU does not know it by the CPU's address", State.MISSING)
    return Finding(name, text, State.OK)
