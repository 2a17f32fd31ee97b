"""Real vLLM configs and requests for tests, made without an engine. vLLM is imported when they are asked for, not at collection."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

CONNECTOR = {
    "kv_connector": "ExampleConnector",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}
"""A connector of vLLM's own: these tests need a config that names one, and none of ours."""


def make_vllm_config(model: Path | str, **arguments: Any) -> Any:
    """A `VllmConfig` as the engine makes it of its arguments (10 s the first time in a process, 10 ms afterwards)."""
    from vllm.engine.arg_utils import EngineArgs

    defaults = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "block_size": 32,
        "max_model_len": 2048,
        "kv_transfer_config": dict(CONNECTOR),
    }
    return EngineArgs(model=str(model), **{**defaults, **arguments}).create_engine_config()


def make_kv_cache_config(vllm_config: Any, blocks: int = 64, **spec: Any) -> Any:
    """The cache config of a model whose layers are all full attention; ``spec`` overrides fields of `FullAttentionSpec`."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    model = vllm_config.model_config
    fields = {
        "block_size": vllm_config.cache_config.block_size,
        "num_kv_heads": model.get_num_kv_heads(vllm_config.parallel_config),
        "head_size": model.get_head_size(),
        "dtype": model.dtype,
    }
    layers = [f"model.layers.{index}.self_attn.attn" for index in range(model.hf_text_config.num_hidden_layers)]
    group = KVCacheGroupSpec(layer_names=layers, kv_cache_spec=FullAttentionSpec(**{**fields, **spec}))
    return KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[group], kv_cache_layout="LBHNC")


def make_request(tokens: list[int] | None, request_id: str = "r", **arguments: Any) -> Any:
    """A `Request` as vLLM's scheduler holds it."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    return Request(request_id, tokens, SamplingParams(max_tokens=4), None, **arguments)
