"""`KVOffloadConnector` as vLLM loads it by module path, with halves on ports of the simulation, and watched at every hook."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from kvoffload.connector.connector import KVOffloadConnector
from kvoffload.connector.metadata import StepMetadata
from kvoffload.connector.scheduler_side import SchedulerSide
from kvoffload.connector.worker_side import WorkerSide

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorRole
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class HookWatcher(Protocol):
    """Sees each hook of the scheduler's half with what it answered; raises `OracleError`."""

    def match_begins(self, request: Request) -> None: ...

    def matched(self, request: Request, num_computed_tokens: int, answer: tuple[int | None, bool]) -> None: ...

    def allocated(self, request: Request, blocks: list[int], num_external_tokens: int) -> None: ...

    def planned(self, output: SchedulerOutput, metadata: StepMetadata) -> None: ...

    def reported(self, output: KVConnectorOutput) -> None: ...

    def finished(self, request: Request) -> None: ...

    def resets(self) -> None: ...


class SimSchedulerHalf:
    """In place of `kvoffload.connector.halves.SchedulerHalf`."""

    def __init__(self, side: SchedulerSide, bump_all: Callable[[], None]) -> None:
        self.side = side
        self.bump_all = bump_all

    def take_statistics(self) -> None: ...

    def close(self) -> None: ...


class SimWorkerHalf:
    """In place of `kvoffload.connector.halves.WorkerHalf`."""

    def __init__(self, side: WorkerSide, turn_off: Callable[[str], None]) -> None:
        self.side = side
        self.turn_off = turn_off

    def take_statistics(self) -> None: ...

    def close(self) -> None: ...


class SimConnector(KVOffloadConnector):
    """Its half and ``watcher`` are set once vLLM has made it. ``failures`` are the exceptions that hooks kept from vLLM."""

    watcher: HookWatcher

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        # Not KVOffloadConnector's own: it starts a runtime.
        KVConnectorBase_V1.__init__(self, vllm_config, role, kv_cache_config)
        self.off_reason = None
        self.scheduler_half = None
        self.worker_half = None
        self._failed_hooks = set()
        self.failures: list[Exception] = []

    def hook_failed(self, hook: str, error: Exception) -> None:
        self.failures.append(error)
        super().hook_failed(hook, error)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        self.watcher.match_begins(request)
        answer = super().get_num_new_matched_tokens(request, num_computed_tokens)
        self.watcher.matched(request, num_computed_tokens, answer)
        return answer

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        self.watcher.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        metadata = super().build_connector_meta(scheduler_output)
        assert isinstance(metadata, StepMetadata)
        self.watcher.planned(scheduler_output, metadata)
        return metadata

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self.watcher.reported(connector_output)
        super().update_connector_output(connector_output)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        answer = super().request_finished(request, block_ids)
        self.watcher.finished(request)
        return answer

    def reset_cache(self) -> bool | None:
        self.watcher.resets()
        return super().reset_cache()
