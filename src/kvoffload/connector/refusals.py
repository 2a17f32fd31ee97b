"""The engines that kvoffload does not serve (yet), each with a reason that its user understands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvoffload.connector import compat

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


def why_not(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig | None) -> str | None:
    """Why the connector must stay off for this engine, every reason in one line, or None. The same in both halves."""
    version = compat.check_version()
    if version is not None:
        return version  # what the other checks read may not exist there
    reasons = [*_connector(vllm_config), *_parallelism(vllm_config), *_model(vllm_config), *_cache(kv_cache_config)]
    return "; ".join(reasons) or None


def warnings(vllm_config: VllmConfig) -> list[str]:
    """What the user should know although the connector works."""
    found = []
    transfer = vllm_config.kv_transfer_config
    policy = None if transfer is None else transfer.kv_load_failure_policy
    if policy is not None and policy != "recompute":
        found.append(
            f'kv_load_failure_policy is "{policy}": a request whose blocks cannot be loaded would end with finish_reason "error" '
            'instead of being computed. Set "kv_load_failure_policy": "recompute" in --kv-transfer-config.'
        )
    if not vllm_config.cache_config.enable_prefix_caching:
        found.append(
            "prefix caching is off (enable_prefix_caching=False): what kvoffload loads serves the one request it was loaded for, "
            "and every further one loads it again."
        )
    return found


def _connector(vllm_config: VllmConfig) -> Iterator[str]:
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        yield "no kv_transfer_config names a connector"
        return
    if transfer.kv_connector == "MultiConnector" or "connectors" in transfer.kv_connector_extra_config:
        yield "several connectors in one engine (MultiConnector) are not supported: whose blocks a request gets cannot be proven"
    if transfer.kv_role != "kv_both":
        yield f'kv_role is "{transfer.kv_role}": prefill and decode roles are not supported, use "kv_both"'
    if vllm_config.cache_config.kv_offloading_size is not None:
        yield "kv_offloading_size turns on vLLM's own offloading connector: use either that or kvoffload"


def _parallelism(vllm_config: VllmConfig) -> Iterator[str]:
    parallel = vllm_config.parallel_config
    for name, size in (
        ("tensor_parallel_size", parallel.tensor_parallel_size),
        ("pipeline_parallel_size", parallel.pipeline_parallel_size),
        ("data_parallel_size", parallel.data_parallel_size),
        ("prefill_context_parallel_size", parallel.prefill_context_parallel_size),
        ("decode_context_parallel_size", parallel.decode_context_parallel_size),
        ("nnodes", parallel.nnodes),
    ):
        if size > 1:
            yield f"{name} is {size}: several ranks are not supported yet"
    if parallel.enable_elastic_ep:
        yield "enable_elastic_ep: an engine whose ranks come and go is not supported"


def _model(vllm_config: VllmConfig) -> Iterator[str]:
    model = vllm_config.model_config
    if model.runner_type != "generate":
        yield f"runner {model.runner_type!r}: only models that generate text are supported"
    if model.is_encoder_decoder:
        yield "encoder-decoder models are not supported"
    if model.is_attention_free:
        yield "the model has no attention, so it has no KV cache"
    elif model.is_hybrid:
        yield "hybrid models (attention with Mamba or linear attention) are not supported yet"
    if model.enable_sleep_mode and not compat.tells_of_sleep():
        yield "enable_sleep_mode: this vLLM does not tell connectors when the KV cache is taken away"
    if vllm_config.speculative_config is not None:
        # By reading, n-gram drafts fit the save rule (unverified tokens are never counted); draft models keep KV of their own that
        # lags by one token, which a block of ours does not tell. Neither was run, so neither is promised.
        yield f"speculative decoding ({vllm_config.speculative_config.method}) is not supported yet"
    if vllm_config.diffusion_config is not None:
        yield "diffusion language models rewrite the KV of tokens that were already there"
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        yield "kv_sharing_fast_prefill: layers that skip the prefill leave blocks incomplete"
    shared = getattr(model.hf_text_config, "num_kv_shared_layers", 0) or 0
    if shared:
        yield f"{shared} layers share the KV of other layers (num_kv_shared_layers), which is not supported yet"


def _cache(kv_cache_config: KVCacheConfig | None) -> Iterator[str]:
    if kv_cache_config is None:
        yield "vLLM gave no kv_cache_config"
        return
    groups = kv_cache_config.kv_cache_groups
    if not groups:
        yield "the model has no KV cache"
    elif len(groups) > 1:
        yield f"the model has {len(groups)} KV cache groups: hybrid models are not supported yet"
    for group in groups:
        if group.is_eagle_group:
            yield "a KV cache group belongs to a draft model"
        if group.host_resident or not group.enable_kv_transfer or group.role.value != "default":
            yield f"a KV cache group has the special role {group.role.value!r}"
        yield from dict.fromkeys(_spec(group.kv_cache_spec))


def _spec(spec: Any) -> Iterator[str]:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, UniformTypeKVCacheSpecs

    if isinstance(spec, UniformTypeKVCacheSpecs):
        for inner in spec.kv_cache_specs.values():
            yield from _spec(inner)
        return
    # Exactly these: a subclass means a cache with rules of its own. MLA's latent pages are opaque bytes like any other.
    if type(spec) not in (FullAttentionSpec, MLAAttentionSpec):
        yield f"layers with {type(spec).__name__} are not supported: only full attention is"
        return
    if spec.sliding_window is not None or spec.attention_chunk_size is not None:
        yield "layers with a sliding window or chunked attention are not supported yet"
    if spec.non_causal:
        yield "layers that attend to later tokens (non_causal): a block would depend on what comes after it"
    if spec.tokens_per_state != 1 or getattr(spec, "model_version", None) is not None:
        yield "layers that keep compressed states instead of one entry per token are not supported"
