"""vLLM's plugin entry point: makes ``--kv-transfer-config '{"kv_connector": "KVOffloadConnector", ...}'`` work without a module path."""

from __future__ import annotations

NAME = "KVOffloadConnector"


def register() -> None:
    """Called by vLLM in each of its processes, more than once in some."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, "kvoffload.connector", NAME)
