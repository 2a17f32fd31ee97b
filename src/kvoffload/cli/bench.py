"""``kvoffload bench``: each promise of the project measured, one line per figure."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module

from kvoffload.bench.figures import Figure
from kvoffload.cli.progress import Progress
from kvoffload.errors import KVOffloadError, UnsupportedError

NAME_WIDTH = 60


Runner = Callable[[bool], Iterable[Figure]]


def runners(names: Sequence[str], infinistore: str | None = None, native_client: str | None = None) -> dict[str, Runner]:
    """The benchmarks of these names; their modules are imported when they run. The rest is for l2: see `InfiniStore.parse`."""

    def runner(name: str) -> Runner:
        def run(quick: bool) -> Iterable[Figure]:
            measure: Runner | None = getattr(import_module(f"kvoffload.bench.{name}"), "run", None)
            if measure is None:
                raise UnsupportedError(f"kvoffload.bench.{name} has no run()")
            return measure(quick)

        return run

    def run_l2(quick: bool) -> Iterable[Figure]:
        from kvoffload.bench import l2
        from kvoffload.bench.l2_rivals import InfiniStore

        return l2.run(quick, InfiniStore.parse(infinistore, native_client) if infinistore is not None else None)

    return {name: run_l2 if name == "l2" else runner(name) for name in names}


def run_benches(benches: Mapping[str, Runner], *, quick: bool, as_json: bool, strict: bool) -> int:
    """Print the figures as they come. 1 when something could not be measured, or, with ``strict``, when a figure falls short."""
    failed: list[str] = []
    figures: list[Figure] = []
    if not as_json:
        print_heading()
    for name, runner in benches.items():
        found: list[Figure] = []
        try:
            with Progress(f"measuring: {name}", stream=sys.stderr, keep=False):
                found.extend(runner(quick))  # an iterator that raises half-way has given what came before
        except (KVOffloadError, ImportError) as error:
            failed.append(name)
            print(f"  {name}: could not be measured: {error}", file=sys.stderr)
        figures += found
        for figure in found:
            print(json.dumps(asdict(figure)) if as_json else line_of(figure), flush=True)
    if not as_json and figures:
        short = sum(figure.is_measured and not figure.passed for figure in figures)
        missing = sum(not figure.is_measured for figure in figures)
        unmeasured = f", {missing} were not measured" if missing else ""
        quickly = " (--quick: the figures mean little)" if quick else ""
        print(f"\n  {len(figures)} figures, {short} of them fall short{unmeasured}{quickly}")
    return 1 if failed or (strict and any(not figure.passed for figure in figures)) else 0


def print_heading() -> None:
    print("  " + "figure".ljust(NAME_WIDTH) + "value".rjust(13) + "  " + "target".ljust(12) + "verdict")
    print("  " + "-" * (NAME_WIDTH + 13 + 2 + 12 + 11), flush=True)


def line_of(figure: Figure) -> str:
    """What is printed of it, two lines where it has a detail. One without a target has no verdict."""
    digits = 3 if abs(figure.value) < 1 else 2 if abs(figure.value) < 100 else 0
    value = f"{figure.value:,.{digits}f}"
    verdict = "" if not figure.target else "pass" if figure.passed else "falls short"
    if not figure.is_measured:
        value, verdict = "-", "not measured"
    head = f"  {figure.name.ljust(NAME_WIDTH)}{f'{value} {figure.unit}'.rjust(13)}  {figure.target.ljust(12)}{verdict}".rstrip()
    return head + (f"\n      {figure.detail}" if figure.detail else "")
