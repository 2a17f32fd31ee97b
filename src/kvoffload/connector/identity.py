"""The namespace: everything beside a prompt that decides the bytes of its KV blocks.

The same in every process of an engine and in every engine set up alike; nothing in it depends on a process, a path or a run.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvoffload.connector import compat, environment, model_files
from kvoffload.connector.plain import config_digest, plain
from kvoffload.connector.request_identity import NOTHING, UNIDENTIFIED, RequestExtras, RequestIdentity
from kvoffload.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.cache import CacheConfig
    from vllm.config.model import ModelConfig
    from vllm.config.multimodal import MultiModalConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["NOTHING", "UNIDENTIFIED", "RequestExtras", "RequestIdentity", "config_digest", "namespace_items", "plain"]

FORMAT_VERSION = 1
"""Of keys and of the blocks' bytes in a slot: raise it when either changes."""

_MULTIMODAL = (
    "mm_processor_kwargs",
    "media_io_kwargs",
    "mm_encoder_attn_backend",
    "mm_encoder_attn_dtype",
    "video_pruning_rate",
    "video_pruning_method",
    "mm_device_do_normalize",
    "language_model_only",
    "interleave_mm_strings",
)
"""Settings that change what the encoder makes of the same item."""

_LORA = ("enable_mixed_moe_lora_format", "enable_moe_shared_loras", "enable_tower_connector_lora")
"""Settings that change what is made of the same adapter files."""


