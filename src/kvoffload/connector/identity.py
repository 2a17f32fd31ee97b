"""The namespace: everything beside a prompt that decides the bytes of its KV blocks.

The same in every process of an engine and in every engine set up alike; nothing in it depends on a process, a path or a run.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Mapping
from fractions import Fraction
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvoffload.connector import compat, weights
from kvoffload.connector.request_identity import NOTHING, UNIDENTIFIED, RequestExtras, RequestIdentity
from kvoffload.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.cache import CacheConfig
    from vllm.config.load import LoadConfig
    from vllm.config.model import ModelConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["NOTHING", "UNIDENTIFIED", "RequestExtras", "RequestIdentity", "config_digest", "namespace_items", "plain"]

FORMAT_VERSION = 1
"""Of keys and of the blocks' bytes in a slot: raise it when either changes."""

_NO_PART = ("_name_or_path", "_commit_hash", "transformers_version")
"""Of a resolved HF config: where it came from, not what it says."""
_LOCAL_FORMATS = frozenset(
    "auto hf safetensors fastsafetensors instanttensor pt npcache mistral sharded_state gguf bitsandbytes".split()  # noqa: SIM905
)
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
    items.add("model code", lambda: _model_code(model))
    items.add("model length", lambda: _model_length(model))
    items.add("weights", lambda: _weights(model, vllm_config.load_config))
    items.add("model version", lambda: model_version)
    items.add("weight updates", lambda: _weight_updates(vllm_config))
    items.add("dtype", lambda: str(model.dtype))
    items.add("quantization", lambda: [model.quantization, plain(model.quantization_config)])
    items.add("lora", lambda: _lora(vllm_config))
    items.add("multimodal", lambda: _multimodal(model, cache))
    items.add("draft", lambda: _draft(vllm_config))
    items.add("additional config", lambda: plain(vllm_config.additional_config) or None)
    items.add("kv dtype", lambda: [vllm_config.cache_config.cache_dtype, plain(vllm_config.cache_config.kv_cache_dtype_skip_layers)])
    items.add("kv layout", lambda: kv_cache_config.kv_cache_layout)
    items.add("kv layers", lambda: [_group(group) for group in kv_cache_config.kv_cache_groups])
    items.add("attention", lambda: [_attention(vllm_config, group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups])
    items.add("attention config", lambda: plain(vllm_config.attention_config))
    items.add("parallel", lambda: _parallel(vllm_config))
    items.add("user namespace", lambda: user_namespace)
    return items.found, items.unidentified


def config_digest(hf_config: Any) -> str:
    """A digest of the model's resolved HF config, after overrides. Raises UnsupportedError for values without a plain form."""
    text = json.dumps(_without_origin(plain(hf_config.to_dict())), sort_keys=True, separators=(",", ":"))
    return blake2b(text.encode(), digest_size=32).hexdigest()


def plain(value: Any) -> Any:
    """``value`` as JSON-like data that is the same in every process. Raises UnsupportedError for what has no such form."""
    match value:
        case enum.Enum():
            return value.name
        case None | bool() | int() | float() | str():
            return value
        case bytes():
            return value.hex()
        case Fraction():
            return str(value)
        case Mapping():
            return {str(key): plain(inner) for key, inner in value.items()}
        case list() | tuple():
            return [plain(inner) for inner in value]
        case set() | frozenset():
            return sorted((plain(inner) for inner in value), key=str)
    if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if type(value).__module__.startswith("vllm.") and vars(value):
        return {"type": type(value).__name__, **{name: plain(inner) for name, inner in vars(value).items()}}
    if callable(getattr(value, "to_dict", None)):
        return plain(value.to_dict())
    raise UnsupportedError(f"a value of type {type(value).__name__} has no form that other processes would share")


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


def _without_origin(config: Any) -> Any:
    if isinstance(config, dict):
        return {name: _without_origin(inner) for name, inner in config.items() if name not in _NO_PART}
    return [_without_origin(inner) for inner in config] if isinstance(config, list) else config


def _model_code(model: ModelConfig) -> Any:
    if model.trust_remote_code and "--" in json.dumps(plain(getattr(model.hf_config, "auto_map", None) or {})):
        raise UnsupportedError("the model's code comes from another repository (auto_map)")
    return [str(model.model_impl), plain(model.model_class_overrides), model.disable_sliding_window, model.code_revision]


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


def _weights(model: ModelConfig, load: LoadConfig) -> Any:
    if load.load_format == "dummy":
        raise UnsupportedError("the weights are random (load_format is dummy)")
    if model.model_weights or load.load_format not in _LOCAL_FORMATS:
        raise UnsupportedError(f"the weights do not come from local files or the hub (load_format is {load.load_format})")
    path = Path(model.model)
    if path.is_file():
        return {"file": weights.fingerprint_file(path).hex()}
    if path.is_dir():
        digest = weights.fingerprint_directory(path, with_code=model.trust_remote_code)
        if digest is None:
            raise UnsupportedError(f"there are no weights files in {path}")
        return {"files": digest}
    commit = weights.hub_commit(model.model, model.revision, load.download_dir)
    if commit is None:
        raise UnsupportedError(f"{model.model!r} is neither a directory nor in this machine's hub cache")
    return {"hub": [model.model, commit]}


def _weight_updates(vllm_config: VllmConfig) -> None:
    if vllm_config.weight_transfer_config is not None:
        raise UnsupportedError("weights may be replaced at run time (weight_transfer_config)")


def _lora(vllm_config: VllmConfig) -> Any:
    lora = vllm_config.lora_config
    return None if lora is None else [str(lora.lora_dtype), plain(lora.target_modules)]


def _multimodal(model: ModelConfig, cache: CacheConfig) -> Any:
    config = model.multimodal_config
    if config is not None and config.mm_processor_cache_gb == 0 and not cache.enable_prefix_caching:
        # vLLM then numbers the items of each process instead of hashing them.
        raise UnsupportedError("multimodal items have no hashes (mm_processor_cache_gb is 0 and prefix caching is off)")
    return None if config is None else {name: plain(getattr(config, name, None)) for name in _MULTIMODAL}


def _draft(vllm_config: VllmConfig) -> Any:
    draft = vllm_config.speculative_config
    if draft is None:
        return None
    found = [draft.method, draft.num_speculative_tokens]
    if draft.draft_model_config is None or draft.draft_model_config is vllm_config.model_config:
        return found
    model = draft.draft_model_config
    return [*found, config_digest(model.hf_config), _weights(model, draft.draft_load_config or vllm_config.load_config)]


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
