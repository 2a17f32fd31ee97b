"""``kvoffload members``: look at the table of nodes that engines share, and write it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr

from kvoffload.cli.table import table as lines_of
from kvoffload.config import Config, MembershipSettings
from kvoffload.errors import ConfigError, KVOffloadError, MisuseError, PeerError, UnsupportedError
from kvoffload.l2.addresses import host_port
from kvoffload.l2.nodes_table import (
    MOST_BYTES,
    SLOTS,
    NodesTable,
    TableError,
    TableNode,
    make_table,
    parse_table,
    render_table,
    table_node,
    version_of,
)
from kvoffload.l2.table_source import Scrubber, open_client


def run_members(options: argparse.Namespace) -> int:
    """0: done, 1: Redis or its table could not be used, or somebody else wrote it meanwhile, 2: called or configured wrongly."""
    try:
        settings = _settings(options.url, options.key)
        new = _nodes(options.nodes) if options.action == "set" else None
    except KVOffloadError as error:
        print(f"kvoffload members: {error}", file=sys.stderr)
        return 2
    try:
        redis = Table(settings)
        return _list(redis) if new is None else _set(redis, new, dry_run=options.dry_run)
    except KVOffloadError as error:
        print(f"kvoffload members: {error}", file=sys.stderr)
        return 1


def _nodes(texts: Sequence[str]) -> tuple[TableNode, ...]:
    """``name=host:port`` each. Raises MisuseError for what no table should have."""
    nodes = tuple(_node(text) for text in texts)
    make_table(1, nodes)
    places = [host_port(node.host, node.port) for node in nodes]
    if twice := {place for place in places if places.count(place) > 1}:
        raise MisuseError(f"two nodes have the same address: {', '.join(sorted(twice))}")
    return nodes


def _node(text: str) -> TableNode:
    name, _, address = text.partition("=")
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname, parts.port
        if host is None or port is None or parts.netloc != address or "@" in address:
            raise ValueError
    except ValueError:
        raise MisuseError(f"{text!r} is not NAME=HOST:PORT, such as kv-0=10.0.0.11:12345 or kv-1=[fd00::2]:12345") from None
    try:
        return table_node(name, host, port)
    except ValueError as error:
        raise MisuseError(str(error)) from None


def _settings(url: str | None, key: str | None) -> MembershipSettings:
    """The flags, which win, and the variables."""
    settings = Config.load().l2.membership
    if key is not None:
        if not key:
            raise ConfigError("--key is empty")
        settings = settings.model_copy(update={"key": key})
    if url is not None:
        if not url.startswith(("redis://", "rediss://", "unix://")):
            raise ConfigError("--url must start with redis://, rediss:// or unix://")
        settings = settings.model_copy(update={"url": SecretStr(url)})
    if settings.url is None:
        raise ConfigError("which Redis? Give --url redis://host:port, or set KVOFFLOAD_L2_MEMBERSHIP_URL")
    return settings


class Table:
    """The key in Redis. Raises PeerError, without the URL's credentials, and UnsupportedError where there is no redis-py."""

    def __init__(self, settings: MembershipSettings) -> None:
        try:
            import redis
            from redis.retry import Retry
        except ImportError as error:
            raise UnsupportedError("this needs redis: pip install kvoffload[redis]") from error
        self.key = settings.key
        self._errors = redis
        self._without_secrets = Scrubber(settings)
        self._client: Any = open_client(redis.Redis, Retry, settings)

    def read(self) -> bytes | None:
        """None if there is none."""
        try:
            with self._client as client:
                return self._read(client)
        except (self._errors.RedisError, OSError) as error:
            raise self._translated(error) from None

    def _read(self, client: Any) -> bytes | None:
        data: bytes = client.getrange(self.key, 0, MOST_BYTES)
        return data or None

    def replace(self, old: bytes | None, new: bytes, before_execution: Callable[[], None] = lambda: None) -> bool:
        """Write ``new`` if the table is still ``old``; False if somebody else has written it meanwhile."""
        try:
            with self._client as client, client.pipeline() as transaction:
                transaction.watch(self.key)
                if self._read(transaction) != old:
                    return False
                transaction.multi()
                transaction.set(self.key, new)
                before_execution()
                transaction.execute()
        except self._errors.WatchError:
            return False
        except (self._errors.RedisError, OSError) as error:
            raise self._translated(error) from None
        return True

    def _translated(self, error: Exception) -> PeerError:
        text = self._without_secrets(str(error) or type(error).__name__)
        if "WRONGTYPE" in text:
            text = f"what it keeps under {self.key!r} is no table of nodes, but of another type: give another --key, or delete it"
        return PeerError(f"Redis: {text}")


def _list(redis: Table) -> int:
    data = redis.read()
    if data is None:
        raise PeerError(f"Redis has no table under {redis.key!r}: `kvoffload members set` writes one")
    table, problems = parse_table(data)
    _print(table)
    for problem in problems:
        print(f"  problem: {problem}")
    return 0


def _set(redis: Table, nodes: Sequence[TableNode], *, dry_run: bool) -> int:
    data = redis.read()
    old, version = _old(data)
    new = make_table(version + 1, nodes)
    if old is not None and old.is_same_as(new):
        print(f"nothing to change: version {old.version} has these nodes already")
        return 0
    if not dry_run and not redis.replace(data, render_table(new)):
        raise PeerError("somebody else wrote the table meanwhile: look at it with `kvoffload members list`, then try again")
    _print(new)
    if old is not None:
        print(f"  {_moved(old, new)}")
    print("  not written: this was a dry run" if dry_run else "  written; engines see it at their next look")
    return 0


def _old(data: bytes | None) -> tuple[NodesTable | None, int]:
    """The table to be replaced, None if it cannot be read, and its version."""
    if data is None:
        return None, 0
    try:
        old, _ = parse_table(data)
    except TableError as error:
        version = version_of(data)
        print(f"  the table that is there is replaced: {error}")
        if version is None:
            print("  its version cannot be read: engines take a lower one than theirs only after some seconds")
        return None, version or 0
    return old, old.version


def _moved(old: NodesTable, new: NodesTable) -> str:
    moved = sum(before != after for before, after in zip(old.slots, new.slots, strict=True))
    kept = {str(node) for node in old.nodes}
    joined = [node.name for node in new.nodes if node.name not in {other.name for other in old.nodes}]
    left = [node.name for node in old.nodes if node.name not in {other.name for other in new.nodes}]
    changed = [node.name for node in new.nodes if node.name not in joined and str(node) not in kept]
    parts = [f"{label}: {', '.join(names)}" for label, names in (("new", joined), ("gone", left), ("new address", changed)) if names]
    return "; ".join([*parts, f"{moved} of {SLOTS} slots ({moved / SLOTS:.0%}) get another owner"])


def _print(table: NodesTable) -> None:
    rows = [("node", "address", "slots", "share")]
    for node in table.nodes:
        count = table.slots.count(node.name)
        rows.append((node.name, host_port(node.host, node.port), str(count), f"{count / SLOTS:.1%}"))
    print(f"version {table.version}, {len(table.nodes)} nodes")
    for line in lines_of(rows, left=(0, 1)):
        print(line)
