"""First tokens of prompts that another engine computed, and what a dead node costs: part of ``kvoffload bench l2``, with real vLLM.

The node is a Valkey server here: a first token waits for its bytes, whoever serves them.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvoffload.bench.engine_process import EngineOptions, EngineProcess
from kvoffload.bench.figures import Figure, not_measured
from kvoffload.bench.measuring import unique_prompts
from kvoffload.config import L2Settings
from kvoffload.errors import PeerError, UnsupportedError
from kvoffload.testing.model import BENCH, TINY, ModelShape, make_model
from kvoffload.testing.valkey import ValkeyServer

SPEED_UP_TARGET, LATER_TARGET = 5.0, 1.05
TTFT = "l2 ttft: computed / from another engine"
FIRST, WAITED, LATER = (f"l2 ttft: a node {{}}, {what}" for what in ("first prompt", "prompts that waited", "later prompts / computed"))
DEATHS: dict[str, Callable[[ValkeyServer], None]] = {"killed": ValkeyServer.kill, "frozen": ValkeyServer.freeze}


@dataclass(frozen=True, slots=True)
class Load:
    """``prompts`` of ``length`` tokens, 44 beyond a multiple of 128; ``new`` ones when the node is dead, and as many computed."""

    shape: ModelShape
    length: int
    prompts: int
    new: int


FULL = Load(BENCH, 3884, 9, 9)
QUICK = Load(TINY, 556, 2, 2)


@dataclass(slots=True)
class Times:
    """Seconds to first token. ``dead``: of new prompts, by what became of the node, beside ``alone``, for which no node is asked."""

    computed: list[float] = field(default_factory=list)
    loaded: list[float] = field(default_factory=list)
    short: int = 0
    """Prompts of which not all came in time; they are among ``loaded``."""
    dead: dict[str, list[float]] = field(default_factory=dict)
    alone: dict[str, list[float]] = field(default_factory=dict)
    late: dict[str, int] = field(default_factory=dict)
    """How many of the new prompts had to wait until their deadline."""


def run(*, quick: bool) -> list[Figure]:
    """Three engines, one after another. Raises PeerError when one of them fails, or finds nothing."""
    load = QUICK if quick else FULL
    try:
        server = ValkeyServer()
    except UnsupportedError as error:
        deaths = [not_measured(name.format(death), "", str(error)) for death in DEATHS for name in (FIRST, WAITED, LATER)]
        return [not_measured(TTFT, f">= {SPEED_UP_TARGET:g}", str(error)), *deaths]
    with tempfile.TemporaryDirectory(prefix="kvoffload-bench-") as directory, server:
        return _figures(load, measure(directory, load, server))


def measure(directory: str, load: Load, server: ValkeyServer) -> Times:
    """The first engine computes, the second finds; under the second the node is killed, under a third it is frozen."""
    options = EngineOptions(
        str(make_model(directory, load.shape)),
        dtype=load.shape.dtype,
        l1_bytes=1 << 30,
        l2={"backend": "redis", "nodes": [server.url]},
    )
    times = Times()
    prompts = unique_prompts(load.prompts, [load.length], seed=31)
    with EngineProcess(options) as engine:
        _start(engine, load, seed=40)
        times.computed = [_first_token(engine, prompt)[0] for prompt in prompts]
        if not engine.call("flush"):
            raise PeerError(f"not all was written to the node\n{engine.log_tail()}")
    with EngineProcess(options) as engine:
        _start(engine, load, seed=41)
        for prompt in prompts:
            seconds, cached = _first_token(engine, prompt)
            times.loaded.append(seconds)
            times.short += cached < (load.length - 1) // 128 * 128
        if times.short == load.prompts:
            raise PeerError(f"no prompt came from the node whole\n{engine.log_tail()}")
        _die(engine, load, server, "killed", times)
    server.restart()
    with EngineProcess(options) as engine:
        _start(engine, load, seed=42)
        _die(engine, load, server, "frozen", times)
    return times


def _start(engine: EngineProcess, load: Load, seed: int) -> None:
    """Until it is warm, and knows the node: prompts of its own were looked for there, and written."""
    engine.wait_ready()
    off = engine.off_reason()
    if off is not None:
        raise PeerError(off)
    engine.call("wait_populated")
    for prompt in unique_prompts(2, [load.length], seed=seed):
        engine.call("generate", prompts=[prompt])
        engine.call("flush")


def _die(engine: EngineProcess, load: Load, server: ValkeyServer, death: str, times: Times) -> None:
    """New prompts from the moment on that the node is dead, each beside one that is computed without asking."""
    new, alone = (iter(unique_prompts(load.new + 1, [load.length], seed=seed + len(death))) for seed in (50, 60))
    _first_token(engine, next(alone), load=False)
    before = engine.call("statistics")["late"]
    DEATHS[death](server)
    times.dead[death] = [_first_token(engine, next(new))[0]]
    times.alone[death] = []
    for _ in range(load.new):
        times.alone[death].append(_first_token(engine, next(alone), load=False)[0])
        times.dead[death].append(_first_token(engine, next(new))[0])
    times.late[death] = engine.call("statistics")["late"] - before


def _first_token(engine: EngineProcess, prompt: Sequence[int], **arguments: Any) -> tuple[float, int]:
    """Seconds, and how many tokens came from a cache."""
    result = engine.call("generate", prompts=[prompt], **arguments)
    return result["seconds"], result["answers"][0]["cached"]


# ---------------------------------------------------------------- figures


def deadline_s(tokens: int) -> float:
    """How long a match of a prompt may take, as set by default."""
    settings = L2Settings()
    return min(settings.deadline_base_ms + tokens * settings.deadline_per_1000_tokens_ms / 1e3, settings.deadline_most_ms) / 1e3


def _figures(load: Load, times: Times) -> list[Figure]:
    computed, loaded = statistics.median(times.computed), statistics.median(times.loaded)
    speed_up = computed / loaded
    in_time = f"; {times.short} of them did not come whole" if times.short else ""
    detail = (
        f"{load.length} tokens, {computed * 1e3:.0f} ms / {loaded * 1e3:.1f} ms, medians of {load.prompts} prompts, worst from the node "
        f"{max(times.loaded) * 1e3:.1f} ms{in_time}"
    )
    figures = [Figure(TTFT, speed_up, "x", f">= {SPEED_UP_TARGET:g}", speed_up >= SPEED_UP_TARGET, detail)]
    for death, took in times.dead.items():
        figures += _dead(load, death, took, times.alone[death], times.late[death])
    return figures


def _dead(load: Load, death: str, took: Sequence[float], alone: Sequence[float], late: int) -> list[Figure]:
    """The first prompt may cost the deadline more than computing, whose own spread is allowed for; all later ones nothing."""
    computing, spread = statistics.median(alone), max(alone) - min(alone)
    first, deadline = took[0] - computing, deadline_s(load.length)
    later = statistics.median([ours / theirs for ours, theirs in zip(took[1:], alone, strict=True)])  # pairs: the clock wanders
    return [
        Figure(
            FIRST.format(death),
            max(0.0, first) * 1e3,
            "ms",
            f"<= {deadline * 1e3:.0f}",
            first <= deadline + spread,
            f"{first * 1e3:+.0f} ms beyond computing ({computing * 1e3:.0f} ms, which varies by {spread * 1e3:.0f} ms: allowed for)",
        ),
        Figure(
            WAITED.format(death),
            late,
            "prompts",
            "<= 1",
            late <= 1,
            f"of {len(took)} one after another, until the deadline of {deadline * 1e3:.0f} ms",
        ),
        Figure(
            LATER.format(death),
            later,
            "x",
            f"<= {LATER_TARGET:g}",
            later <= LATER_TARGET,
            f"median of {len(took) - 1} pairs with prompts that ask no node; the worst {max(took[1:]) * 1e3:.0f} ms",
        ),
    ]
