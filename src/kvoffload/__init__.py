"""kvoffload: the KV cache of vLLM, kept in host memory and brought back instead of being computed again.

Public names are imported when first used: vLLM's API server and plugin loader import this package and need none of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvoffload.config import Config
    from kvoffload.errors import (
        CapacityError,
        ConfigError,
        CopyError,
        InternalError,
        KVOffloadError,
        LayoutError,
        MisuseError,
        PeerError,
        UnsupportedError,
    )
    from kvoffload.standalone import Hit, Runtime, Saved, open_runtime

__version__ = "0.1.0"

__all__ = [
    "CapacityError",
    "Config",
    "ConfigError",
    "CopyError",
    "Hit",
    "InternalError",
    "KVOffloadError",
    "LayoutError",
    "MisuseError",
    "PeerError",
    "Runtime",
    "Saved",
    "UnsupportedError",
    "__version__",
    "open_runtime",
]

_HOMES = {"Config": "kvoffload.config"} | dict.fromkeys(("Hit", "Runtime", "Saved", "open_runtime"), "kvoffload.standalone")

if not TYPE_CHECKING:  # which is to find misspelt names

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_HOMES.get(name, "kvoffload.errors")), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
