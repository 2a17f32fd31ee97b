"""kvoffload as a vLLM V1 connector: ``kv_connector_module_path="kvoffload.connector", kv_connector="KVOffloadConnector"``.

Importing this package is cheap; vLLM and torch are imported with the class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvoffload.connector.connector import KVOffloadConnector

__all__ = ["KVOffloadConnector"]


def __getattr__(name: str) -> object:
    if name == "KVOffloadConnector":
        from kvoffload.connector.connector import KVOffloadConnector

        return KVOffloadConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
