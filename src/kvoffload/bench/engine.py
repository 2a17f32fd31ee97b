"""What kvoffload costs an engine that never hits: ``kvoffload bench engine``."""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import dataclass, field

from kvoffload.bench.cpu_time import OURS
from kvoffload.bench.engine_process import EngineOptions, EngineProcess
from kvoffload.bench.figures import Figure
from kvoffload.bench.measuring import cluster_interval, unique_prompts
from kvoffload.errors import PeerError
from kvoffload.testing.model import BENCH, TINY, ModelShape, make_model

RATIO_TARGET = 0.97
CPU_TARGET_PERCENT = 1.0
GENERATIONS = 3
PAIRS = 12
"""Of each generation. Two processes of the same code differ for all their life by more than what is measured here (where their memory
happens to lie), so both runs of a pair are one process's: with its connector, and with the connector taken out. There are several
processes all the same, and the interval is one over them."""

LENGTHS = (330, 200, 450, 270)


@dataclass(slots=True)
class Cost:
    """``ratios``: throughput with the connector over that without, pair by pair, by generation of processes. ``cpu``: seconds that runs
    with it took, in all (``process``) and by thread of ours."""

    ratios: list[list[float]] = field(default_factory=list)
    cpu: dict[str, float] = field(default_factory=dict)


def run(quick: bool = False) -> list[Figure]:
    """vLLM with kvoffload and without in turn, prompts that nobody has seen before."""
    with tempfile.TemporaryDirectory(prefix="kvoffload-bench-") as directory:
        if quick:
            cost = measure(TINY, directory, generations=2, pairs=2, requests=2, tokens=16)
        else:
            cost = measure(BENCH, directory, generations=GENERATIONS, pairs=PAIRS, requests=8, tokens=96)
    return _figures(cost)


def measure(shape: ModelShape, directory: str, *, generations: int, pairs: int, requests: int, tokens: int) -> Cost:
    """So many processes one after the other, each with so many alternating pairs of runs."""
    options = EngineOptions(str(make_model(directory, shape)), "kvoffload", dtype=shape.dtype, l1_bytes=1 << 30)
    cost = Cost()
    for generation in range(generations):
        with EngineProcess(options) as engine:
            engine.wait_ready()
            engine.call("wait_populated")
            for attached in (False, True):
                engine.call("attach", on=attached)
                engine.call("generate", prompts=unique_prompts(requests, LENGTHS, seed=1), max_tokens=tokens)
            cost.ratios.append([_pair(engine, cost, requests, tokens, seed=1000 + pairs * generation + pair) for pair in range(pairs)])
            if not engine.call("statistics")["committed"]:
                raise PeerError("kvoffload saved nothing: what was measured is not its cost")
    return cost


def _pair(engine: EngineProcess, cost: Cost, requests: int, tokens: int, seed: int) -> float:
    """Different new prompts of the same lengths, with and without; the ratio of the throughputs."""
    seconds: dict[bool, float] = {}
    # What goes first changes from pair to pair, so that a drift of the machine favours neither.
    for attached in (True, False) if seed % 2 else (False, True):
        engine.call("attach", on=attached)
        before = engine.call("cpu")
        result = engine.call("generate", prompts=unique_prompts(requests, LENGTHS, seed=2 * seed + attached), max_tokens=tokens)
        if attached:
            engine.call("flush")  # what this run saves is this run's cost
            for name, spent in engine.call("cpu").items():
                cost.cpu[name] = cost.cpu.get(name, 0.0) + spent - before.get(name, 0.0)
        if any(answer["cached"] for answer in result["answers"]):
            raise PeerError("a prompt that is new was found in a cache")
        seconds[attached] = result["seconds"]
    return seconds[False] / seconds[True]


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
            f"{len(ratios)} alternating pairs, the same engine with its connector and without; medians of each process {by_generation}",
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
