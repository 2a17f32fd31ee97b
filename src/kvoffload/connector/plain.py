"""Configuration of vLLM's as data that is the same in every process of every engine set up alike."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Mapping
from fractions import Fraction
from hashlib import blake2b
from typing import Any

from kvoffload.errors import UnsupportedError

_NO_PART = ("_name_or_path", "_commit_hash", "transformers_version")
"""Of a resolved HF config: where it came from, not what it says."""


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


def _without_origin(config: Any) -> Any:
    if isinstance(config, dict):
        return {name: _without_origin(inner) for name, inner in config.items() if name not in _NO_PART}
    return [_without_origin(inner) for inner in config] if isinstance(config, list) else config
