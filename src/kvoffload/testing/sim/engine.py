"""Real vLLM schedulers without a model: a config that was never downloaded, a KV cache of a few blocks, no tensors."""

from __future__ import annotations

import copy
import json
import logging
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvoffload.testing.sim.settings import BLOCK_SIZE, MAX_MODEL_LEN, SimSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 32,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}


@lru_cache(maxsize=1)
def _base_config() -> VllmConfig:
    """Made once per process: it takes two seconds."""
    # A simulation resets caches that are in use thousands of times; vLLM warns of each.
    logging.getLogger("vllm").setLevel(logging.ERROR)
    from vllm.config import CacheConfig, DeviceConfig, KVTransferConfig, ModelConfig, SchedulerConfig, VllmConfig

    with tempfile.TemporaryDirectory(prefix="kvoffload-sim-") as directory:
        (Path(directory) / "config.json").write_text(json.dumps(_MODEL))
        model = ModelConfig(model=directory, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=MAX_MODEL_LEN)
        return VllmConfig(
            model_config=model,
            scheduler_config=SchedulerConfig(
                max_num_seqs=8,
                max_num_batched_tokens=64,
                max_model_len=MAX_MODEL_LEN,
                enable_chunked_prefill=True,
                is_encoder_decoder=False,
                watermark=0.0,
            ),
            cache_config=CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=True),
            device_config=DeviceConfig("cpu"),
            kv_transfer_config=KVTransferConfig(
                kv_connector="SimConnector",
                kv_connector_module_path="kvoffload.testing.sim.connector",
                kv_role="kv_both",
                kv_load_failure_policy="recompute",
            ),
        )


def make_scheduler(settings: SimSettings) -> Scheduler:
    """A scheduler of vLLM's own class, with a `SimConnector` that has no ``side`` yet."""
    import torch
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    config = copy.copy(_base_config())
    config.scheduler_config = copy.copy(config.scheduler_config)
    config.cache_config = copy.copy(config.cache_config)
    scheduling = config.scheduler_config
    scheduling.max_num_seqs = settings.max_requests
    scheduling.max_num_batched_tokens = settings.max_batched_tokens
    scheduling.max_num_scheduled_tokens = settings.max_batched_tokens
    scheduling.policy = "priority" if settings.priority else "fcfs"
    scheduling.scheduler_reserve_full_isl = settings.reserve_whole_prompt
    # The CPU platform refuses asynchronous scheduling; the scheduler alone does not mind.
    scheduling.async_scheduling = settings.async_scheduling
    config.cache_config.num_gpu_blocks = settings.blocks
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=32, dtype=torch.bfloat16)
    kind = AsyncScheduler if settings.async_scheduling else Scheduler
    scheduler: Scheduler = kind(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(num_blocks=settings.blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_SIZE,
        log_stats=False,
    )
    # Model runner V2 needs Triton; how its scheduler speaks to it does not.
    scheduler.use_v2_model_runner = settings.v2_runner
    return scheduler


@lru_cache(maxsize=1)
def _block_hasher() -> Any:
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    digest = get_hash_fn_by_name("sha256")
    init_none_hash(digest)
    return get_request_block_hasher(BLOCK_SIZE, digest)


def make_request(
    request_id: str,
    tokens: list[int],
    max_tokens: int,
    *,
    salt: str | None = None,
    priority: int = 0,
    resumable: bool = False,
    kvoffload: dict[str, object] | None = None,
    skip_reading: bool = False,
) -> Request:
    """A request as the engine core would make it; ``kvoffload`` are the opt-outs in its ``kv_transfer_params``."""
    from vllm.v1.request import Request

    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        ignore_eos=True,
        skip_reading_prefix_cache=skip_reading,
        extra_args={"kv_transfer_params": {"kvoffload": kvoffload}} if kvoffload is not None else None,
    )
    return Request(
        request_id,
        list(tokens),
        params,
        None,
        arrival_time=0.0,
        cache_salt=salt,
        priority=priority,
        resumable=resumable,
        block_hasher=_block_hasher(),
    )
