"""What kvoffload costs an engine that never hits: ``kvoffload bench engine``."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence

from kvoffload.bench.cpu_time import OURS
from kvoffload.bench.engine_process import EngineOptions, EngineProcess
from kvoffload.bench.figures import Figure
from kvoffload.bench.measuring import bootstrap_interval, unique_prompts
from kvoffload.errors import PeerError
from kvoffload.testing.model import BENCH, TINY, ModelShape, make_model

RATIO_TARGET = 0.97
CPU_TARGET_PERCENT = 1.0
PAIRS = 24


def run(quick: bool = False) -> list[Figure]:
    """Plain vLLM and vLLM with kvoffload in turn, prompts that nobody has seen before."""
    with tempfile.TemporaryDirectory(prefix="kvoffload-bench-") as directory:
        if quick:
            ratios, cpu = measure(TINY, directory, pairs=3, requests=2, tokens=16)
        else:
            ratios, cpu = measure(BENCH, directory, pairs=PAIRS, requests=8, tokens=48)
    return _figures(ratios, cpu)


def measure(shape: ModelShape, directory: str, *, pairs: int, requests: int, tokens: int) -> tuple[list[float], dict[str, float]]:
    """Throughput with kvoffload over plain vLLM's, pair by pair; and kvoffload's engine's CPU seconds, in all and by thread of ours."""
    model = str(make_model(directory, shape))
    lengths = [330, 200, 450, 270]
    ours_options = EngineOptions(model, "kvoffload", dtype=shape.dtype, l1_bytes=1 << 30)
    with EngineProcess(EngineOptions(model, "none", dtype=shape.dtype)) as plain, EngineProcess(ours_options) as ours:
        for engine in (plain, ours):
            engine.wait_ready()
            engine.call("generate", prompts=unique_prompts(requests, lengths, seed=1), max_tokens=tokens)
        ours.call("wait_populated")
        ratios = []
        cpu: dict[str, float] = {}
        for pair in range(pairs):
            prompts = unique_prompts(requests, lengths, seed=1000 + pair)
            seconds: dict[str, float] = {}
            # Who goes first changes from pair to pair, so that a drift of the machine favours nobody.
            for engine in (plain, ours) if pair % 2 else (ours, plain):
                before = engine.call("cpu")
                result = engine.call("generate", prompts=prompts, max_tokens=tokens)
                if engine is ours:
                    engine.call("flush")  # what this run saves is this run's cost
                    for name, spent in engine.call("cpu").items():
                        cpu[name] = cpu.get(name, 0.0) + spent - before.get(name, 0.0)
                if any(answer["cached"] for answer in result["answers"]):
                    raise PeerError(f"a prompt that is new was found in the cache of {engine.options.connector}")
                seconds[engine.options.connector] = result["seconds"]
            ratios.append(seconds["none"] / seconds["kvoffload"])
        saved = ours.call("statistics")["committed"]
    if not saved:
        raise PeerError("kvoffload saved nothing: what was measured is not its cost")
    return ratios, cpu


def _figures(ratios: Sequence[float], cpu: dict[str, float]) -> list[Figure]:
    low, high = bootstrap_interval(ratios)
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
            f"median {statistics.median(ratios):.3f}, bootstrapped [{low:.3f}, {high:.3f}], {len(ratios)} alternating pairs",
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
