"""The benchmarks that run real vLLM, quickly: that they measure, not what."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from kvoffload.bench import engine, hooks, saves, ttft
from kvoffload.bench.engine_process import EngineOptions, EngineProcess
from kvoffload.bench.figures import Figure
from kvoffload.bench.measuring import unique_prompts
from kvoffload.errors import PeerError
from kvoffload.testing.model import TINY, make_model

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


def test_without_its_connector_an_engine_calls_none_of_our_hooks(tmp_path: Path) -> None:
    """What a throughput "without" is measured on; and it goes on as before when the connector is back."""
    prompt = unique_prompts(1, [400], seed=3)
    with EngineProcess(EngineOptions(str(make_model(str(tmp_path), TINY)), dtype=TINY.dtype)) as process:
        process.wait_ready()
        process.call("time_hooks")
        calls = []
        for on in (True, False, True):
            process.call("attach", on=on)
            process.call("hook_times")
            process.call("generate", prompts=prompt, max_tokens=4)
            process.call("flush")
            process.call("reset")
            calls.append(len(process.call("hook_times")["calls"]))
        assert calls[0] > 0
        assert calls[1] == 0
        assert process.call("statistics")["ready"] == 3
        assert process.call("generate", prompts=prompt)["answers"][0]["cached"] == 384


def test_saves() -> None:
    figures = saves.run(quick=True)
    check(figures, "saves kept, one process", "saves kept, several processes")
    assert all(0 < figure.value <= 100 for figure in figures)


def test_an_engine_that_does_not_start_says_why() -> None:
    with EngineProcess(EngineOptions("/nowhere/no-model")) as process, pytest.raises(PeerError, match="no-model"):
        process.wait_ready()
