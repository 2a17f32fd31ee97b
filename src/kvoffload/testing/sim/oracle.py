"""What must hold whatever the weather: checked at every hook of the scheduler's half, as vLLM sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from kvoffload.connector.metadata import StepMetadata
from kvoffload.connector.scheduler_side import SchedulerSide
from kvoffload.messages import Job, ReleaseHit, ReserveSlots
from kvoffload.testing.sim.memory import SimClock, SimLedger
from kvoffload.testing.sim.settings import BLOCK_SIZE, SimSettings
from kvoffload.testing.sim.trace import OracleError, Trace

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

SLACK_S = 1e-9


class HookOracle:
    """A `HookWatcher`. ``announce`` is told of every load that leaves in a plan, ``waited_s`` tells how long hooks have waited so far.

    - A block that was handed out to somebody has a new epoch before the plan leaves.
    - An answer is in whole blocks, leaves a token to compute, is async when it is not 0, and is None only until the match deadline.
    - A load that vLLM took leaves in that step's plan, once, and is reported once; after one that failed there is no other one.
    - What holds KV at a reset saves nothing afterwards.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        side: SchedulerSide,
        ledger: SimLedger,
        settings: SimSettings,
        clock: SimClock,
        trace: Trace,
        announce: Callable[[Job, tuple[int, ...]], None],
        waited_s: Callable[[], float],
    ) -> None:
        self.check_bumps = True
        self.check_resets = True
        self.loading: dict[str, int] = {}
        """Blocks of the loads that vLLM waits for, by request."""
        self.tainted: set[str] = set()
        self.answers_in_tokens = 0
        self.preemptions = 0
        self._scheduler = scheduler
        self._side = side
        self._ledger = ledger
        self._settings = settings
        self._clock = clock
        self._trace = trace
        self._announce = announce
        self._waited_s = waited_s
        self._handed: dict[int, int] = {}
        self._asked: dict[str, float] = {}
        self._promised: dict[str, int] = {}
        self._taken: dict[str, int] = {}
        self._blocks: dict[str, frozenset[int]] = {}
        self._failed: set[str] = set()
        self._waited_before = 0.0
        self._matching = ""
        self._watch_pool()

    def _watch_pool(self) -> None:
        pool = self._scheduler.kv_cache_manager.block_pool
        hand_out = pool.get_new_blocks

        def watched(count: int) -> list[object]:
            blocks: list[object] = hand_out(count)
            for block in blocks:
                block_id: int = block.block_id  # type: ignore[attr-defined]
                self._handed[block_id] = self._ledger.epochs([block_id])[0]
            return blocks

        pool.get_new_blocks = watched

    # ------------------------------------------------------------ HookWatcher

    def match_begins(self, request: Request) -> None:
        self._matching = request.request_id
        self._waited_before = self._waited_s()
        self._asked.setdefault(request.request_id, self._clock.now)

    def matched(self, request: Request, num_computed_tokens: int, answer: tuple[int | None, bool]) -> None:
        tokens, is_async = answer
        name = request.request_id
        self._matching = ""
        waited = self._waited_s() - self._waited_before
        if waited > self._settings.match().wait_idle_s + SLACK_S:
            raise OracleError(f"the match hook waited {waited * 1e3:.2f} ms for {name}", [f"request {name}"])
        if tokens is None:
            asked = self._clock.now - self._asked[name]
            # The answer was made before this hook's own wait had ended.
            if asked > self._settings.deadline_s + waited + SLACK_S:
                raise OracleError(f"{name} was told to wait {asked * 1e3:.1f} ms after it had asked", [f"request {name}"])
            return
        del self._asked[name]
        self._promised.pop(name, None)
        self._trace.note(f"{name} is told {tokens} tokens beyond {num_computed_tokens}", f"request {name}")
        if is_async != bool(tokens) or tokens % BLOCK_SIZE or tokens < 0:
            raise OracleError(f"{name} was answered {answer}", [f"request {name}"])
        if tokens and num_computed_tokens + tokens >= request.num_tokens:
            raise OracleError(
                f"{name} was promised {tokens} tokens beyond {num_computed_tokens}, of {request.num_tokens}", [f"request {name}"]
            )
        if tokens and name in self._failed:
            raise OracleError(f"{name} had a load that failed, and is promised another one", [f"request {name}"])
        if tokens:
            self._promised[name] = tokens
            self.answers_in_tokens += tokens

    def allocated(self, request: Request, blocks: list[int], num_external_tokens: int) -> None:
        name = request.request_id
        self._trace.note(f"{name} gets blocks {blocks}, {num_external_tokens} tokens to load", f"request {name}")
        if not num_external_tokens:
            return
        if num_external_tokens != self._promised.pop(name, None):
            raise OracleError(f"vLLM took {num_external_tokens} tokens for {name} that were not promised", [f"request {name}"])
        if name in self.loading:
            raise OracleError(f"{name} loads twice at a time", [f"request {name}"])
        self.loading[name] = self._taken[name] = num_external_tokens // BLOCK_SIZE

    def planned(self, output: SchedulerOutput, metadata: StepMetadata) -> None:
        self.preemptions += len(output.preempted_req_ids or ())
        self._check_bumps()
        sent = {load.request: len(load.blocks) for load in metadata.loads}
        if len(sent) != len(metadata.loads) or sent != self._taken:
            raise OracleError(f"vLLM took loads of {self._taken} blocks, the plan carries {sent}", _requests({**self._taken, **sent}))
        self._taken = {}
        for load in metadata.loads:
            withdrawn = ", withdrawn" if load.withdrawn else ""
            self._trace.note(
                f"load {load.job} of {load.request} planned: slots {load.slots} -> blocks {load.blocks}{withdrawn}",
                f"job {load.job}",
                f"request {load.request}",
                *(f"block {block}" for block in load.blocks),
                *(f"slot {slot}" for slot in load.slots),
            )
            self._blocks[load.request] = frozenset(load.blocks)
            if load.slots:
                self._announce(load.job, load.slots)
        if metadata.idle != (not output.total_num_scheduled_tokens):
            raise OracleError("the plan says that the step is idle, and it is not, or the other way round")

    def reported(self, output: KVConnectorOutput) -> None:
        for name in output.finished_recving or ():
            self._trace.note(f"{name}'s load is reported (invalid: {sorted(output.invalid_block_ids)})", f"request {name}")
            if self.loading.pop(name, None) is None:
                raise OracleError(f"a load of {name} was reported that vLLM does not wait for", [f"request {name}"])
            if self._blocks.pop(name) & output.invalid_block_ids:
                self._failed.add(name)
        if output.invalid_block_ids and not output.finished_recving:
            raise OracleError(f"blocks {sorted(output.invalid_block_ids)} were reported invalid, and no load ended")

    def finished(self, request: Request) -> None:
        name = request.request_id
        self._trace.note(f"{name} finished: {request.status.name}", f"request {name}")
        self._asked.pop(name, None)
        self._promised.pop(name, None)
        self.tainted.discard(name)
        self._failed.discard(name)

    def resets(self) -> None:
        self._trace.note("the connector's cache is reset")
        self._asked.clear()
        self._promised.clear()
        manager = self._scheduler.kv_cache_manager
        self.tainted |= {name for name in self._scheduler.requests if any(manager.get_block_ids(name)[0])}

    # ------------------------------------------------------------ checked from outside

    def posted(self, message: ReserveSlots) -> None:
        """A reservation was posted; refused or not, it must not be of what was alive at a reset."""
        for run in message.runs:
            if run.request in self.tainted and self.check_resets:
                raise OracleError(f"{run.request} held KV at a reset, and now saves blocks {run.blocks}", [f"request {run.request}"])

    def released(self, message: ReleaseHit) -> None:
        """A hit was given back. One that had expired is asked for anew, and that is a new question."""
        self._asked.pop(message.request, None)
        if message.request == self._matching:
            self._asked[message.request] = self._clock.now

    def _check_bumps(self) -> None:
        handed, self._handed = self._handed, {}
        if not self.check_bumps:
            return
        blocks = self._scheduler.kv_cache_manager.block_pool.blocks
        for block, epoch in handed.items():
            # One that was handed out and freed again within a step was written by nobody.
            if blocks[block].ref_cnt and self._ledger.epochs([block])[0] == epoch:
                raise OracleError(f"block {block} was handed out, and the plan leaves without a new epoch for it", [f"block {block}"])


def _requests(names: Iterable[str]) -> list[str]:
    return [f"request {name}" for name in names]
