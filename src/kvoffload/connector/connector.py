"""`KVOffloadConnector`: vLLM's hooks, each handed to the half that is concerned. No policy lives here."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole, KVConnectorTransferResults

from kvoffload.connector.guard import never_raises
from kvoffload.connector.halves import SchedulerHalf, SwitchedOff, WorkerHalf
from kvoffload.connector.metadata import StepMetadata, WorkerHandshake
from kvoffload.connector.stats import KVOffloadStats
from kvoffload.errors import KVOffloadError
from kvoffload.observe.logs import get_logger

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from kvoffload.copy.engine import CopyEngine

log = get_logger("connector")

_NOTHING = KVConnectorTransferResults()
"""What nearly every step reports; vLLM 0.32 reads it and keeps it no longer than the step."""


def _after_failed_alloc(self: KVOffloadConnector, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
    """Nobody knows which blocks have a new owner by now: no save under way may count. And vLLM waits for what it took."""
    if self.scheduler_half is not None:
        self.scheduler_half.bump_all()
        if num_external_tokens:
            self.scheduler_half.side.plan_withdrawn(request.request_id, blocks.get_block_ids()[0], num_external_tokens)


def _after_failed_build(self: KVOffloadConnector, output: SchedulerOutput, error: Exception) -> StepMetadata:
    """As above. Loads that were promised still go out; what could not be said of saves is only a miss later."""
    if self.scheduler_half is None:
        return StepMetadata()
    self.scheduler_half.bump_all()
    return StepMetadata((), self.scheduler_half.side.take_planned(), not output.total_num_scheduled_tokens)


def _after_failed_start(self: KVOffloadConnector) -> None:
    metadata = self._step()
    if self.worker_half is not None and metadata is not None:
        self.worker_half.side.start_none(metadata)


class KVOffloadConnector(KVConnectorBase_V1):
    """Offloads vLLM's KV cache to host memory and brings it back. vLLM makes one per role.

    Where it cannot work (`off_reason` says why) every hook is neutral: the engine computes as if there were no connector.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.off_reason: str | None = None
        self.scheduler_half: SchedulerHalf | None = None
        self.worker_half: WorkerHalf | None = None
        self._failed_hooks: set[str] = set()
        try:
            if role is KVConnectorRole.SCHEDULER:
                self.scheduler_half = SchedulerHalf(vllm_config, kv_cache_config)
            else:
                self.worker_half = WorkerHalf(vllm_config, kv_cache_config, self.make_copy_engine)
        except Exception as error:  # whatever it is, the engine can do without us
            self._start_failed(error)

    # A best-effort cache: nothing of a preempted request has to be delivered.
    @property
    def requires_kv_delivery(self) -> bool:
        return False

    def make_copy_engine(self, engine: CopyEngine) -> CopyEngine:
        """The copy engine to use in place of ``engine``: a seam for fault injection in tests."""
        return engine

    def _start_failed(self, error: Exception) -> None:
        self.off_reason = f"{type(error).__name__}: {error}"
        bug = None if isinstance(error, KVOffloadError) else error
        say = log.warning if isinstance(error, SwitchedOff) else log.error
        if self.role is KVConnectorRole.WORKER and bug is None:
            say = log.info  # the scheduler's half has the same reason, or is told this one, and says it once for all ranks
        say("connector off: vLLM goes on without kvoffload", reason=self.off_reason, role=self.role.name, exc_info=bug)

    def hook_failed(self, hook: str, error: Exception) -> None:
        if hook in self._failed_hooks:  # said once is enough: it may fail in every step
            return
        self._failed_hooks.add(hook)
        log.error("a hook failed, please report this", hook=hook, role=self.role.name, exc_info=error)
        if self.scheduler_half is not None:
            self.scheduler_half.side.turn_off(f"hook {hook} failed: {error!r}")
        if self.worker_half is not None:
            self.worker_half.turn_off(f"hook {hook} failed: {error!r}")

    def shutdown(self) -> None:
        """Stops what this half started; at most 3 s, never raises."""
        for half in (self.worker_half, self.scheduler_half):
            if half is None:
                continue
            try:
                half.close()
            except Exception as error:  # the engine is going down; say so and let it
                log.error("shutdown failed", role=self.role.name, exc_info=error)

    # ------------------------------------------------------------ worker half

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self.worker_half is None:
            return
        try:
            self.worker_half.register_kv_caches(kv_caches)
        except Exception as error:  # whatever it is, the engine can do without us
            self.worker_half.turn_off(f"{type(error).__name__}: {error}")
            self._start_failed(error)

    @never_raises(None)
    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        if self.worker_half is None:
            return WorkerHandshake(rank=0, off_reason=self.off_reason)
        return self.worker_half.handshake()

    # Most steps carry neither loads nor saves, and between two of vLLM's forwards every call runs with cold caches: so the hooks of each
    # step look first, and are guarded where there is something to do.

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        metadata = self._connector_metadata
        if metadata is not None and self.worker_half is not None and metadata.loads:
            self._start_loads()

    @never_raises(None, _after_failed_start)
    def _start_loads(self) -> None:
        metadata = self._step()
        if self.worker_half is not None and metadata is not None:
            self.worker_half.side.start_load_kv(metadata)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are whole requests, between steps: no layer ever waits."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any) -> None:
        """Saves are whole blocks, after the step: nothing is copied here."""

    def wait_for_save(self) -> None:
        if sys.exception() is not None and self._forward_failed():
            return
        metadata = self._connector_metadata
        if metadata is not None and self.worker_half is not None and metadata.saves:
            self._start_saves()

    @never_raises(True)
    def _forward_failed(self) -> bool:
        """vLLM comes here on the way out of a failed forward too. An engine in this process may be used again (a KeyboardInterrupt in a
        notebook), and takes the step's blocks for computed: nothing that it holds can be proven any more.
        """
        error = sys.exception()
        step = sys._getframe(3)  # behind this method, its guard, and the hook
        if error is None or error.__traceback__ is None or error.__traceback__.tb_frame is not step:
            return False  # whoever drives vLLM does so while handling an exception of its own
        if self.worker_half is not None:
            self.worker_half.turn_off(f"the forward of a step failed: {error!r}")
        return True

    @never_raises(None)
    def _start_saves(self) -> None:
        metadata = self._step()
        if self.worker_half is not None and metadata is not None:
            self.worker_half.side.wait_for_save(metadata)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        half = self.worker_half
        if half is None or not half.side.has_news:
            return _NOTHING
        finished = self._take_finished()
        return KVConnectorTransferResults(finished_recving=finished) if finished else _NOTHING

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self.worker_half is None or not self.worker_half.side.has_news:
            return None, None
        return None, self._take_finished()

    @never_raises(None)
    def _take_finished(self) -> set[str] | None:
        metadata = self._step()
        assert self.worker_half is not None
        return self.worker_half.side.get_finished(idle=metadata is not None and metadata.idle)

    def get_block_ids_with_load_errors(self) -> set[int]:
        if self.worker_half is None or not self.worker_half.side.has_errors:
            return set()
        return self.worker_half.side.get_block_ids_with_load_errors()

    def _step(self) -> StepMetadata | None:
        metadata = self._connector_metadata
        return metadata if isinstance(metadata, StepMetadata) else None

    # ------------------------------------------------------------ scheduler half

    @never_raises(None)
    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        if self.scheduler_half is not None:
            self.scheduler_half.join([worker for worker in metadata.values() if isinstance(worker, WorkerHandshake)])

    @never_raises(None)
    def on_new_request(self, request: Request) -> None:
        if self.scheduler_half is not None:
            self.scheduler_half.side.on_new_request(request)

    @never_raises((0, False))
    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        if self.scheduler_half is None:
            return 0, False
        return self.scheduler_half.side.get_num_new_matched_tokens(request, num_computed_tokens)

    @never_raises(None, _after_failed_alloc)
    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        if self.scheduler_half is not None:
            self.scheduler_half.side.update_state_after_alloc(request, blocks, num_external_tokens)

    @never_raises(None, lambda *_: {})
    def get_external_cache_hit_sources(self, request: Request, num_external_tokens: int) -> dict[CacheHitSource, int]:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource

        return {CacheHitSource.HOST: num_external_tokens} if num_external_tokens else {}

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        half = self.scheduler_half
        if half is None:
            return StepMetadata()
        try:  # the guard, by hand: a frame less in every step
            return half.side.build_connector_meta(scheduler_output)
        except Exception as error:  # see `never_raises`
            return self._build_failed(scheduler_output, error)

    @never_raises(StepMetadata(), _after_failed_build, name="build_connector_meta")
    def _build_failed(self, output: SchedulerOutput, error: Exception) -> KVConnectorMetadata:
        raise error

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        if self.scheduler_half is not None and connector_output.finished_recving:
            self._loads_finished(connector_output)

    @never_raises(None)
    def _loads_finished(self, connector_output: KVConnectorOutput) -> None:
        assert self.scheduler_half is not None
        self.scheduler_half.side.update_connector_output(connector_output)

    @never_raises((False, None))
    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        if self.scheduler_half is not None:
            self.scheduler_half.side.request_finished(request)
        return False, None

    @never_raises(False)
    def reset_cache(self) -> bool | None:
        if self.scheduler_half is not None:
            self.scheduler_half.side.reset_cache()
        return None

    # ------------------------------------------------------------ statistics

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        half = self.scheduler_half or self.worker_half
        return self._take_statistics() if half is not None and half.side.has_statistics else None

    @never_raises(None)
    def _take_statistics(self) -> KVConnectorStats | None:
        half = self.scheduler_half or self.worker_half
        data = half.take_statistics() if half is not None else None
        return KVOffloadStats(data) if data else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return KVOffloadStats(data or {})

    # ------------------------------------------------------------ for tests and tools

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Wait until every save posted so far is in L1, and on its node, or dropped. Only in the scheduler's half, never from a hook."""
        return self.scheduler_half is not None and self.scheduler_half.flush(timeout_s)
