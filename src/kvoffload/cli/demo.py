"""``kvoffload demo``: real vLLM on this CPU, prompts that left its cache, and where they came from the second time."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from kvoffload.bench.engine_process import EngineOptions, EngineProcess
from kvoffload.cli.demo_engine import Outcome, ask_again, compute_all, drop_engine_cache
from kvoffload.cli.demo_prompts import demo_prompts
from kvoffload.cli.progress import Progress
from kvoffload.cli.table import human_bytes, human_seconds, table
from kvoffload.errors import KVOffloadError
from kvoffload.testing.model import BENCH, make_model

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


def run_demo(*, l1_bytes: int, multiprocessing: bool, verbose: bool) -> int:
    """0 when every answer was the same and tokens came from L1."""
    print("\nkvoffload demo: prompts whose KV cache left vLLM come back from host memory\n")
    if find_spec("vllm") is None:
        print("  vLLM is not installed here: `nox -s demo` makes an environment that has it.", file=sys.stderr)
        return 1
    try:
        with tempfile.TemporaryDirectory(prefix="kvoffload-demo-") as directory:
            outcomes = _run(directory, l1_bytes=l1_bytes, multiprocessing=multiprocessing, verbose=verbose)
    except KVOffloadError as error:
        print(f"\n  the demo failed: {error}", file=sys.stderr)
        return 1
    return 0 if is_success(outcomes) else 1


def is_success(outcomes: Sequence[Outcome]) -> bool:
    return all(outcome.is_same for outcome in outcomes) and any(outcome.from_l1 for outcome in outcomes)


def _run(directory: str, *, l1_bytes: int, multiprocessing: bool, verbose: bool) -> list[Outcome]:
    with Progress("  making a tiny model: Llama, 4 layers, random weights", stream=sys.stdout):
        model = str(make_model(directory, BENCH))
    options = EngineOptions(
        model, dtype=BENCH.dtype, l1_bytes=l1_bytes, multiprocessing=multiprocessing, max_model_len=4096, count_tokens=True
    )
    with EngineProcess(options, show_log=verbose) as engine:
        with Progress("  starting vLLM with kvoffload (10 to 60 s)", stream=sys.stdout) as progress:
            facts = _start(engine)
            progress.done(f"vLLM {facts['vllm']}")
        prompts = demo_prompts()
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
    return outcomes


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


def _outcome_lines(outcomes: Sequence[Outcome]) -> list[str]:
    heading = (
        "prompt",
        "tokens",
        "from\nvLLM",
        "from\nL1",
        "computed\nagain",
        "1st token\ncomputed",
        "1st token\nloaded",
        "\nfaster",
        "moved\nfrom L1",
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


def summary(outcomes: Sequence[Outcome]) -> str:
    """What was seen, in a sentence."""
    different = sum(not outcome.is_same for outcome in outcomes)
    tokens, loaded, engine = (sum(getattr(outcome, name) for outcome in outcomes) for name in ("tokens", "from_l1", "from_engine"))
    if different:
        return f"FAILED: {different} of {len(outcomes)} answers differ from the ones that vLLM computed."
    if not loaded:
        return "FAILED: nothing came from L1."
    faster = sum(outcome.computed_s for outcome in outcomes) / sum(outcome.loaded_s for outcome in outcomes)
    return (
        f"Of {tokens:,} prompt tokens {loaded:,} came back from host memory, {engine:,} from vLLM's own cache,\n"
        f"and {tokens - loaded - engine:,} were computed again: first tokens came {faster:.0f} times sooner,\n"
        "and every answer was the same."
    )
