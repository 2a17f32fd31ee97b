"""What kvoffload's hooks cost on vLLM's thread: ``kvoffload bench hooks``."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

from kvoffload.bench.engine_process import EngineOptions, EngineProcess
from kvoffload.bench.figures import Figure
from kvoffload.bench.measuring import quantile, unique_prompts
from kvoffload.bench.remembered import WAITING
from kvoffload.errors import PeerError
from kvoffload.testing.model import TINY, make_model

STEP_TARGET_US = 40.0
HOOK_TARGET_US = 300.0
REMEMBERED_TARGET_US = 5.0

DECODE_ROUNDS = 4
"""Ours and the control in turn, so that a drift of the machine is in both."""


def run(quick: bool = False) -> list[Figure]:
    """A decode step's hooks together, ours and of a connector that does nothing, the p99 of each in a mixed load, a remembered answer."""
    with tempfile.TemporaryDirectory(prefix="kvoffload-bench-") as directory:
        model = str(make_model(directory, TINY))
        ours_options, idle_options = (
            EngineOptions(model, connector, dtype=TINY.dtype, max_model_len=2048, l1_bytes=256 << 20) for connector in ("kvoffload", "idle")
        )
        with EngineProcess(ours_options) as ours, EngineProcess(idle_options) as idle:
            for engine in (ours, idle):
                engine.wait_ready()
                engine.call("generate", prompts=unique_prompts(2, [500], seed=90), max_tokens=4)
                engine.call("time_hooks")
            ours.call("wait_populated")
            decoded: dict[str, list[dict[str, Any]]] = {"kvoffload": [], "idle": []}
            for seed in range(1 if quick else DECODE_ROUNDS):
                for engine in (ours, idle):
                    decoded[engine.options.connector].append(_decode(engine, seed, tokens=40 if quick else 300))
            mixed = [_mixed(ours, seed) for seed in range(1 if quick else 4)]
            remembered = ours.call("remembered_match", rounds=3 if quick else 21)
    calls: dict[str, list[Sequence[float]]] = {}
    for taken in [*decoded["kvoffload"], *mixed]:
        for name, timed in taken["calls"].items():
            calls.setdefault(name, []).extend(timed)
    figures = _decode_figures(_decode_steps(decoded["kvoffload"]), _decode_steps(decoded["idle"]))
    return [*figures, *_hook_figures(calls), _wait_figure(calls), _remembered_figure(remembered)]


def _decode(engine: EngineProcess, seed: int, tokens: int) -> dict[str, Any]:
    """Eight requests decode, their blocks are saved as they fill."""
    engine.call("generate", prompts=unique_prompts(8, [200], seed=300 + seed), max_tokens=tokens)
    taken: dict[str, Any] = engine.call("hook_times")
    return taken


def _decode_steps(rounds: Sequence[dict[str, Any]]) -> list[float]:
    """Microseconds of the hooks of each decode step."""
    times = [us for taken in rounds for kind, us, _ in taken["steps"] if kind == "decode"]
    if not times:
        raise PeerError("no decode step was seen")
    return times


def _mixed(engine: EngineProcess, seed: int) -> dict[str, Any]:
    """New prompts and prompts that L1 has, together and one by one, short answers."""
    prompts = unique_prompts(8, [1900, 700, 1300, 150], seed=100 + seed)
    engine.call("generate", prompts=prompts, max_tokens=8)
    engine.call("flush")
    engine.call("reset")
    engine.call("generate", prompts=prompts + unique_prompts(4, [1000], seed=200 + seed), max_tokens=8)
    engine.call("flush")
    for prompt in prompts:
        engine.call("reset")
        engine.call("generate", prompts=[prompt], max_tokens=2)
    taken: dict[str, Any] = engine.call("hook_times")
    return taken


def _decode_figures(ours: Sequence[float], idle: Sequence[float]) -> list[Figure]:
    name = "hooks: all of a decode step"
    median, idle_median = statistics.median(ours), statistics.median(idle)
    detail = (
        f"{_step_words(ours)}; {idle_median:.0f} us of it, {100 * idle_median / median:.0f} %, is what a connector that does nothing costs"
    )
    return [
        Figure(name, median, "us", f"<= {STEP_TARGET_US:.0f}", median <= STEP_TARGET_US, detail),
        Figure(f"{name}, a connector that does nothing", idle_median, "us", "no target", True, f"{_step_words(idle)}, in turn with ours"),
    ]


def _step_words(times: Sequence[float]) -> str:
    return f"median of {len(times)} steps of 8 requests; p99 {quantile(times, 0.99):.0f} us"


def _hook_figures(calls: dict[str, list[Sequence[float]]]) -> list[Figure]:
    """The four slowest hooks by p99, each block whose key was made or posted taken off at 1 us, and the slowest of the rest."""
    by_hook = {name: quantile([us - blocks for us, _, blocks in timed], 0.99) for name, timed in calls.items()}
    worst = sorted(by_hook, key=lambda name: -by_hook[name])
    figures = []
    for name in worst[:4]:
        raw = [us for us, _, _ in calls[name]]
        detail = f"{len(raw)} calls; p50 {statistics.median(raw):.1f}, p99 {quantile(raw, 0.99):.0f} with its blocks, max {max(raw):.0f}"
        figures.append(_p99_figure(name, by_hook[name], detail))
    rest = worst[4:]
    detail = f"{len(rest)} hooks: {', '.join(sorted(rest))}"
    return [*figures, _p99_figure("every other hook", max((by_hook[name] for name in rest), default=0.0), detail)]


def _p99_figure(what: str, p99: float, detail: str) -> Figure:
    return Figure(f"hooks: p99 of {what}", p99, "us", f"<= {HOOK_TARGET_US:.0f}", p99 <= HOOK_TARGET_US, detail)


def _wait_figure(calls: dict[str, list[Sequence[float]]]) -> Figure:
    """The two waits that hooks may do, lock released: 2 ms are asked for, what the machine adds to that is given 0.5."""
    waits = [(waited, name) for name, timed in calls.items() for _, waited, _ in timed if waited]
    p99 = quantile([waited for waited, _ in waits], 0.99) if waits else 0.0
    detail = "no hook waited"
    if waits:
        longest, name = max(waits)
        median = statistics.median(waited for waited, _ in waits)
        detail = f"{len(waits)} waits, median {median:.0f} us, longest {longest:.0f} us in {name}"
    return Figure("hooks: p99 of the two named waits", p99, "us", "<= 2500", p99 <= 2500, detail)


def _remembered_figure(value: float) -> Figure:
    detail = f"{WAITING} waiting requests of 512 tokens, a stand-in hub"
    return Figure("hooks: a remembered match", value, "us", f"<= {REMEMBERED_TARGET_US:.0f}", value <= REMEMBERED_TARGET_US, detail)
