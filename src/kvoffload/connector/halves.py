"""The two halves of the connector around their hooks: configuration and checks, and the runtime that each starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvoffload.config import Config
from kvoffload.connector import compat, identity, refusals
from kvoffload.connector.matcher import MatchSettings
from kvoffload.connector.metadata import WorkerHandshake
from kvoffload.connector.request_identity import RequestIdentity
from kvoffload.connector.scheduler_side import SchedulerSettings, SchedulerSide
from kvoffload.connector.statistics import SchedulerStatistics, worker_statistics
from kvoffload.connector.worker_side import WorkerSettings, WorkerSide
from kvoffload.errors import PeerError, UnsupportedError
from kvoffload.ledger import Ledger
from kvoffload.namespace import namespace_digest
from kvoffload.observe import logs, profiling
from kvoffload.runtime.hosts import HubHost, WorkerHost

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from kvoffload.runtime.worker import WrapEngine

log = logs.get_logger("connector")

GRACE_S = 0.01
"""For the answer that L1 gives at a match's deadline to reach the scheduler's thread."""
CLOSE_TIMEOUT_S = 2.5
"""Of one half; vLLM gives a worker 5 s."""


class SwitchedOff(UnsupportedError):
    """On purpose, by whoever configures."""


def load_config(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Config:
    """The settings of this engine. Raises ConfigError, and UnsupportedError with the reason why the connector stays off."""
    transfer = vllm_config.kv_transfer_config
    config = Config.load(transfer.kv_connector_extra_config if transfer is not None else {})
    logs.configure(config.log.level)
    if not config.enabled:
        raise SwitchedOff("by its settings (KVOFFLOAD_DISABLED, or enabled: false)")
    reason = refusals.why_not(vllm_config, kv_cache_config)
    if reason is not None:
        raise UnsupportedError(reason)
    return config


class SchedulerHalf:
    """SchedulerSide with its ledger and the hub."""

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
        config = load_config(vllm_config, kv_cache_config)
        for warning in refusals.warnings(vllm_config):
            log.warning(warning)
        items, unidentified = identity.namespace_items(vllm_config, kv_cache_config, config.namespace, config.model.version)
        if unidentified:
            log.info("blocks stay in this engine: not everything that determines them can be identified", what=unidentified)
        self._has_l2 = config.l2.backend != "off" and not unidentified
        if config.l2.backend != "off" and unidentified:
            log.warning("L2 off: not everything that determines blocks can be identified, so none may be shared", what=unidentified)
        profiling.start(config.profiling, {"role": "scheduler"})
        block_size = vllm_config.cache_config.block_size
        settings = SchedulerSettings(
            block_size=block_size,
            namespace=namespace_digest(items),
            match=MatchSettings(
                deadline_s=(config.l2.deadline_base_ms if self._has_l2 else config.match.deadline_ms) / 1e3,
                deadline_per_token_s=config.l2.deadline_per_1000_tokens_ms / 1e6 if self._has_l2 else 0.0,
                deadline_most_s=config.l2.deadline_most_ms / 1e3,
                grace_s=GRACE_S if self._has_l2 else 0.0,
                wait_idle_s=config.match.wait_idle_ms / 1e3,
                wait_busy_s=config.match.wait_busy_ms / 1e3,
                max_loads=config.loads.max_jobs,
                alignment_tokens=getattr(kv_cache_config, "cache_hit_alignment_tokens", None) or block_size,
            ),
            save=config.save.enabled,
            rate_window=(2 if vllm_config.scheduler_config.async_scheduling else 1) if self._has_l2 else 0,
        )
        self.ledger = Ledger(kv_cache_config.num_blocks)
        self.host = HubHost(config, self.ledger, settings.namespace if self._has_l2 else None)
        self.identity = RequestIdentity(is_shared=self._has_l2)
        self.side = SchedulerSide(self.host.hub, self.ledger, settings, self.identity.extras)
        self._statistics = SchedulerStatistics(self.side, self.host.hub, self.identity.unidentified)

    def join(self, workers: Sequence[WorkerHandshake]) -> None:
        """The workers' halves are there, or say why not. Does not wait: until all are joined the hub is not live."""
        for worker in workers:
            if worker.off_reason is not None:
                self.side.turn_off(f"rank {worker.rank}: {worker.off_reason}")
                return
        if len(workers) != 1:
            self.side.turn_off(f"{len(workers)} worker halves announced themselves: exactly one rank is supported yet")
            return
        self.host.join(workers[0].address())

    def bump_all(self) -> None:
        """No save that is under way now will count."""
        self.ledger.bump_all()

    def flush(self, timeout_s: float) -> bool:
        try:
            return self.host.hub.flush().wait_sync(timeout_s) is True
        except PeerError:
            return False

    def take_statistics(self) -> dict[str, Any] | None:
        return self._statistics.take()

    def close(self) -> None:
        self.host.close(CLOSE_TIMEOUT_S)
        self.ledger.close()


class WorkerHalf:
    """WorkerSide with its rank's runtime, which starts when vLLM's tensors are there."""

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, wrap: WrapEngine) -> None:
        self._config = load_config(vllm_config, kv_cache_config)
        profiling.start(self._config.profiling, {"role": "worker"})
        self._wrap = wrap
        self._kv_cache_config = kv_cache_config
        self._rank = vllm_config.parallel_config.rank
        self._off_reason: str | None = None
        self.settings = WorkerSettings(self._config.loads.start_deadline_ms / 1e3, self._config.match.wait_idle_ms / 1e3)
        self.side = WorkerSide(None, self.settings)
        self.host: WorkerHost | None = None

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Raises what `Rank.prepare` raises."""
        if self.host is not None:
            raise UnsupportedError("the KV cache was registered twice")
        compat.check_placement(kv_caches, self._kv_cache_config)
        self.host = WorkerHost.start(self._config, self._rank, kv_caches, self._kv_cache_config.num_blocks, self._wrap)
        self.side = WorkerSide(self.host.runtime, self.settings)

    def handshake(self) -> WorkerHandshake:
        if self.host is None or self._off_reason is not None:
            return WorkerHandshake(self._rank, off_reason=self._off_reason or "vLLM registered no KV cache")
        address = self.host.address
        return WorkerHandshake(self._rank, address.name, address.pid, address.token)

    def turn_off(self, reason: str) -> None:
        self._off_reason = self._off_reason or reason
        if self.host is not None:
            self.host.turn_off(reason)

    def take_statistics(self) -> dict[str, Any] | None:
        return worker_statistics(self.side, self.host)

    def close(self) -> None:
        if self.host is not None:
            self.host.close(CLOSE_TIMEOUT_S)
