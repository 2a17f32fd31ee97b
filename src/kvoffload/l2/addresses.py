"""Where nodes are: hosts and ports, and the nodes that the settings name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import IPv6Address, ip_address
from urllib.parse import SplitResult, urlsplit

from kvoffload.errors import ConfigError
from kvoffload.l2.ring import NodeAddress

DEFAULT_PORTS = {"infinistore": 12345, "redis": 6379}
"""By ``l2.backend``. 12345 is what AIBrix's controller gives InfiniStore; the server's own default is another, 22345."""

_REDIS = ("redis", "rediss", "redis+cluster", "rediss+cluster")
_HOST = re.compile(r"(?!-)[A-Za-z0-9._-]{1,253}")


def host_port(host: str, port: int) -> str:
    """As in URLs: ``10.0.0.1:12345``, ``[::1]:12345``."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def node_url(backend: str, host: str, port: int) -> str:
    """``infinistore://host:port`` or ``redis://host:port``; ``backend`` as in ``l2.backend``."""
    return f"{backend}://{host_port(host, port)}"


def plain_host(host: str) -> str:
    """The one way to write this host: lower case, IP addresses in short. Raises ValueError for what is none."""
    try:
        address = ip_address(host)
    except ValueError:
        # Numbers and dots alone are an address that somebody mistyped, and no resolver should be asked for it.
        if _HOST.fullmatch(host) and not re.fullmatch(r"[0-9.]*", host):
            return host.lower()
        raise ValueError("is neither a host name nor an IP address") from None
    return address.compressed if isinstance(address, IPv6Address) else str(address)


def static_nodes(backend: str, entries: Sequence[str]) -> tuple[NodeAddress, ...]:
    """The nodes of ``l2.nodes``: ``host:port``, ``[::1]:port`` or a URL, the port where it is not the usual one.

    A node's name is its host:port, so that engines agree on it; of a Redis also its database, when that is not 0, and of a unix
    socket its path; never credentials. Raises `ConfigError`, which names everything that is wrong, and no entry that may hold a password.
    """
    found: dict[str, NodeAddress] = {}
    problems: list[str] = []
    for position, entry in enumerate(entries):
        shown = f"l2.nodes[{position}]" + ("" if "@" in entry or "?" in entry else f" = {entry!r}")
        try:
            node = _static_node(backend, entry)
        except ValueError as error:
            problems.append(f"{shown}: {error}")
            continue
        if found.setdefault(node.name, node) != node:
            problems.append(f"{shown}: {node.name} is there already, with another URL")
    if problems:
        raise ConfigError("; ".join(problems))
    return tuple(found.values())


def _static_node(backend: str, entry: str) -> NodeAddress:
    is_url = "://" in entry
    scheme = entry.partition("://")[0] if is_url else backend
    allowed = (*_REDIS, "unix") if backend == "redis" else (backend,)
    if scheme not in allowed:
        raise ValueError(f"l2.backend is {backend}: give host:port, or a URL with {', '.join(allowed)}")
    parts, port = _split(entry if is_url else f"{backend}://{entry}")
    if scheme == "unix":
        if not parts.path:
            raise ValueError("has no path of a socket")
        return NodeAddress(parts.path, entry)
    if parts.hostname is None:
        raise ValueError("has no host")
    name = host_port(plain_host(parts.hostname), port or DEFAULT_PORTS[backend])
    path = parts.path.strip("/")
    if backend == "redis":
        return NodeAddress(f"{name}/{path}" if path not in ("", "0") else name, entry if is_url else f"{backend}://{name}")
    if path or parts.query or parts.fragment or parts.username is not None:
        raise ValueError(f"{backend} nodes have a host and a port, and nothing else")
    return NodeAddress(name, f"{backend}://{name}")


def _split(url: str) -> tuple[SplitResult, int | None]:
    """Raises ValueError with a text that quotes nothing of ``url``: what urllib took for a port may be a password's end."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("is not host:port, nor a URL (characters such as / # @ : in a password must be percent-encoded)") from None
    if port == 0:
        raise ValueError("has port 0")
    return parts, port
