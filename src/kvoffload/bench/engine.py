"""What kvoffload costs an engine that never hits: ``kvoffload bench engine``."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from kvoffload.bench.cpu_time import OURS
from kvoffload.bench.engine_process import EngineOptions, EngineProcess
from kvoffload.bench.figures import Figure
from kvoffload.bench.measuring import cluster_interval, unique_prompts
from kvoffload.errors import PeerError
from kvoffload.testing.model import BENCH, TINY, ModelShape, make_model

RATIO_TARGET = 0.97
CPU_TARGET_PERCENT = 1.0
GENERATIONS = 4
PAIRS = 6
"""Of each generation. Two processes of the same code differ for all their life by more than what is measured here (where their memory
happens to lie): so there are several pairs of processes, and the interval is one over processes."""

LENGTHS = (330, 200, 450, 270)


@dataclass(slots=True)
class Cost:
    """``ratios``: throughput with kvoffload over plain vLLM's, pair by pair, by generation of processes. ``cpu``: seconds of kvoffload's
    engines, in all (``process``) and by thread of ours."""

    ratios: list[list[float]] = field(default_factory=list)
    cpu: dict[str, float] = field(default_factory=dict)


def run(quick: bool = False) -> list[Figure]:
    """Plain vLLM and vLLM with kvoffload in turn, prompts that nobody has seen before."""
    with tempfile.TemporaryDirectory(prefix="kvoffload-bench-") as directory:
        if quick:
            cost = measure(TINY, directory, generations=2, pairs=2, requests=2, tokens=16)
        else:
            cost = measure(BENCH, directory, generations=GENERATIONS, pairs=PAIRS, requests=8, tokens=48)
    return _figures(cost)


def measure(shape: ModelShape, directory: str, *, generations: int, pairs: int, requests: int, tokens: int) -> Cost:
    """So many generations of two processes, each with so many alternating pairs of runs."""
    model = str(make_model(directory, shape))
    plain = EngineOptions(model, "none", dtype=shape.dtype)
    ours = EngineOptions(model, "kvoffload", dtype=shape.dtype, l1_bytes=1 << 30)
    cost = Cost()
    for generation in range(generations):
        with ExitStack() as running:
            # Who starts first changes from generation to generation: the first one has its choice of memory.
            engines = []
            for options in (plain, ours) if generation % 2 else (ours, plain):
                engines.append(running.enter_context(EngineProcess(options)))
                engines[-1].wait_ready()
            _warm_up(engines, requests, tokens)
            cost.ratios.append([_pair(engines, cost, requests, tokens, seed=1000 + pairs * generation + pair) for pair in range(pairs)])
            if not any(engine.options is ours and engine.call("statistics")["committed"] for engine in engines):
                raise PeerError("kvoffload saved nothing: what was measured is not its cost")
    return cost


def _warm_up(engines: Sequence[EngineProcess], requests: int, tokens: int) -> None:
    for engine in engines:
        engine.call("generate", prompts=unique_prompts(requests, LENGTHS, seed=1), max_tokens=tokens)
        if engine.options.connector == "kvoffload":
            engine.call("wait_populated")


def _pair(engines: Sequence[EngineProcess], cost: Cost, requests: int, tokens: int, seed: int) -> float:
    """The same new prompts to both; the ratio of their throughputs."""
    prompts = unique_prompts(requests, LENGTHS, seed=seed)
    seconds: dict[str, float] = {}
    # Who goes first changes from pair to pair, so that a drift of the machine favours nobody.
    for engine in engines if seed % 2 else reversed(engines):
        connector = engine.options.connector
        before = engine.call("cpu")
        result = engine.call("generate", prompts=prompts, max_tokens=tokens)
        if connector == "kvoffload":
            engine.call("flush")  # what this run saves is this run's cost
            for name, spent in engine.call("cpu").items():
                cost.cpu[name] = cost.cpu.get(name, 0.0) + spent - before.get(name, 0.0)
        if any(answer["cached"] for answer in result["answers"]):
            raise PeerError(f"a prompt that is new was found in the cache of {connector}")
        seconds[connector] = result["seconds"]
    return seconds["none"] / seconds["kvoffload"]


def _figures(cost: Cost) -> list[Figure]:
    low, high = cluster_interval(cost.ratios)
    cpu, ratios = cost.cpu, [ratio for generation in cost.ratios for ratio in generation]
    by_generation = ", ".join(f"{statistics.median(generation):.3f}" for generation in cost.ratios)
    ours = {name: seconds for name, seconds in cpu.items() if name.startswith(OURS)}
    percent = 100 * sum(ours.values()) / cpu["process"]
    by_thread = ", ".join(f"{name.removeprefix(OURS + '-')} {1e3 * seconds:.0f} ms" for name, seconds in sorted(ours.items()))
    return [
        Figure(
            "engine: throughput without hits, lower end of 95 %",
            low,
            "of plain",
            f">= {RATIO_TARGET}",
            low >= RATIO_TARGET,
            f"median {statistics.median(ratios):.3f}, [{low:.3f}, {high:.3f}] bootstrapped over processes, "
            f"{len(ratios)} alternating pairs; medians of each pair of processes {by_generation}",
        ),
        Figure(
            "engine: CPU time of our threads",
            percent,
            "%",
            f"<= {CPU_TARGET_PERCENT:.0f}",
            bool(ours) and percent <= CPU_TARGET_PERCENT,
            f"of {cpu['process']:.1f} s of the engine's process: {by_thread or 'no thread of ours was found'}",
        ),
    ]
