"""Real vLLM on this CPU, in 1, 2 or 3 processes, with handles for tests.

One engine with a connector at a time may live in a process (vLLM keeps the worker's connector in a global).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from tests.vllm import environment
from tests.vllm.outputs import Output

from kvoffload.testing.model import TINY, ModelShape, make_model

if TYPE_CHECKING:
    from kvoffload.testing.copy_faults import FaultyCopyEngine

BLOCK = 32
LIKELIEST = 5


class Engine:
    """A real `vllm.LLM`. ``arguments`` go to it; greedy sampling, token ids in and out."""

    def __init__(self, shape: ModelShape = TINY, *, processes: int = 1, transfer: dict[str, Any] | None = None, **arguments: Any) -> None:
        environment.prepare(processes)
        import torch

        from vllm import LLM

        torch.set_num_threads(1)  # also where somebody imported torch before
        usual = {
            "dtype": "float32",  # half types round logits so coarsely that likeliest tokens tie
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "block_size": BLOCK,
            "max_model_len": 1024,
            "num_gpu_blocks_override": 256,
            "max_logprobs": LIKELIEST,
            "disable_log_stats": False,
            "seed": 0,
            "worker_extension_cls": "tests.vllm.worker_extension.KVAccess",
        }
        if processes == 2:
            usual["distributed_executor_backend"] = "mp"
        if transfer is not None:
            usual["kv_transfer_config"] = transfer
        self.processes = processes
        self.block_size = int(arguments.get("block_size", BLOCK))
        self.llm = LLM(model=str(make_model(environment.MODELS, shape)), **{**usual, **arguments})
        self._engine: Any = self.llm.llm_engine
        self._count = 0
        self._order: list[str] = []
        self._finished: dict[str, Output] = {}
        self._closed = False
        if transfer is not None and "l1" in transfer.get("kv_connector_extra_config", {}):
            self._wait_ready()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ------------------------------------------------------------ requests

    def generate(self, prompts: Sequence[list[int]], tokens: int = 8, *, salts: Sequence[str | None] = ()) -> list[Output]:
        """All at once; outputs in the order of the prompts."""
        names = [self.submit(prompt, tokens, salt=salts[index] if salts else None) for index, prompt in enumerate(prompts)]
        self.run()
        return [self.take(name) for name in names]

    def submit(self, prompt: list[int], tokens: int = 8, *, salt: str | None = None, name: str | None = None, **sampling: Any) -> str:
        """Hand in a request; it is worked on by `step`. Returns its name."""
        from vllm import SamplingParams

        self._count += 1
        name = name or f"request-{self._count}"
        parameters = SamplingParams(max_tokens=tokens, temperature=0.0, logprobs=LIKELIEST, ignore_eos=True, detokenize=False, **sampling)
        question: dict[str, Any] = {"prompt_token_ids": list(prompt)}
        if salt is not None:
            question["cache_salt"] = salt
        self._engine.add_request(name, question, parameters)
        return name

    def step(self) -> bool:
        """One step of the engine; whether there is more to do."""
        if not self._engine.has_unfinished_requests():
            return False
        for output in self._engine.step():
            if output.finished:
                self._finished[output.request_id] = _read(output)
        return bool(self._engine.has_unfinished_requests())

    def idle_steps(self, count: int) -> None:
        """Steps of an engine whose requests have all ended for their callers, but maybe not for its scheduler; in process only."""
        for _ in range(count):
            self._engine.engine_core.get_output()

    def step_until(self, condition: Callable[[], bool], limit: int = 5_000) -> None:
        for _ in range(limit):
            if condition():
                return
            self.step()
        raise AssertionError(f"it did not come to that within {limit} steps")

    def run(self, limit: int = 20_000) -> None:
        """Until every request has ended."""
        for _ in range(limit):
            if not self.step():
                return
        raise AssertionError(f"requests did not end within {limit} steps")

    def abort(self, names: Sequence[str]) -> None:
        self._engine.abort_request(list(names))

    def take(self, name: str) -> Output:
        """The output of a request that has ended."""
        return self._finished.pop(name)

    def is_finished(self, name: str) -> bool:
        return name in self._finished

    # ------------------------------------------------------------ the cache

    def flush(self) -> None:
        """Wait until everything that was to be saved is saved or dropped."""
        if self.connector is not None and self.processes < 3:
            assert self.connector.flush(20.0), "saves did not settle"
        elif self.processes == 3:
            self._tell("flush")

    def drop_engine_cache(self) -> None:
        """vLLM forgets all its blocks; the connector keeps its own."""
        assert self.llm.reset_prefix_cache(), "the engine's own cache could not be reset: blocks are still in use"

    def noise(self, seed: int = 0) -> None:
        """Overwrite the engine's whole KV cache, and spoil what is still to be read from it: `flush` and `drop_engine_cache` first."""
        [written] = self.llm.collective_rpc("kv_noise", args=(seed,))
        assert written > 0

    def forget(self) -> None:
        """From here on the engine can have KV from the connector only."""
        self.flush()
        self.drop_engine_cache()
        self.noise()

    def reset(self) -> bool:
        """Reset everything, the connector's cache too; False where vLLM could not reset its own."""
        return bool(self.llm.reset_prefix_cache(reset_connector=True))

    def _wait_ready(self) -> None:
        from tests.vllm.connectors import wait_ready

        if self.connector is not None:
            wait_ready(self.connector)
        else:
            self._tell("ready")

    def _tell(self, what: str) -> None:
        """Makes a `FaultyConnector` in vLLM's own process wait for something, by a request too short to be saved."""
        self._finished.pop(self.submit([1], 1, name=f"{what}-{self._count}"), None)
        self.run()

    # ------------------------------------------------------------ insides, in process only

    @property
    def core(self) -> Any:
        """vLLM's EngineCore."""
        return self._engine.engine_core.engine_core

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def connector(self) -> Any:
        """The scheduler's half of the connector; None in three processes, and without one."""
        return self.scheduler.connector if self.processes < 3 else None

    @property
    def copies(self) -> FaultyCopyEngine:
        """The copy engine of a `FaultyConnector` in this process."""
        from tests.vllm.connectors import FaultyConnector

        assert FaultyConnector.copies is not None
        engine = FaultyConnector.copies()
        assert engine is not None
        return engine

    def loaded_blocks(self) -> int:
        """Engine blocks that load copies were asked for so far."""
        return sum(len(call.blocks) for call in self.copies.calls if call.kind == "load")

    def cached_blocks(self, prompt: list[int], salt: str | None = None) -> list[int]:
        """The engine blocks in which vLLM's prefix cache has the start of this prompt, from the first on."""
        from vllm.v1.request import Request

        from vllm import SamplingParams

        request = Request("probe", list(prompt), SamplingParams(), None, cache_salt=salt, block_hasher=self.core.request_block_hasher)
        pool = self.scheduler.kv_cache_manager.block_pool
        found = []
        for block_hash in request.block_hashes:
            cached = pool.get_cached_block(block_hash, [0])
            if not cached:
                break
            found.append(cached[0].block_id)
        return found

    def kv_of(self, prompt: list[int], salt: str | None = None) -> list[bytes]:
        """Digests of the bytes of those blocks, over all layers."""
        [digests] = self.llm.collective_rpc("kv_digests", args=(self.cached_blocks(prompt, salt),))
        return list(digests)

    def preemptions(self) -> int:
        """So far."""
        return sum(metric.value for metric in self.llm.get_metrics() if metric.name == "vllm:num_preemptions")

    def l1(self) -> Any:
        """`L1Statistics`."""
        return self.connector.scheduler_half.host.hub.statistics()

    def assert_nothing_leaked(self) -> None:
        """vLLM holds no request and no block: everything that was promised to it was reported."""
        pool = self.scheduler.kv_cache_manager.block_pool
        assert not self.scheduler.requests
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1

    # ------------------------------------------------------------ end

    def close(self) -> None:
        """Stop the engine and free what it has, so that the next one can start here."""
        if self._closed:
            return
        self._closed = True
        from vllm.distributed import cleanup_dist_env_and_memory

        with suppress(Exception):  # a dead engine says so here
            self._engine.engine_core.shutdown()
        del self._engine, self.llm
        if self.processes == 1:  # else these are another engine's
            cleanup_dist_env_and_memory()
        gc.collect()


def _read(output: Any) -> Output:
    [said] = output.outputs
    logprobs = tuple({token: entry.logprob for token, entry in place.items()} for place in said.logprobs or ())
    return Output(tuple(said.token_ids), logprobs, output.num_cached_tokens or 0, said.finish_reason)


@contextmanager
def engine(shape: ModelShape = TINY, **arguments: Any) -> Iterator[Engine]:
    with Engine(shape, **arguments) as started:
        yield started
