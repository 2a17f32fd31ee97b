"""From a node's address to the client that speaks to it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from kvoffload.config import L2Settings
from kvoffload.errors import UnsupportedError
from kvoffload.l2.node import L2Node
from kvoffload.l2.ring import NodeAddress

if TYPE_CHECKING:
    from kvoffload.l2.infinistore_rdma import InfiniStoreRdmaNode
    from kvoffload.l2.rdma_memory import Shared as SharedMemory

INFINISTORE_PORT = 12345
"""What AIBrix's controller gives its servers; the server's own default is another, 22345."""


def prepare(settings: L2Settings) -> None:
    """Whatever takes long: imports, and once per machine compiling the loops that move values. Not on a loop.

    Raises UnsupportedError where what is needed is not installed.
    """
    try:
        if settings.membership.url is not None or settings.backend == "redis":
            import redis.asyncio  # noqa: F401

            import kvoffload.l2.redis
        if settings.backend == "redis":
            from kvoffload.l2.resp import compiled_reader

            compiled_reader()
        if settings.backend == "infinistore" and settings.transport == "tcp":
            import kvoffload.l2.infinistore_tcp  # noqa: F401
            from kvoffload.l2.infinistore_native import loops

            loops()
    except ImportError as error:
        raise UnsupportedError(f"l2.backend = {settings.backend} needs {error.name}: pip install kvoffload[l2]") from error


def make_node(address: NodeAddress, settings: L2Settings, value_bytes: int, segments: Sequence[SharedMemory] = ()) -> L2Node:
    """The client of the node at ``address``, not connected yet; ``value_bytes``: header and payload of one rank's part of a block.

    ``segments``, a rank's each, are where all values will lie; only RDMA needs to know. Raises UnsupportedError where what it needs is
    not installed, or the URL is of no kind that is known.
    """
    parts = urlsplit(address.url)
    connections, timeout_s = settings.connections, settings.connect_timeout_ms / 1e3
    try:
        if parts.scheme == "infinistore" and parts.hostname and settings.transport == "rdma":
            return _rdma_node(address.name, parts.hostname, parts.port or INFINISTORE_PORT, settings, value_bytes, segments)
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


def _rdma_node(
    name: str, host: str, port: int, settings: L2Settings, value_bytes: int, segments: Sequence[SharedMemory]
) -> InfiniStoreRdmaNode:
    """One connection over one device, the nearest to where this process may run: the first rank's, where there are several."""
    from kvoffload.l2.infinistore_rdma import InfiniStoreRdmaNode, RdmaSettings
    from kvoffload.l2.rdma_devices import choose_device, devices_here, numa_node_of_cpus, parse_devices

    devices = parse_devices(settings.devices) or devices_here()
    device = choose_device(devices, 0, len(segments), numa_node_of_cpus(os.sched_getaffinity(0)))
    if device is None:
        raise UnsupportedError(f"node {name}: this machine has no RDMA device (see /sys/class/infiniband): set l2.transport to tcp")
    chosen = RdmaSettings(device, settings.link_type, settings.ib_port, settings.connect_timeout_ms / 1e3)
    return InfiniStoreRdmaNode(name, host, port, value_bytes=value_bytes, segments=segments, settings=chosen)
