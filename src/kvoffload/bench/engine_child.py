"""The child of `kvoffload.bench.engine_process`: one vLLM engine, told what to do line by line."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from kvoffload.bench.cpu_time import cpu_seconds
from kvoffload.bench.engine_process import EngineOptions
from kvoffload.bench.hook_timing import HookTimers
from kvoffload.bench.insides import Insides, KVOffloadInsides
from kvoffload.bench.memcpy import cold_memcpy_s
from kvoffload.bench.remembered import remembered_match_us
from kvoffload.errors import MisuseError, UnsupportedError
from kvoffload.l1.states import State

Prompt = str | Sequence[int]


def transfer_config(options: EngineOptions) -> dict[str, Any] | None:
    """``kv_transfer_config`` as a user would give it."""
    match options.connector:
        case "none":
            return None
        case "example":
            return {
                "kv_connector": "ExampleConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"shared_storage_path": options.storage},
            }
        case "idle":
            return {
                "kv_connector": "IdleConnector",
                "kv_connector_module_path": "kvoffload.bench.idle_connector",
                "kv_role": "kv_both",
            }
        case "kvoffload":
            return {
                "kv_connector": "KVOffloadConnector",
                # By module path too: this also works from a source tree that is not installed.
                "kv_connector_module_path": "kvoffload.connector",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"l1": {"capacity_bytes": options.l1_bytes}, "l2": options.l2 or {}},
            }


class Engine:
    """The commands; arguments and results are what JSON can hold."""

    def __init__(self, options: EngineOptions) -> None:
        from vllm.config import KVTransferConfig

        import vllm

        self._options = options
        self._vllm = vllm
        transfer = transfer_config(options)
        self.llm = vllm.LLM(
            model=options.model,
            dtype=options.dtype,
            max_model_len=options.max_model_len,
            max_num_batched_tokens=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            num_gpu_blocks_override=options.kv_blocks,
            enforce_eager=True,  # compiling takes longer than all that follows
            disable_log_stats=not options.count_tokens,
            kv_transfer_config=None if transfer is None else KVTransferConfig(**transfer),
        )
        self._timers: HookTimers | None = None
        self._parts: tuple[Any, Any] | None = None

    def facts(self) -> dict[str, Any]:
        """What a report says of the engine."""
        return {"vllm": self._vllm.__version__, "block_size": self.llm.llm_engine.vllm_config.cache_config.block_size}

    # ------------------------------------------------------------ requests

    def generate(self, prompts: Sequence[Prompt], max_tokens: int = 1, load: bool = True) -> dict[str, Any]:
        """Run ``prompts`` together, greedily: ``seconds`` for all, and per prompt its answer. ``load`` False: computed in any case."""
        extra = None if load else {"kv_transfer_params": {"kvoffload": {"load": False}}}
        parameters = self._vllm.SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, extra_args=extra)
        inputs: list[Any] = [prompt if isinstance(prompt, str) else {"prompt_token_ids": list(prompt)} for prompt in prompts]
        before = self._cached()
        begun = time.perf_counter()
        outputs = self.llm.generate(inputs, parameters, use_tqdm=False)
        seconds = time.perf_counter() - begun
        return {
            "seconds": seconds,
            "sources": {source: count - before.get(source, 0) for source, count in self._cached().items()},
            "answers": [
                {
                    "tokens": len(output.prompt_token_ids or ()),
                    "cached": output.num_cached_tokens or 0,
                    "first_token_s": output.metrics.first_token_latency if output.metrics else None,
                    "output": list(output.outputs[0].token_ids),
                    "text": output.outputs[0].text,
                }
                for output in outputs
            ],
        }

    def _cached(self) -> Mapping[str, int]:
        """Prompt tokens that came from a cache, by vLLM's name of it: device, host. Empty without ``count_tokens``."""
        if not self._options.count_tokens:
            return {}
        name = "vllm:prompt_tokens_cached_by_source"
        return {metric.labels["source"]: int(metric.value) for metric in self.llm.get_metrics() if metric.name == name}

    def preemptions(self) -> int:
        """Of requests, so far. Only with ``count_tokens``."""
        if not self._options.count_tokens:
            raise MisuseError("count_tokens first")
        return sum(int(metric.value) for metric in self.llm.get_metrics() if metric.name == "vllm:num_preemptions")

    def reset(self) -> bool:
        """Empty vLLM's own prefix cache, and nothing else."""
        return bool(self.llm.reset_prefix_cache())

    # ------------------------------------------------------------ looking inside (one process only)

    def _connectors(self) -> tuple[Any, Any]:
        """The scheduler's and the worker's, whosever they are."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        if self._parts is not None:
            return self._parts
        if self._options.multiprocessing or self._options.connector == "none":
            raise MisuseError("only in process, and only with a connector")
        core: Any = self.llm.llm_engine.engine_core
        return core.engine_core.scheduler.connector, get_kv_transfer_group()

    def attach(self, on: bool) -> bool:
        """Take the connector out of vLLM's way, or put it back, while no request runs: without it, it is vLLM as if there were none."""
        from vllm.distributed.kv_transfer import kv_transfer_state

        self._parts = self._parts or self._connectors()
        core: Any = self.llm.llm_engine.engine_core
        core.engine_core.scheduler.connector, kv_transfer_state._KV_CONNECTOR_AGENT = self._parts if on else (None, None)
        return on

    def _ours(self) -> tuple[Any, Any]:
        if self._options.connector != "kvoffload":
            raise MisuseError("only with kvoffload")
        scheduler, worker = self._connectors()
        if scheduler.scheduler_half is None or scheduler.off_reason is not None:
            raise UnsupportedError(f"kvoffload is off: {scheduler.off_reason}")
        return scheduler, worker

    def flush(self) -> bool:
        """Wait until everything saved so far is in L1. Where the connector is in another process: a moment."""
        if self._options.connector != "kvoffload":
            return True
        if self._options.multiprocessing:
            time.sleep(0.5)
            return True
        return bool(self._ours()[0].flush(10.0))

    def wait_populated(self, timeout_s: float = 60.0) -> dict[str, Any]:
        """Until all of L1 may be used; then its statistics."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = self.statistics()
            if found["usable"] >= found["capacity"] or time.monotonic() > deadline:
                return found
            time.sleep(0.05)

    def statistics(self) -> dict[str, Any]:
        """L1 as it is: slots, and running totals of blocks; ``refused`` by reason, from all places that refuse; ``late``: matches that
        had to be answered at their deadline."""
        scheduler_connector, worker_connector = self._ours()
        half, worker = scheduler_connector.scheduler_half, worker_connector.worker_half
        l1 = half.host.hub.statistics()
        if l1 is None:
            raise UnsupportedError(f"kvoffload is off: {half.side.off_reason}")
        refused = {reason.value: count for reason, count in l1.drops.items() if count}
        for reason, count in half.side.saver.drops.items():
            refused[reason.value] = refused.get(reason.value, 0) + count
        return {
            "usable": l1.usable,
            "capacity": worker.host.runtime.rank.segment.slots,
            "slot_bytes": worker.host.runtime.rank.layout.slot_bytes,
            "block_bytes": worker.host.runtime.rank.layout.payload_bytes,
            "ready": l1.slots.get(State.READY, 0),
            "offered": half.side.saver.offered_blocks,
            "shared": l1.shared,
            "committed": l1.committed,
            "evictions": l1.evictions,
            "refused": refused,
            "unanswered": dict(half.side.matcher.zero_reasons),
            "late": 0 if l1.remote is None else l1.remote.totals.late,
            "off": half.side.off_reason,
        }

    def remembered_match(self, rounds: int) -> float:
        """Microseconds; it needs no engine, but vLLM's classes, and vLLM's import is not quiet."""
        return remembered_match_us(rounds)

    def memcpy_s(self, size: int) -> float:
        """Seconds that this process takes to copy so many bytes it has not touched lately: the least that a load can take."""
        return cold_memcpy_s(size)

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far: of this ``process``, and of kvoffload's threads in it, by name."""
        return cpu_seconds()

    def time_hooks(self) -> None:
        """From now on every hook is timed."""
        if self._options.connector == "kvoffload":
            self._timers = HookTimers.install(*self._ours(), KVOffloadInsides(*self._ours()))
        else:
            self._timers = HookTimers.install(*self._connectors(), Insides())

    def hook_times(self) -> dict[str, Any]:
        """What was timed since the last time this was asked."""
        if self._timers is None:
            raise MisuseError("time_hooks() first")
        return self._timers.take()


def main() -> None:
    # vLLM and its children print on the standard output that they inherit: that becomes the log; answers go where nobody else writes.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    begun = time.perf_counter()
    engine = Engine(EngineOptions(**json.loads(sys.argv[1])))
    result: Any = engine.facts() | {"seconds": time.perf_counter() - begun}
    answers.write(json.dumps({"result": result}) + "\n")
    answers.flush()
    for line in sys.stdin:
        command, arguments = json.loads(line)
        try:
            answer = {"result": getattr(engine, command)(**arguments)}
        except (MisuseError, UnsupportedError) as error:
            answer = {"misuse": str(error)}
        try:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
        except BrokenPipeError:  # nobody listens any more
            return


if __name__ == "__main__":
    main()
