"""From a node's address to the client that speaks to it."""

from __future__ import annotations

from urllib.parse import urlsplit

from kvoffload.config import L2Settings
from kvoffload.errors import UnsupportedError
from kvoffload.l2.node import L2Node
from kvoffload.l2.ring import NodeAddress

INFINISTORE_PORT = 12345
"""What AIBrix's controller gives its servers; the server's own default is another, 22345."""


def prepare(settings: L2Settings) -> None:
    """Whatever takes seconds, once per machine: the compiled loops of InfiniStore's client. Not on a loop."""
    if settings.backend == "infinistore" and settings.transport == "tcp":
        from kvoffload.l2.infinistore_native import loops

        loops()


def make_node(address: NodeAddress, settings: L2Settings, value_bytes: int) -> L2Node:
    """The client of the node at ``address``, not connected yet; ``value_bytes``: header and payload of one rank's part of a block.

    Raises UnsupportedError where what it needs is not installed, or the URL is of no kind that is known.
    """
    parts = urlsplit(address.url)
    connections, timeout_s = settings.connections, settings.connect_timeout_ms / 1e3
    try:
        if parts.scheme == "infinistore" and parts.hostname:
            from kvoffload.l2.infinistore_tcp import InfiniStoreTcpNode

            return InfiniStoreTcpNode(
                address.name,
                parts.hostname,
                parts.port or INFINISTORE_PORT,
                value_bytes=value_bytes,
                connections=connections,
                connect_timeout_s=timeout_s,
            )
        if parts.scheme in ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster"):
            from kvoffload.l2.redis import RedisNode

            return RedisNode(address.name, address.url, value_bytes=value_bytes, connections=connections, connect_timeout_s=timeout_s)
    except ImportError as error:
        raise UnsupportedError(f"node {address.name} needs {error.name}: pip install kvoffload[l2]") from error
    raise UnsupportedError(f"node {address.name}: its URL's scheme {parts.scheme!r} is not one of infinistore, redis, rediss, unix")
