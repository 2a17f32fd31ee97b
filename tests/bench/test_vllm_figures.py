"""The benchmarks that run real vLLM, quickly: that they measure, not what."""

from __future__ import annotations

import math

import pytest

from kvoffload.bench import engine, hooks, saves, ttft
from kvoffload.bench.engine_process import EngineOptions, EngineProcess
from kvoffload.bench.figures import Figure
from kvoffload.errors import PeerError

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


def check(figures: list[Figure], *prefixes: str) -> None:
    assert all(math.isfinite(figure.value) and figure.value >= 0 for figure in figures)
    for prefix in prefixes:
        assert any(figure.name.startswith(prefix) for figure in figures), prefix


def test_hooks() -> None:
    check(
        hooks.run(quick=True),
        "hooks: all of a decode step",
        "hooks: all of a decode step, a connector",
        "hooks: p99 of",
        "hooks: a remembered match",
    )


def test_ttft() -> None:
    check(ttft.run(quick=True), "ttft, one process: computed", "ttft, one process: our share", "ttft, several processes: computed")


def test_engine() -> None:
    check(engine.run(quick=True), "engine: throughput", "engine: CPU time")


def test_saves() -> None:
    figures = saves.run(quick=True)
    check(figures, "saves kept, one process", "saves kept, several processes")
    assert all(0 < figure.value <= 100 for figure in figures)


def test_an_engine_that_does_not_start_says_why() -> None:
    with EngineProcess(EngineOptions("/nowhere/no-model")) as process, pytest.raises(PeerError, match="no-model"):
        process.wait_ready()
