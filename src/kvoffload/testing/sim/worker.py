"""vLLM's worker without a model: it writes what each token's KV would be, reads it as attention would, and tells."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvoffload.connector.metadata import StepMetadata
from kvoffload.testing.sim.memory import NOTHING, Contents, SimMemory
from kvoffload.testing.sim.settings import BLOCK_SIZE
from kvoffload.testing.sim.trace import OracleError, Trace, shorten

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput

    from kvoffload.testing.sim.connector import SimConnector

VOCABULARY = 50
"""Sampled tokens are below this: few, so that generated prefixes meet again."""


@dataclass
class _State:
    """What a model runner keeps of a request: its tokens, its block table, and here what their KV must be."""

    tokens: list[int]
    blocks: list[int]
    salt: str | None
    contents: Contents = field(init=False)

    def __post_init__(self) -> None:
        self.contents = Contents(0, self.salt)


@dataclass(frozen=True)
class _Share:
    """One request's part of a step: tokens ``start`` to ``stop - 1``."""

    request: str
    state: _State
    start: int
    stop: int


class SimWorker:
    """Executes the plans of a `SchedulerOutput` on `SimMemory`, in vLLM's order of hooks.

    ``version`` is that of the weights: another one gives other contents. ``salt_of`` tells a request's salt.
    """

    def __init__(
        self,
        connector: SimConnector,
        memory: SimMemory,
        rng: random.Random,
        trace: Trace,
        progress: Callable[[], None],
        salt_of: Callable[[str], str | None],
    ) -> None:
        self.connector = connector
        self.version = 0
        self.checked_tokens = 0
        self._memory = memory
        self._rng = rng
        self._trace = trace
        self._progress = progress
        self._salt_of = salt_of
        self._states: dict[str, _State] = {}

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """One step: update the tables, compute, hand over loads and saves, report."""
        from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, KVConnectorOutput, ModelRunnerOutput

        metadata = pickle.loads(pickle.dumps(output.kv_connector_metadata))
        assert isinstance(metadata, StepMetadata)
        for request in output.finished_req_ids:
            self._states.pop(request, None)
        shares = self._take_plan(output)
        connector = self.connector
        connector.bind_connector_metadata(metadata)
        loads_first = self._rng.random() < 0.3
        if loads_first:
            connector.start_load_kv(None)
        samples = self._compute(shares)
        self._progress()
        if not loads_first:
            connector.start_load_kv(None)
        connector.wait_for_save()
        results = connector.get_transfer_results(output.finished_req_ids)
        report = KVConnectorOutput()
        report.finished_sending = results.finished_sending
        report.finished_recving = results.finished_recving
        report.failed_recving = results.failed_recving
        report.invalid_block_ids = connector.get_block_ids_with_load_errors()
        report.kv_connector_stats = connector.get_kv_connector_stats()
        connector.clear_connector_metadata()
        if not shares and report.is_empty():
            return EMPTY_MODEL_RUNNER_OUTPUT
        ids = [share.request for share in shares]
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request: index for index, request in enumerate(ids)},
            sampled_token_ids=samples,
            kv_connector_output=report,
        )

    def _take_plan(self, output: SchedulerOutput) -> list[_Share]:
        shares = []
        for new in output.scheduled_new_reqs:
            tokens = new.prefill_token_ids or new.prompt_token_ids
            self._states[new.req_id] = _State(list(tokens), list(new.block_ids[0]), self._salt_of(new.req_id))
            shares.append((new.req_id, new.num_computed_tokens))
        cached = output.scheduled_cached_reqs
        plans = zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True)
        for request, blocks, computed in plans:
            state = self._states[request]
            if request in cached.resumed_req_ids:
                tokens = cached.all_token_ids[request]
                self._states[request] = _State(list(tokens), list(blocks[0]), state.salt)
            elif blocks is not None:
                state.blocks += blocks[0]
            shares.append((request, computed))
        return [
            _Share(request, self._states[request], computed, computed + output.num_scheduled_tokens[request])
            for request, computed in shares
        ]

    def _compute(self, shares: list[_Share]) -> list[list[int]]:
        """Write all, then read all: a block may be computed for one request and read for another in the same step."""
        for share in shares:
            state = share.state
            if len(state.tokens) < share.stop or len(state.blocks) * BLOCK_SIZE < share.stop:
                raise OracleError(
                    f"{share.request} is to compute token {share.stop - 1} of {len(state.tokens)}, on {len(state.blocks)} blocks",
                    [f"request {share.request}"],
                )
            if state.contents.version != self.version:
                state.contents = Contents(self.version, state.salt)
            state.contents.extend(state.tokens, share.stop)
            for position in range(share.start, share.stop):
                self._memory.engine[state.blocks[position // BLOCK_SIZE]][position % BLOCK_SIZE] = state.contents.values[position]
            self._trace.note(
                f"{share.request} computes tokens {share.start} to {share.stop - 1} on blocks {shorten(state.blocks)}",
                f"request {share.request}",
                *(f"block {block}" for block in state.blocks[share.start // BLOCK_SIZE : -(-share.stop // BLOCK_SIZE)]),
            )
            self._progress()
        for share in shares:
            self._check(share)
        return [self._sample(share) for share in shares]

    def _check(self, share: _Share) -> None:
        values, blocks = share.state.contents.values, share.state.blocks
        self.checked_tokens += share.stop
        for index in range(-(-share.stop // BLOCK_SIZE)):
            expected = values[index * BLOCK_SIZE : min(share.stop, (index + 1) * BLOCK_SIZE)]
            found = self._memory.engine[blocks[index]][: len(expected)]
            if found == expected:
                continue
            wrong = next(place for place, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
            what = {NOTHING: "nothing"}.get(found[wrong], "what was never computed from these tokens")
            raise OracleError(
                f"{share.request} reads wrong KV at token {index * BLOCK_SIZE + wrong} of {share.stop}, of which it computes those from "
                f"{share.start} on: block {blocks[index]}, its block {index}, holds {what}; weights version {self.version}",
                [f"request {share.request}", f"block {blocks[index]}"],
            )

    def _sample(self, share: _Share) -> list[int]:
        """Nothing while the prompt is not through; then a token that depends on all before it, and on nothing else."""
        state = share.state
        if share.stop < len(state.tokens):
            return []
        token = hash((len(state.tokens), *state.tokens[-6:])) % VOCABULARY
        state.tokens.append(token)
        return [token]
