"""Saves kept while the engine's cache is far too small: ``kvoffload bench saves``.

Blocks change hands and requests are preempted while saves of them are in flight. Measured from outside, so that it is the same in one
process and in several: what was computed is asked for again, one by one, with vLLM's own cache empty, and what comes back was kept.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvoffload.bench.engine_process import EngineOptions, EngineProcess
from kvoffload.bench.figures import Figure
from kvoffload.bench.measuring import unique_prompts
from kvoffload.errors import PeerError
from kvoffload.testing.model import TINY, make_model

ONE_PROCESS_TARGET = 90.0
PROCESSES_TARGET = 99.0

LENGTHS = (300, 700, 200, 1100, 450, 900)
"""Tokens of the prompts, in turn."""


@dataclass(frozen=True, slots=True)
class Load:
    """``requests`` at once, ``rounds`` times; ``kv_blocks`` hold a few of them, of 128 tokens each."""

    requests: int
    rounds: int
    answer_tokens: int
    kv_blocks: int


FULL = Load(requests=24, rounds=2, answer_tokens=150, kv_blocks=24)
QUICK = Load(requests=6, rounds=1, answer_tokens=150, kv_blocks=14)


@dataclass(slots=True)
class Kept:
    """Tokens of full blocks; ``refused`` by reason where it can be asked for."""

    saved: int = 0
    computed: int = 0
    preemptions: int = 0
    refused: str = ""


def run(quick: bool = False) -> list[Figure]:
    """In one process and in several."""
    load = QUICK if quick else FULL
    figures = []
    for multiprocessing, target in ((False, ONE_PROCESS_TARGET), (True, PROCESSES_TARGET)):
        with tempfile.TemporaryDirectory(prefix="kvoffload-bench-") as directory:
            kept = measure(directory, load, multiprocessing=multiprocessing)
        figures.append(_figure("several processes" if multiprocessing else "one process", kept, load, target))
    return figures


def measure(directory: str, load: Load, *, multiprocessing: bool) -> Kept:
    """Run the load, then ask for everything again."""
    options = EngineOptions(
        str(make_model(directory, TINY)),
        multiprocessing=multiprocessing,
        dtype=TINY.dtype,
        l1_bytes=512 << 20,
        max_model_len=1536,
        kv_blocks=load.kv_blocks,
        count_tokens=True,
    )
    with EngineProcess(options) as engine:
        block_size = engine.wait_ready()["block_size"]
        _warm_up(engine)
        before = engine.call("preemptions")
        computed = [tokens for round_ in range(load.rounds) for tokens in _round(engine, load, seed=500 + round_)]
        kept = Kept(preemptions=engine.call("preemptions") - before)
        if not kept.preemptions:
            raise PeerError("no request was preempted: the engine's cache was not too small")
        engine.call("flush")
        if not multiprocessing:
            refused = engine.call("statistics")["refused"]
            kept.refused = ", ".join(f"{reason} {count}" for reason, count in sorted(refused.items()))
        for tokens in computed:
            kept.saved += _came_back(engine, tokens)
            # The last token of an answer is never computed, and of a request's last block the rest is never filled.
            kept.computed += (len(tokens) - 1) // block_size * block_size
    return kept


def _warm_up(engine: EngineProcess) -> None:
    """Until a prompt comes back: L1 may be used."""
    (prompt,) = unique_prompts(1, [600], seed=499)
    for _ in range(20):
        engine.call("generate", prompts=[prompt])
        engine.call("flush")
        if _came_back(engine, prompt):
            return
    raise PeerError(f"nothing comes back from kvoffload\n{engine.log_tail()}")


def _round(engine: EngineProcess, load: Load, seed: int) -> list[list[int]]:
    """All tokens of each request: its prompt and its answer."""
    prompts = unique_prompts(load.requests, LENGTHS, seed=seed)
    answers: Sequence[dict[str, Any]] = engine.call("generate", prompts=prompts, max_tokens=load.answer_tokens)["answers"]
    return [prompt + answer["output"] for prompt, answer in zip(prompts, answers, strict=True)]


def _came_back(engine: EngineProcess, tokens: list[int]) -> int:
    """How many of these tokens the connector brings."""
    if not engine.call("reset"):
        raise PeerError("vLLM did not reset its prefix cache")
    (answer,) = engine.call("generate", prompts=[tokens])["answers"]
    cached: int = answer["cached"]
    return cached


def _figure(mode: str, kept: Kept, load: Load, target: float) -> Figure:
    percent = 100 * kept.saved / kept.computed
    detail = (
        f"{kept.saved} of {kept.computed} tokens in full blocks, {load.rounds} x {load.requests} requests, {kept.preemptions} preemptions, "
        f"an engine cache of {load.kv_blocks} blocks"
    )
    if kept.refused:
        detail += f"; blocks not kept: {kept.refused}"
    return Figure(f"saves kept, {mode}", percent, "%", f">= {target:.0f}", percent >= target, detail)
