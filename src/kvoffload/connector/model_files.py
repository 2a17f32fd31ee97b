"""The weights and the code that vLLM takes for a model: which files, and what is in them."""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvoffload.connector import weights
from kvoffload.connector.plain import config_digest, plain
from kvoffload.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.load import LoadConfig
    from vllm.config.model import ModelConfig

_LOCAL_FORMATS = frozenset(
    "auto hf safetensors fastsafetensors instanttensor pt mistral sharded_state gguf bitsandbytes".split()  # noqa: SIM905
)
_ONLY_HOW = frozenset({"enable_multithread_load", "num_threads", "enable_weights_track"})
"""Of the loader's extra settings: how it reads the files, not which."""

_OTHER_REPOSITORIES = ("audio_model_id", "text_model_id")
"""Fields of HF configs (Ultravox) that name repositories whose weights vLLM loads too, whatever their main branch is."""


def model_weights(model: ModelConfig, load: LoadConfig) -> Any:
    """What identifies the weights. Raises UnsupportedError and OSError.

    The way of loading counts, for it chooses among files that lie side by side. Of a directory all weights files count; of a hub's
    commit the names of those that are loaded, for what else was downloaded differs from machine to machine.
    """
    if load.load_format == "dummy":
        raise UnsupportedError("the weights are random (load_format is dummy)")
    if load.load_format == "npcache":
        raise UnsupportedError("the weights come from a converted copy that may be older than the files (load_format is npcache)")
    if model.model_weights or load.load_format not in _LOCAL_FORMATS:
        raise UnsupportedError(f"the weights do not come from local files or the hub (load_format is {load.load_format})")
    found = _files(model.model, model.revision, load, with_code=model.trust_remote_code)
    others = [getattr(model.hf_config, field, None) for field in _OTHER_REPOSITORIES]
    return {
        "loading": _loading(load),
        **found,
        "others": [None if name is None else _files(str(name), None, load, with_code=False) for name in others],
    }


def model_code(model: ModelConfig) -> Any:
    """What identifies the model's implementation, beside vLLM's version. Raises UnsupportedError."""
    own = plain(getattr(model.hf_config, "auto_map", None)) if model.trust_remote_code else None
    if "--" in json.dumps(own):
        raise UnsupportedError("the model's code comes from another repository (auto_map)")
    return [
        str(model.model_impl),
        plain(model.model_class_overrides),
        model.disable_sliding_window,
        _implementation(model),
        own,
        _code_commit(model),
        _transformers() if model.using_transformers_backend() else None,
    ]


def item_processing(model: ModelConfig) -> Any:
    """What makes an encoder's input of a media item: a library, and code and settings beside the weights.

    Raises UnsupportedError and OSError.
    """
    return [_transformers(), model.trust_remote_code, _tokenizer(model)]


def draft_model(vllm_config: VllmConfig) -> Any:
    """What identifies a draft model, whose KV lies beside the model's. Raises UnsupportedError and OSError."""
    draft = vllm_config.speculative_config
    if draft is None:
        return None
    found = [draft.method, draft.num_speculative_tokens]
    if draft.draft_model_config is None or draft.draft_model_config is vllm_config.model_config:
        return found
    model = draft.draft_model_config
    return [
        *found,
        config_digest(model.hf_config),
        model_weights(model, draft.draft_load_config or vllm_config.load_config),
        str(model.dtype),
        [model.quantization, plain(model.quantization_config)],
    ]


def _loading(load: LoadConfig) -> Any:
    extra = {name: value for name, value in plain(load.model_loader_extra_config).items() if name not in _ONLY_HOW}
    if "/" in str(extra.get("pattern", "")):
        raise UnsupportedError(f"the weights may lie outside the model's directory (pattern is {extra['pattern']!r})")
    return [
        load.load_format,
        sorted([load.ignore_patterns] if isinstance(load.ignore_patterns, str) else load.ignore_patterns),
        extra,
        load.safetensors_load_strategy == "torchao",  # the only one that makes other tensors of the same file
    ]


def _files(name: str, revision: str | None, load: LoadConfig, *, with_code: bool) -> dict[str, Any]:
    from vllm import envs

    path = Path(name)
    if path.is_file():
        return {"file": weights.fingerprint_file(path).hex()}
    if path.is_dir():
        digest = weights.fingerprint_directory(path, with_code=with_code)
        if digest is None:
            raise UnsupportedError(f"there are no weights files in {path}")
        return {"files": digest}
    if envs.VLLM_USE_MODELSCOPE:
        raise UnsupportedError(f"{name!r} comes from ModelScope: download it, and give its directory as the model")
    snapshot = weights.hub_snapshot(name, revision, load.download_dir)
    if snapshot is None:
        raise UnsupportedError(f"{name!r} is neither a directory nor in this machine's hub cache")
    return {"hub": [name, snapshot.name], "names": weights.chosen_names(snapshot, load.load_format)}


def _implementation(model: ModelConfig) -> Any:
    """The model's class, with its package's version, where a plugin or the user brings it; None where vLLM does."""
    entry = model.registry.models.get(model._model_info.architecture)
    found = getattr(entry, "model_cls", None)
    module = str(getattr(entry, "module_name", None) or getattr(found, "__module__", ""))
    package = module.partition(".")[0]
    if package in ("", "vllm"):
        return None
    versions = {name: metadata.version(name) for name in metadata.packages_distributions().get(package, ())}
    if not versions:
        raise UnsupportedError(f"the model's implementation ({module}) is of no installed package, whose version would tell it apart")
    return [module, getattr(entry, "class_name", None) or getattr(found, "__qualname__", None), versions]


def _code_commit(model: ModelConfig) -> Any:
    """A repository's code is of the weights' commit, unless the user names another. Code in a directory counts as its files."""
    revision = model.code_revision
    if revision is None or not model.trust_remote_code or Path(model.model).exists() or re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    commit = weights.hub_commit(model.model, revision, None)
    if commit is None:
        raise UnsupportedError(f"the model's code is of revision {revision!r}, which may move: give its commit as --code-revision")
    return commit


def _tokenizer(model: ModelConfig) -> Any:
    """Some tokenizers process images too; the model's own is known by its files already."""
    if model.tokenizer is None or model.tokenizer == model.model:
        return None
    path = Path(model.tokenizer)
    if path.is_dir():
        return weights.fingerprint_settings(path)
    commit = weights.hub_commit(model.tokenizer, model.tokenizer_revision, None)
    if commit is None:
        raise UnsupportedError(f"the tokenizer {model.tokenizer!r} is neither a directory nor in this machine's hub cache")
    return [model.tokenizer, commit]


def _transformers() -> str:
    import transformers

    return str(transformers.__version__)
