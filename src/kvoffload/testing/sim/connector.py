"""A connector that vLLM loads by module path and whose scheduler half is the real `SchedulerSide`, on ports of the simulation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from kvoffload.connector.metadata import StepMetadata
from kvoffload.connector.scheduler_side import SchedulerSide

if TYPE_CHECKING:
    import torch
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
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


class SimConnector(KVConnectorBase_V1):
    """Unlike `KVOffloadConnector` it lets every exception through: what fails in a simulation is to be seen.

    ``side`` and ``watcher`` are set once vLLM has made it; the worker half is not vLLM's here, but the simulation's.
    """

    side: SchedulerSide
    watcher: HookWatcher

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    def on_new_request(self, request: Request) -> None:
        self.side.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        self.watcher.match_begins(request)
        answer = self.side.get_num_new_matched_tokens(request, num_computed_tokens)
        self.watcher.matched(request, num_computed_tokens, answer)
        return answer

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self.side.update_state_after_alloc(request, blocks, num_external_tokens)
        self.watcher.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        metadata = self.side.build_connector_meta(scheduler_output)
        self.watcher.planned(scheduler_output, metadata)
        return metadata

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self.watcher.reported(connector_output)
        self.side.update_connector_output(connector_output)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self.side.request_finished(request)
        self.watcher.finished(request)
        return False, None

    def reset_cache(self) -> bool | None:
        self.watcher.resets()
        self.side.reset_cache()
        return None

    # The worker half of this class is never made.

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        raise NotImplementedError

    def wait_for_layer_load(self, layer_name: str) -> None:
        raise NotImplementedError

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any) -> None:
        raise NotImplementedError

    def wait_for_save(self) -> None:
        raise NotImplementedError
