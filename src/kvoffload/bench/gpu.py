"""`kvoffload bench copy --gpu`: what the CUDA engine makes of the link, where the kernel beats DMA, and what both cost the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace

from kvoffload.bench.figures import Figure
from kvoffload.bench.gpu_clock import Clock
from kvoffload.bench.gpu_cost import RunningKernel
from kvoffload.bench.gpu_crossover import NEVER, Cell, Choice, best_choice
from kvoffload.bench.gpu_link import measure_peak
from kvoffload.bench.gpu_rates import Calls, measure_rates, median_s
from kvoffload.copy.cuda import CudaCopyEngine
from kvoffload.cuda.batch import BatchEntry
from kvoffload.cuda.driver import Driver
from kvoffload.cuda.numa import BoundThreads, cpus_near
from kvoffload.cuda.settings import CopyMode, GpuCopySettings
from kvoffload.doctor.gpu_facts import NOT_A_GPU, is_stand_in
from kvoffload.doctor.gpu_layouts import Cache, blocks_outermost, pages
from kvoffload.doctor.gpu_memory import DeviceMemory, Rig, device_layout
from kvoffload.doctor.gpu_proof import obstacle
from kvoffload.doctor.report import collected_warnings
from kvoffload.errors import CapacityError, UnsupportedError
from kvoffload.limits import check_capacity

KIB, MIB = 1 << 10, 1 << 20
LAYERS = 16
"""Of the caches measured: 16 pieces are one block."""
TARGET = 0.8
"""Least share of the link's own speed, where pieces are not small. It has been held to no GPU yet."""


@dataclass(frozen=True, slots=True)
class Scale:
    """``pool_bytes`` of the GPU's memory and as many of pinned memory are gone through; a call moves at most ``call_bytes``."""

    pool_bytes: int = 512 * MIB
    peak_bytes: int = 256 * MIB
    call_bytes: int = 64 * MIB
    calls: int = 20
    sizes: Sequence[int] = (2 * KIB, 4 * KIB, 8 * KIB, 16 * KIB, 24 * KIB, 28 * KIB, 32 * KIB, 64 * KIB, 256 * KIB, MIB, 2 * MIB)
    counts: Sequence[int] = (16, 64, 256, 4096)
    kernel_s: float = 0.25
    """How long the kernel runs that copies are to disturb."""
    kernel_repeats: int = 5


QUICK = Scale(128 * MIB, 64 * MIB, 16 * MIB, 3, (4 * KIB, 28 * KIB, 256 * KIB), (16, 256), 0.05, 1)


