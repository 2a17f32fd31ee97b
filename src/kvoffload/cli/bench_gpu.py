"""``kvoffload bench copy --gpu``: figures as they come, the crossover as a table, settings, and what to paste into a report."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

from kvoffload.bench.figures import Figure, not_measured
from kvoffload.cli.bench import line_of, print_heading
from kvoffload.cli.doctor import copy_settings, open_gpu
from kvoffload.cli.progress import Progress
from kvoffload.cli.table import table
from kvoffload.doctor import host, packages
from kvoffload.doctor.report import Finding, Section, block_of, collected_warnings
from kvoffload.doctor.settings import settings
from kvoffload.errors import CopyError

if TYPE_CHECKING:
    from kvoffload.bench.gpu import Scale
    from kvoffload.bench.gpu_crossover import Cell
    from kvoffload.cuda.driver import Driver


def run_gpu_bench(device: int, *, quick: bool, as_json: bool, strict: bool, scale: Scale | None = None) -> int:
    """1 where there is no GPU, something could not be measured or, with ``strict``, a figure falls short."""
    from kvoffload.bench.gpu import QUICK, Scale

    driver = open_gpu(device, "bench copy --gpu")
    if driver is None:
        return 1
    try:
        return _Run(driver, scale or (QUICK if quick else Scale()), as_json).run(quick, strict)
    finally:
        with suppress(CopyError):
            driver.close()


class _Run:
    """One run: what it printed is what it gives to paste."""

    def __init__(self, driver: Driver, scale: Scale, as_json: bool) -> None:
        from kvoffload.doctor.gpu_proof import TROUBLE

        self._driver, self._scale, self._as_json, self._trouble = driver, scale, as_json, TROUBLE
        self._base = copy_settings()
        self._figures: list[Figure] = []
        self._text: list[str] = []

    def run(self, quick: bool, strict: bool) -> int:
        from kvoffload.bench import gpu

        with collected_warnings() as warnings:
            if not self._as_json:
                print_heading()
            self._measure("speed", gpu.measure_speed(self._driver, self._base, self._scale))
            cells: list[Cell] = []
            self._measure("where the kernel beats DMA", self._swept(cells))
            self._measure("cost to a running kernel", gpu.measure_cost(self._driver, self._base, self._scale))
        if not self._as_json:
            self._conclude(cells, warnings, quick)
        missing = any(not figure.is_measured for figure in self._figures)
        return 1 if missing or (strict and any(not figure.passed for figure in self._figures)) else 0

    def _measure(self, what: str, figures: Iterable[Figure]) -> None:
        try:
            with Progress(f"measuring: {what}", stream=sys.stderr, keep=False):
                for figure in figures:
                    self._show(figure)
        except self._trouble as error:
            self._show(not_measured(what, "", " ".join(str(error).split()) or repr(error)))

    def _swept(self, cells: list[Cell]) -> Iterable[Figure]:
        """In JSON a figure for each; a table says the same in less room."""
        from kvoffload.bench import gpu

        for cell in gpu.measure_cells(self._driver, self._base, self._scale):
            cells.append(cell)
            if self._as_json:
                yield gpu.figure_of(cell)
        found = gpu.chosen(cells, self._base)
        if self._as_json:
            yield from found.settings
        yield from found.losses

    def _show(self, figure: Figure) -> None:
        self._figures.append(figure)
        print(json.dumps(asdict(figure)) if self._as_json else line_of(figure), flush=True)

    def _conclude(self, cells: list[Cell], warnings: list[str], quick: bool) -> None:
        from kvoffload.bench import gpu
        from kvoffload.doctor.gpu_facts import NOT_A_GPU, device_facts, is_stand_in, link_fact

        warning = [f"NOT A GPU: {NOT_A_GPU}"] if is_stand_in() else []
        found: list[str] = []
        lines = gpu.setting_lines(gpu.chosen(cells, self._base).choice) if cells else []
        if cells:
            found += ["loads in GB/s, by DMA and by the kernel", *table(gpu.rows_of(cells)), ""]
            found.append("settings for this GPU and link" if not warning else "settings that a GPU would get here: NOT to be used")
            found += [f"  {line}" for line in lines]
        print("\n" + "\n".join([*warning, *found]) + "\n\nPlease paste this into your report; it holds no secrets, but do look at it:\n")
        facts: list[Finding] = []
        with suppress(*self._trouble):
            facts += [*device_facts(self._driver), link_fact(self._driver)]
        how = "bench copy --gpu" + (" --quick: the figures mean little" if quick else "")
        figures = [Finding(figure.name, _value(figure)) for figure in self._figures]
        sections = [
            Section(how, tuple(Finding("warning", text) for text in [*warning, *warnings])),
            Section("GPU", tuple(facts)),
            Section("figures", tuple(figures)),
            Section("settings for it", tuple(Finding("", line) for line in lines)),
            Section(
                "loads in GB/s",
                tuple(Finding(" ".join(row[0].split()), "  ".join(row[1:]).replace("\n", " ")) for row in gpu.rows_of(cells)),
            ),
            packages.versions(),
            settings(),
            host.machine(),
        ]
        print("\n".join(block_of(sections)), flush=True)


def _value(figure: Figure) -> str:
    return f"{figure.value:.3g} {figure.unit}; {figure.detail}" if figure.is_measured else figure.detail
