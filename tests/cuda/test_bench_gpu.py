"""`kvoffload bench copy --gpu` on the stand-in: that it runs, that it measures what it says, and that nothing of it passes for a GPU's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from tests.cuda.standin import Code, Standin, Symbol

from kvoffload.bench.figures import Figure
from kvoffload.bench.gpu import QUICK, Scale, chosen, measure_cells, rows_of, setting_lines
from kvoffload.bench.gpu_clock import Clock
from kvoffload.bench.gpu_crossover import KERNEL_COSTS, NEVER, Cell, Choice, best_choice
from kvoffload.bench.gpu_link import measure_peak
from kvoffload.bench.gpu_rates import Calls, Repeated
from kvoffload.cli.bench_gpu import run_gpu_bench
from kvoffload.config import Config
from kvoffload.cuda.driver import Driver
from kvoffload.cuda.settings import CopyMode, GpuCopySettings
from kvoffload.cuda.streams import Stream
from kvoffload.doctor.gpu_facts import NOT_A_GPU
from kvoffload.doctor.gpu_layouts import pages
from kvoffload.doctor.gpu_memory import Rig, Twins
from kvoffload.doctor.report import BEGIN, END
from kvoffload.errors import UnsupportedError

pytestmark = pytest.mark.cuda

KIB, MIB = 1 << 10, 1 << 20
TINY = Scale(8 * MIB, 2 * MIB, MIB, 2, (2 * KIB, 64 * KIB), (16, 64), 0.002, 1)


@pytest.fixture
def driver(standin: Standin) -> Iterator[Driver]:
    opened = Driver.open(0)
    opened.bind()
    yield opened
    opened.close()


def bench(*, as_json: bool = False, strict: bool = False) -> int:
    return run_gpu_bench(0, quick=True, as_json=as_json, strict=strict, scale=TINY)


def figures_of(capsys: pytest.CaptureFixture[str]) -> list[Figure]:
    return [Figure(**json.loads(line)) for line in capsys.readouterr().out.splitlines()]


def test_all_of_it_is_measured_and_none_of_it_is_a_gpus(standin: Standin, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(as_json=True) == 0
    figures = figures_of(capsys)
    names = [figure.name for figure in figures]
    for cache in ("layer-wise pages, pieces of 64 KiB", "blocks outermost, pieces of 2 MiB"):
        for way in ("load", "save", "both at once"):
            assert {f"{way}: {cache}", f"link, {way}, beside {cache.partition(',')[0]}"} <= set(names)
    assert [f"load of {count} pieces of {size}: kernel over DMA" for size in ("2 KiB", "64 KiB") for count in (16, 64)] == [
        name for name in names if "kernel over DMA" in name
    ]
    assert {"gpu.kernel_below_bytes", "gpu.kernel_min_pieces"} <= set(names)
    assert {f"cost to a running kernel: {way} by {mode}" for way in ("loads", "saves") for mode in ("dma", "kernel")} <= set(names)
    assert all(NOT_A_GPU in figure.detail and not figure.passed for figure in figures)
    assert all(figure.value > 0 for figure in figures if figure.unit in ("GB/s", "x link", "x"))


def test_the_report_has_the_table_the_settings_and_what_to_paste(standin: Standin, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(strict=True) == 1, "a stand-in's figures pass nothing"
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert "16 pieces" in printed
    assert "64 KiB" in printed
    at = lines.index("settings that a GPU would get here: NOT to be used")
    below, least = (line.split(" = ") for line in lines[at + 1 : at + 3])
    Config.load({below[0].strip(): int(below[1]), least[0].strip(): int(least[1])}, {})
    variables = dict(word.split("=") for word in lines[at + 3].split())
    assert Config.load({}, variables).gpu.kernel_min_pieces == int(least[1])
    pasted = lines[lines.index(BEGIN) : lines.index(END)]
    for told in (NOT_A_GPU, "Stand-in GPU", "link, load", "cost to a running kernel", "2 KiB", "cuda-bindings", "gpu.kernel_below_bytes"):
        assert any(told in line for line in pasted), told


def test_each_way_is_taken_where_it_is_measured(standin: Standin, driver: Driver) -> None:
    scale = Scale(2 * MIB, MIB, MIB, 2, (4 * KIB,), (16,))
    [cell] = measure_cells(driver, GpuCopySettings(), scale)
    assert (cell.piece_bytes, cell.count) == (4 * KIB, 16)
    assert len(standin.calls("cuLaunchKernel")) == 3, "one call warms up"
    batches = [call.arguments for call in standin.calls("cuMemcpyBatchAsync")]
    assert [(batch["count"], set(batch["sizes"])) for batch in batches] == [(16, {4 * KIB})] * 3


def test_a_call_that_takes_longer_is_measured_so(standin: Standin, driver: Driver) -> None:
    with closing(Stream(driver)) as stream, closing(Clock(driver, stream)) as clock:
        standin.delay(stream.handle, 0.02)
        assert 0.01 < clock.seconds(lambda: None) < 10
        standin.delay(stream.handle, 0)
        standin.fail("cuEventElapsedTime", Code.NOT_READY)
        with pytest.raises(Exception, match="cuEventElapsedTime failed: CUDA_ERROR_NOT_READY"):
            clock.seconds(lambda: None)


def test_the_peak_is_of_one_copy_each_way(standin: Standin, driver: Driver) -> None:
    with closing(Twins(driver, pages(1, 4, 64 * KIB))) as twins, closing(Rig(0, twins.layout, 4, GpuCopySettings())) as rig:
        standin.clear_calls()
        size = 128 * KIB
        peak = measure_peak(driver, twins.memory.address, rig.segment.address, size, 3)
        copies = [tuple(call.arguments[name] for name in ("target", "source", "bytes")) for call in standin.calls("cuMemcpyAsync")]
    device, host, half = twins.layout.runs[0].address - 4096, rig.segment.address, size // 2
    assert copies == [
        *[(device, host, size)] * 4,
        *[(host, device, size)] * 4,
        *[(device, host, half), (host + half, device + half, half)] * 4,
    ]
    assert min(peak.to_gpu, peak.to_host, peak.both) > 0


def test_loads_and_saves_at_once_never_meet(standin: Standin, driver: Driver) -> None:
    with closing(Twins(driver, pages(2, 16, 4 * KIB))) as twins, closing(Rig(0, twins.layout, 16, GpuCopySettings())) as rig:
        seen: dict[str, set[int]] = {"load": set(), "save": set()}

        class Watching:
            def mark(self) -> None:
                return None

            def load(self, slots: np.ndarray, blocks: np.ndarray, after: object) -> None:
                seen["load"] |= {*slots.tolist(), *(100 + blocks).tolist()}

            def save(self, blocks: np.ndarray, slots: np.ndarray, epochs: object, after: object) -> None:
                seen["save"] |= {*slots.tolist(), *(100 + blocks).tolist()}

        calls = Calls(rig, Watching(), 3)  # type: ignore[arg-type]
        for _ in range(8):
            calls.load()
            calls.save()
    assert seen["load"] & seen["save"] == set()
    assert len(seen["load"]) > 8
    assert len(seen["save"]) > 8


def test_what_fails_in_the_background_is_raised() -> None:
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise UnsupportedError("enough")

    background = Repeated(work)
    background.wait_first()
    with pytest.raises(UnsupportedError, match="enough"):
        background.join()
    counted = Repeated(lambda: calls.append(1), 4)
    counted.join()
    assert len(calls) == 7


@pytest.mark.parametrize(
    ("machine", "unmeasured", "reason"),
    [
        ({"register_total_bytes": 0}, ["speed", "where the kernel beats DMA", "cost to a running kernel"], "host memory is not pinned"),
        ({"host_pointer_usable": False}, ["where the kernel beats DMA", "cost to a running kernel"], "CPU's address"),
        ({"capability_major": 7}, ["where the kernel beats DMA", "cost to a running kernel"], "the kernel is not what copied"),
        ({"total_memory_bytes": 4 * MIB}, ["speed", "where the kernel beats DMA", "cost to a running kernel"], "end what else uses it"),
    ],
    ids=["not pinned", "no pointers", "no kernel", "no memory"],
)
def test_what_cannot_be_measured_says_why(
    standin: Standin, capsys: pytest.CaptureFixture[str], machine: dict[str, int], unmeasured: list[str], reason: str
) -> None:
    standin.configure(**machine)
    assert bench(as_json=True) == 1
    missing = [figure for figure in figures_of(capsys) if not figure.is_measured]
    assert [figure.name for figure in missing] == unmeasured
    assert all(reason in figure.detail for figure in missing)


def test_without_batches_dma_is_what_there_is_and_that_is_said(standin: Standin, capsys: pytest.CaptureFixture[str]) -> None:
    standin.configure(batch_12080=Symbol.MISSING, batch_13000=Symbol.MISSING)
    assert bench() == 0
    assert "this driver has no cuMemcpyBatchAsync" in capsys.readouterr().out


def test_no_gpu_is_one_line_and_1(standin: Standin, capsys: pytest.CaptureFixture[str]) -> None:
    standin.configure(devices=0)
    assert bench() == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("kvoffload bench copy --gpu: no GPU to test: no CUDA: ")
    assert "no GPU is visible" in line


def test_an_error_of_any_call_is_told_and_survived(standin: Standin, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (
        "cuMemAlloc", "cuEventCreate", "cuEventRecord", "cuEventSynchronize", "cuEventElapsedTime", "cuMemcpyBatchAsync", "cuMemcpyAsync",
        "cuMemsetD8Async", "cuMemcpyDtoDAsync", "cuStreamWaitEvent", "cuStreamCreateWithPriority", "cuMemGetInfo",
    ):  # fmt: skip
        for at in (1, 20):
            standin.reset()
            standin.fail(name, Code.UNKNOWN, at=at)
            status, missing = bench(as_json=True), [figure for figure in figures_of(capsys) if not figure.is_measured]
            assert (status, len(missing)) == ((1, 1) if at <= len(standin.calls(name)) else (0, 0)), (name, at)
            assert all("CUDA_ERROR_UNKNOWN" in figure.detail for figure in missing)
            standin.check()


def cells(
    crossing: dict[int, int], sizes: tuple[int, ...] = (2048, 4096, 8192, 16384), counts: tuple[int, ...] = (16, 64, 256)
) -> list[Cell]:
    """The kernel is twice as fast below ``crossing[count]``, and half as fast from there on."""
    return [Cell(size, count, 2e-6 * count, (1e-6 if size < crossing[count] else 4e-6) * count) for size in sizes for count in counts]


@pytest.mark.parametrize(
    ("crossing", "choice"),
    [
        ({16: 8192, 64: 8192, 256: 8192}, Choice(8192, 16)),
        ({16: 0, 64: 8192, 256: 8192}, Choice(8192, 64)),
        ({16: 0, 64: 0, 256: 1 << 30}, Choice(32768, 256)),
        ({16: 0, 64: 0, 256: 0}, NEVER),
        ({16: 1 << 30, 64: 1 << 30, 256: 1 << 30}, Choice(32768, 16)),
        ({16: 4096, 64: 4096, 256: 4096}, Choice(4096, 16)),
    ],
)
def test_the_settings_are_where_the_crossover_is(crossing: dict[int, int], choice: Choice) -> None:
    found = best_choice(cells(crossing))
    assert found == choice
    assert found.loss(cells(crossing)) == pytest.approx(0)


def test_where_no_setting_is_right_everywhere_the_one_that_loses_least_is_taken() -> None:
    measured = [Cell(2048, 16, 1.0, 3.0), Cell(2048, 64, 1.0, 0.5), Cell(4096, 16, 1.0, 3.0), Cell(4096, 64, 1.0, 3.0)]
    assert best_choice(measured) == Choice(4096, 64)
    assert Choice(8192, 16).loss(measured) == pytest.approx((3.3**3) ** 0.25 - 1)


def test_a_kernel_that_is_hardly_faster_is_not_worth_its_multiprocessors() -> None:
    assert best_choice([Cell(2048, 16, 1.0, 0.99 / KERNEL_COSTS)]) == Choice(4096, 16)
    assert best_choice([Cell(2048, 16, 1.0, 1.01 / KERNEL_COSTS)]) == NEVER


def test_of_settings_that_are_as_good_the_one_with_less_for_the_kernel_is_taken() -> None:
    assert best_choice([Cell(2048, 16, KERNEL_COSTS, 1.0), Cell(2048, 64, 4.0, 1.0)]) == Choice(4096, 64)
    assert best_choice([Cell(2048, 16, 4.0, 1.0), Cell(4096, 16, KERNEL_COSTS, 1.0)]) == Choice(4096, 16)
    assert best_choice([Cell(2048, 16, KERNEL_COSTS, 1.0)]) == NEVER


def test_the_settings_in_use_are_compared() -> None:
    found = chosen(cells({16: 0, 64: 8192, 256: 8192}), GpuCopySettings(copy=CopyMode.AUTO))
    assert found.choice == Choice(8192, 64)
    now, best = found.losses
    assert now.value > 10 > 1 > best.value
    assert "28672, 16" in now.name
    assert setting_lines(found.choice)[:2] == ["gpu.kernel_below_bytes = 8192", "gpu.kernel_min_pieces = 64"]


def test_the_table_has_a_place_for_what_was_not_measured() -> None:
    rows = rows_of([Cell(2048, 16, 1e-6, 2e-6), Cell(2048, 64, 1e-6, 1e-6), Cell(1 << 20, 16, 1e-3, 1e-3)])
    assert rows[1] == ["2 KiB", "32.77", "16.38", "131.07", "131.07"]
    assert rows[2] == ["1 MiB", "16.78", "16.78", "-", "-"]


def test_what_is_measured_by_default_is_what_the_help_says() -> None:
    scale = Scale()
    assert [size // KIB for size in scale.sizes] == [2, 4, 8, 16, 24, 28, 32, 64, 256, 1024, 2048]
    assert scale.counts == (16, 64, 256, 4096)
    assert set(QUICK.sizes) <= set(scale.sizes)