def namespace_items(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, user_namespace: str = "", model_version: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """JSON-like items for `kvoffload.keys.namespace_digest`, and what could not be identified.

    With anything unidentified the blocks may live in this engine's own L1, and must never be shared with another engine. Reads
    weights files (samples of them), so call it once, at start.
    """
    items = _Items()
    model, cache = vllm_config.model_config, vllm_config.cache_config
    items.add("format", lambda: FORMAT_VERSION)
    items.add("vllm", _minor)
    items.add("model config", lambda: config_digest(model.hf_config))
    items.add("model code", lambda: model_files.model_code(model))
    items.add("model length", lambda: _model_length(model))
    items.add("weights", lambda: model_files.model_weights(model, vllm_config.load_config))
    items.add("model version", lambda: model_version)
    items.add("weight updates", lambda: _weight_updates(vllm_config))
    items.add("dtype", lambda: str(model.dtype))
    items.add("quantization", lambda: [model.quantization, plain(model.quantization_config)])
    items.add("lora", lambda: _lora(vllm_config))
    items.add("multimodal", lambda: _multimodal(model, cache))
    items.add("encoder", lambda: _encoder(vllm_config))
    items.add("draft", lambda: model_files.draft_model(vllm_config))
    items.add("additional config", lambda: plain(vllm_config.additional_config) or None)
    items.add("kv dtype", lambda: [vllm_config.cache_config.cache_dtype, plain(vllm_config.cache_config.kv_cache_dtype_skip_layers)])
    items.add("kv layout", lambda: kv_cache_config.kv_cache_layout)
    items.add("kv layers", lambda: [_group(group) for group in kv_cache_config.kv_cache_groups])
    items.add("attention", lambda: [_attention(vllm_config, group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups])
    items.add("attention config", lambda: plain(vllm_config.attention_config))
    items.add("kernels", lambda: environment.kernels(vllm_config))
    items.add("environment", environment.variables)
    items.add("prefix cache", lambda: _prefix_hashes(cache))
    items.add("parallel", lambda: _parallel(vllm_config))
    items.add("user namespace", lambda: user_namespace)
    return items.found, items.unidentified


class _Items:
    """Collects items; one that cannot be told is named, and does not keep the others from being told."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self.unidentified: list[str] = []

    def add(self, name: str, tell: Any) -> None:
        try:
            self.found[name] = tell()
        except (UnsupportedError, OSError) as error:
            self.found[name] = "unidentified"
            self.unidentified.append(f"{name}: {error}")


def _minor() -> str:
    version = compat.vllm_version()
    minor = compat.minor_version(version)
    return f"{minor[0]}.{minor[1]}" if minor else version


def _model_length(model: ModelConfig) -> int | None:
    """Some position encodings choose their scale by the longest prompt allowed, so it counts, but only with those."""

    def scales(config: Any) -> bool:
        if isinstance(config, dict):
            kind = config.get("rope_type", config.get("type", "default"))
            return (isinstance(kind, str) and kind != "default") or any(scales(inner) for inner in config.values())
        return False

    text = plain(model.hf_text_config.to_dict())
    rope = {name: text.get(name) for name in ("rope_parameters", "rope_scaling")}
    return model.max_model_len if scales(rope) else None


def _weight_updates(vllm_config: VllmConfig) -> None:
    if vllm_config.weight_transfer_config is not None:
        raise UnsupportedError("weights may be replaced at run time (weight_transfer_config)")


def _prefix_hashes(cache: CacheConfig) -> None:
    """vLLM's own hits are saved too, under keys of their tokens: they must be those of the tokens."""
    if cache.enable_prefix_caching and str(cache.prefix_caching_hash_algo).startswith("xxhash"):
        raise UnsupportedError(
            f"vLLM's prefix cache is keyed by a hash that collides at will (prefix_caching_hash_algo is {cache.prefix_caching_hash_algo}):"
            " with sha256 blocks are shared"
        )


def _lora(vllm_config: VllmConfig) -> Any:
    lora = vllm_config.lora_config
    if lora is None:
        return None
    targets = None if lora.target_modules is None else sorted(lora.target_modules)
    return [str(lora.lora_dtype), targets, {name: getattr(lora, name, None) for name in _LORA}]


def _multimodal(model: ModelConfig, cache: CacheConfig) -> Any:
    config = model.multimodal_config
    if config is None:
        return None
    if config.mm_processor_cache_gb == 0 and not cache.enable_prefix_caching:
        # vLLM then numbers the items of each process instead of hashing them.
        raise UnsupportedError("multimodal items have no hashes (mm_processor_cache_gb is 0 and prefix caching is off)")
    return {
        **{name: plain(getattr(config, name, None)) for name in _MULTIMODAL},
        "scales": _encoder_scales(config),
        "processing": model_files.item_processing(model),
    }


def _encoder(vllm_config: VllmConfig) -> None:
    transfer = vllm_config.ec_transfer_config
    if transfer is not None and transfer.is_ec_consumer:
        raise UnsupportedError("media items may be encoded by another engine, whose settings are not known here (ec_transfer_config)")


def _encoder_scales(config: MultiModalConfig) -> str | None:
    if config.mm_encoder_attn_dtype != "fp8":
        return None
    if config.mm_encoder_fp8_scale_path is None:
        raise UnsupportedError(
            "the encoder's fp8 scales follow what it has seen (mm_encoder_attn_dtype is fp8): fix them with mm_encoder_fp8_scale_path"
        )
    return blake2b(Path(config.mm_encoder_fp8_scale_path).read_bytes(), digest_size=32).hexdigest()


def _group(group: Any) -> Any:
    return [
        list(group.layer_names),
        type(group.kv_cache_spec).__name__,
        plain(group.kv_cache_spec),
        group.kv_cache_spec.page_size_bytes,
    ]


def _attention(vllm_config: VllmConfig, spec: Any) -> Any:
    inner = getattr(spec, "kv_cache_specs", None)
    if inner is None:
        return compat.attention_identity(vllm_config, spec)
    return {name: compat.attention_identity(vllm_config, one) for name, one in inner.items()}


def _parallel(vllm_config: VllmConfig) -> dict[str, int]:
    parallel = vllm_config.parallel_config
    return {
        "tensor": parallel.tensor_parallel_size,
        "pipeline": parallel.pipeline_parallel_size,
        "prefill context": parallel.prefill_context_parallel_size,
        "decode context": parallel.decode_context_parallel_size,
    }