def measure_speed(driver: Driver, base: GpuCopySettings, scale: Scale) -> Iterator[Figure]:
    """The link's peak, then ours beside it, in one run. Raises CapacityError, UnsupportedError and CudaError."""
    for cache in (_layer_wise(64 * KIB, scale), blocks_outermost(LAYERS, _blocks(128 * KIB, scale), 128 * KIB)):
        with _bed(driver, cache, base) as (memory, rig):
            _need_pinned(rig)
            count = max(1, min(scale.call_bytes // rig.layout.payload_bytes, cache.num_blocks // 2))
            in_one_piece = base.pin_piece_bytes // rig.segment.slot_bytes * rig.segment.slot_bytes
            peak_bytes = min(scale.peak_bytes, rig.segment.num_bytes, in_one_piece or rig.segment.slot_bytes)
            peak = measure_peak(driver, memory.address, rig.segment.address, peak_bytes, scale.calls)
            with closing(rig.engine(base)) as engine:
                rates = measure_rates(rig, engine, count, scale.calls)
        piece = rig.layout.payload_bytes // len(rig.layout.runs)
        of = f"{cache.name}, pieces of {_size(piece)}"
        how = f"{count} blocks of {_size(rig.layout.payload_bytes)} a call, median of {scale.calls} calls"
        for way, ours, link in (
            ("load", rates.load, peak.to_gpu),
            ("save", rates.save, peak.to_host),
            ("both at once", rates.both, peak.both),
        ):
            largest = f"the best of {scale.calls} copies of {_size(peak_bytes)}"
            yield _honest(Figure(f"link, {way}, beside {cache.name}", link, "GB/s", "", True, largest))
            share = ours / link
            detail = f"{ours:.1f} GB/s beside {link:.1f}; {how}"
            yield _honest(Figure(f"{way}: {of}", share, "x link", f">= {TARGET}", share >= TARGET, detail))


def measure_cells(driver: Driver, base: GpuCopySettings, scale: Scale) -> Iterator[Cell]:
    """Loads by DMA and by the kernel, for each size and number of pieces that fits. Raises as `measure_speed`."""
    for size in scale.sizes:
        counts = [count for count in scale.counts if count % LAYERS == 0 and count * size <= scale.pool_bytes // 2]
        if not counts:
            continue
        found = []
        with _bed(driver, _layer_wise(size, scale), base) as (_, rig), ExitStack() as undo:
            _need_pinned(rig)
            dma, kernel = (undo.enter_context(_engine(rig, base, mode)) for mode in (CopyMode.DMA, CopyMode.KERNEL))
            clock = undo.enter_context(closing(Clock(rig.driver, rig.stream)))
            for count in counts:
                dma_s, kernel_s = (median_s(clock, Calls(rig, engine, count // LAYERS).load, scale.calls) for engine in (dma, kernel))
                found.append(Cell(size, count, dma_s, kernel_s))
        yield from found


def measure_cost(driver: Driver, base: GpuCopySettings, scale: Scale) -> Iterator[Figure]:
    """How much slower a kernel is while we copy. Raises as `measure_speed`."""
    with _bed(driver, _layer_wise(16 * KIB, scale), base) as (memory, rig), ExitStack() as undo:
        _need_pinned(rig)
        half = DeviceMemory(driver, max(2, memory.num_bytes // 2))
        undo.callback(half.close)
        running = undo.enter_context(closing(RunningKernel(driver, half, scale.kernel_s)))
        count = max(1, min(scale.call_bytes // rig.layout.payload_bytes, rig.layout.num_blocks // 2))
        found = []
        for mode in (CopyMode.DMA, CopyMode.KERNEL):
            with _engine(rig, base, mode) as engine:
                calls = Calls(rig, engine, count)
                for way, copies in (("loads", calls.load), ("saves", calls.save)):
                    percent = running.slowdown_percent(copies, scale.kernel_repeats)
                    detail = f"memory set and copied within the GPU, pieces of 16 KiB, median of {scale.kernel_repeats} pairs"
                    found.append(_honest(Figure(f"cost to a running kernel: {way} by {mode.value}", percent, "%", "", True, detail)))
    yield from found


def figure_of(cell: Cell) -> Figure:
    """For those who read JSON."""
    rates = [f"{way} {cell.num_bytes / seconds / 1e9:.2f} GB/s in {seconds * 1e6:.0f} us" for way, seconds in _ways(cell)]
    name = f"load of {cell.count} pieces of {_size(cell.piece_bytes)}: kernel over DMA"
    return _honest(Figure(name, cell.gain, "x", "", True, ", ".join(rates)))


@dataclass(frozen=True, slots=True)
class Chosen:
    """The best settings, these as figures, and how good they and those in use are."""

    choice: Choice
    settings: list[Figure]
    losses: list[Figure]


def chosen(cells: Sequence[Cell], base: GpuCopySettings) -> Chosen:
    """The settings to use here."""
    best, now = best_choice(cells), Choice(base.kernel_below_bytes, base.kernel_min_pieces)
    detail = "the kernel is never worth it" if best == NEVER else f"loads of at least {best.min_pieces} smaller pieces go by the kernel"
    settings = [
        Figure("gpu.kernel_below_bytes", best.below_bytes, "bytes", "", True, detail),
        Figure("gpu.kernel_min_pieces", best.min_pieces, "pieces", "", True),
    ]
    losses = [
        Figure(
            f"loads, slower than by the better way: {choice.below_bytes}, {choice.min_pieces}", choice.loss(cells) * 100, "%", "", True, of
        )
        for choice, of in ((now, "of the settings as they are"), (best, "of those to be set here"))
    ]
    return Chosen(best, [_honest(figure) for figure in settings], [_honest(figure) for figure in losses])


def setting_lines(choice: Choice) -> list[str]:
    """To be set in either of two ways."""
    return [
        f"gpu.kernel_below_bytes = {choice.below_bytes}",
        f"gpu.kernel_min_pieces = {choice.min_pieces}",
        f"KVOFFLOAD_GPU_KERNEL_BELOW_BYTES={choice.below_bytes} KVOFFLOAD_GPU_KERNEL_MIN_PIECES={choice.min_pieces}",
    ]


def rows_of(cells: Sequence[Cell]) -> list[list[str]]:
    """For `kvoffload.cli.table.table`: a line per size, and for each number of pieces GB/s by DMA and by the kernel."""
    counts = sorted({cell.count for cell in cells})
    by_place = {(cell.piece_bytes, cell.count): cell for cell in cells}
    rows = [["pieces of", *(f"{count} pieces\n{way}" for count in counts for way in ("DMA", "kernel"))]]
    for size in sorted({cell.piece_bytes for cell in cells}):
        row = [_size(size)]
        for count in counts:
            cell = by_place.get((size, count))
            row += ["-", "-"] if cell is None else [f"{cell.num_bytes / seconds / 1e9:.2f}" for _, seconds in _ways(cell)]
        rows.append(row)
    return rows


def _ways(cell: Cell) -> tuple[tuple[str, float], ...]:
    return ("DMA", cell.dma_s), ("kernel", cell.kernel_s)


def _honest(figure: Figure) -> Figure:
    """Nobody may take a stand-in's figure for a GPU's."""
    return replace(figure, passed=False, detail="; ".join(part for part in (NOT_A_GPU, figure.detail) if part)) if is_stand_in() else figure


def _layer_wise(page_bytes: int, scale: Scale) -> Cache:
    return pages(LAYERS, _blocks(page_bytes, scale), page_bytes)


def _blocks(page_bytes: int, scale: Scale) -> int:
    return max(4, scale.pool_bytes // (LAYERS * page_bytes))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / MIB:g} MiB" if num_bytes >= MIB else f"{num_bytes / KIB:g} KiB"


@contextmanager
def _bed(driver: Driver, cache: Cache, base: GpuCopySettings) -> Iterator[tuple[DeviceMemory, Rig]]:
    """Memory of the GPU with ``cache`` in it, and a rig with as many slots as it has blocks."""
    driver.bind()
    free, _ = driver.call("cuMemGetInfo")
    if cache.num_bytes * 2 > int(free):
        raise CapacityError(
            f"{_size(cache.num_bytes * 2)} of the GPU's memory are needed, {_size(int(free))} are free: end what else uses it"
        )
    with closing(DeviceMemory(driver, cache.num_bytes)) as memory:
        layout = device_layout(driver, memory, cache)
        check_capacity(cache.num_blocks * layout.slot_bytes, 256 * MIB)
        crew = BoundThreads(cpus_near(driver.pci_bus_id))
        with closing(Rig(driver.ordinal, layout, cache.num_blocks, base, crew)) as rig:
            yield memory, rig


@contextmanager
def _engine(rig: Rig, base: GpuCopySettings, mode: CopyMode) -> Iterator[CudaCopyEngine]:
    """One that copies like this alone. Raises UnsupportedError where it turns out that it does not: that figure would be another's."""
    settings = replace(base, copy=mode)
    if reason := obstacle(rig, settings):
        raise UnsupportedError(reason)
    with collected_warnings() as of_batches:
        BatchEntry(rig.driver)  # whose warnings every engine repeats
    with collected_warnings() as warnings, closing(rig.engine(settings)) as engine:
        yield engine
    others = [text for text in warnings if text not in of_batches]
    if mode is CopyMode.KERNEL and others:
        raise UnsupportedError(f"the kernel is not what copied: {others[0]}")


def _need_pinned(rig: Rig) -> None:
    if rig.pinned.pinned_slots < rig.segment.slots:
        raise UnsupportedError(f"host memory is not pinned, so nothing here would mean much: {rig.pinned.refused}")
