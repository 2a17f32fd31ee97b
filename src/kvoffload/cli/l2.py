"""``kvoffload l2 ping | check | purge``: reach each node, prove that it keeps what it is given, or empty it."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import anyio
import anyio.to_thread
import numpy as np
from pydantic import SecretStr

from kvoffload.cli.table import human_bytes, human_seconds
from kvoffload.config import Config, L2Settings, MembershipSettings
from kvoffload.envelope import Envelope
from kvoffload.errors import ConfigError, KVOffloadError, UnsupportedError
from kvoffload.l2.node import Item, L2Node, NodeUnreachable, Outcome, value_name
from kvoffload.l2.nodes import make_node
from kvoffload.l2.ring import NodeAddress
from kvoffload.l2.table_source import Scrubber
from kvoffload.layout import HEADER_BYTES
from kvoffload.runtime.nodes_now import nodes_now
from kvoffload.segment import Segment

if TYPE_CHECKING:
    from redis.asyncio import Redis

TIMEOUT_S = 5.0
CHECK_BLOCKS = 8
CHECK_BYTES = 1 << 20


def run_l2(command: str, *, backend: str | None, nodes: Sequence[str], manage_port: int, yes: bool) -> int:
    """0 when every node did it; 1 when one did not; 2 when it was called wrongly."""
    try:
        settings = _settings(backend, nodes)
        return anyio.run(partial(_run, command, settings, manage_port=manage_port, yes=yes))
    except ConfigError as error:
        print(f"kvoffload l2: {error}", file=sys.stderr)
        return 2
    except KVOffloadError as error:
        print(f"kvoffload l2: {error}", file=sys.stderr)
        return 1


def _settings(backend: str | None, nodes: Sequence[str]) -> L2Settings:
    """The settings of the environment, with what the command line says in place of theirs."""
    extra: dict[str, object] = {}
    environ = dict(os.environ)
    if nodes:
        extra["l2.nodes"] = list(nodes)
        extra["l2.backend"] = backend or ("redis" if "://" in nodes[0] else "infinistore")
        environ = {name: value for name, value in environ.items() if name not in ("KVOFFLOAD_L2_NODES", "KVOFFLOAD_L2_BACKEND")}
        environ.pop("KVOFFLOAD_L2_MEMBERSHIP_URL", None)
    elif backend is not None:
        extra["l2.backend"] = backend
        environ.pop("KVOFFLOAD_L2_BACKEND", None)
    settings = Config.load(extra, environ).l2
    if settings.backend == "off":
        raise ConfigError("no nodes: give --node, or set KVOFFLOAD_L2_BACKEND and KVOFFLOAD_L2_NODES or KVOFFLOAD_L2_MEMBERSHIP_URL")
    return settings


async def _run(command: str, settings: L2Settings, *, manage_port: int, yes: bool) -> int:
    addresses = await nodes_now(settings, TIMEOUT_S)
    if not addresses:
        print("kvoffload l2: the table names no node", file=sys.stderr)
        return 1
    if command == "purge" and not yes:
        what = f"the namespace {settings.namespace!r}" if settings.namespace else "all namespaces"
        names = ", ".join(address.name for address in addresses)
        print(f"This removes the blocks of {what} from {names}; an InfiniStore node loses all that it has. Say --yes to do it.")
        return 2
    failed = 0
    for address in addresses:
        try:
            print(f"  {address.name.ljust(24)} {await _one(command, address, settings, manage_port)}", flush=True)
        except (NodeUnreachable, KVOffloadError) as error:
            failed += 1
            print(f"  {address.name.ljust(24)} FAILED: {error}", flush=True)
    return 1 if failed else 0


async def _one(command: str, address: NodeAddress, settings: L2Settings, manage_port: int) -> str:
    if command == "purge":
        return await _purge(address, settings, manage_port)
    segment = Segment.create(2 * CHECK_BLOCKS * (HEADER_BYTES + CHECK_BYTES), HEADER_BYTES + CHECK_BYTES)  # RDMA takes no other memory
    node = make_node(address, settings, segment.slot_bytes, (segment,))
    try:
        if command == "ping":
            await node.ping(time.monotonic() + TIMEOUT_S)  # connects
            return f"answers in {human_seconds(await node.ping(time.monotonic() + TIMEOUT_S))}"
        return await _check(node, segment)
    finally:
        await node.close()
        segment.close()


async def _check(node: L2Node, segment: Segment) -> str:
    """Write blocks, read them back, verify them. Their keys are random: nobody asks for them, and a Redis is told to drop them."""
    envelope = Envelope(secrets.token_bytes(24), CHECK_BYTES, secrets.token_bytes(32))
    keys = [secrets.token_bytes(24) for _ in range(CHECK_BLOCKS)]
    names = [value_name("check", key, 0) for key in keys]
    try:
        return await _write_and_read(node, segment, envelope, keys, names)
    finally:
        with anyio.CancelScope(shield=True):
            # One without eviction would keep them for good. An InfiniStore's leave as others come.
            await node.discard(names, time.monotonic() + TIMEOUT_S)


async def _write_and_read(node: L2Node, segment: Segment, envelope: Envelope, keys: Sequence[bytes], names: Sequence[str]) -> str:
    slots = [segment.slot(index) for index in range(CHECK_BLOCKS)]
    for slot, key in zip(slots, keys, strict=True):
        slot[HEADER_BYTES:] = np.frombuffer(secrets.token_bytes(CHECK_BYTES), dtype=np.uint8)
        envelope.seal(slot, key)
    await node.ping(time.monotonic() + TIMEOUT_S)
    begun = time.monotonic()
    written = await node.write([Item(name, slot.data) for name, slot in zip(names, slots, strict=True)], begun + TIMEOUT_S)
    _expect("writing", written)
    written_s = time.monotonic() - begun
    found = await node.find(names, time.monotonic() + TIMEOUT_S)
    if found != [True] * len(names):
        raise NodeUnreachable(f"it took {len(names)} blocks and then had {sum(found or ())} of them: is it full, or shared with others?")
    back = [segment.slot(CHECK_BLOCKS + index) for index in range(CHECK_BLOCKS)]
    begun = time.monotonic()
    _expect("reading", await node.read([Item(name, slot.data) for name, slot in zip(names, back, strict=True)], begun + TIMEOUT_S))
    read_s = time.monotonic() - begun
    faults = [fault for slot, key in zip(back, keys, strict=True) if (fault := envelope.verify(slot, key)) is not None]
    if faults:
        raise NodeUnreachable(f"{len(faults)} of {len(keys)} blocks came back altered ({faults[0].name}): nothing of this node can be used")
    total = CHECK_BLOCKS * CHECK_BYTES
    return (
        f"{CHECK_BLOCKS} blocks of {human_bytes(CHECK_BYTES)} written, read back and verified: "
        f"{human_bytes(int(total / written_s))}/s in, {human_bytes(int(total / read_s))}/s out"
    )


def _expect(what: str, outcomes: Sequence[Outcome]) -> None:
    wrong = [outcome for outcome in outcomes if outcome is not Outcome.DONE]
    if wrong:
        hint = ": it is full (raise its memory, or let it evict)" if Outcome.FULL in wrong else ""
        raise NodeUnreachable(f"{what} failed for {len(wrong)} of {len(outcomes)} blocks, {wrong[0].name}{hint}")


async def _purge(address: NodeAddress, settings: L2Settings, manage_port: int) -> str:
    host = urlsplit(address.url).hostname or ""
    if address.url.startswith("infinistore:"):
        return await anyio.to_thread.run_sync(_purge_infinistore, f"http://{f'[{host}]' if ':' in host else host}:{manage_port}/purge")
    if "+cluster" in urlsplit(address.url).scheme:
        raise UnsupportedError("purging goes to single servers: name each master of the cluster with --node redis://...")
    # A namespace is followed by a dot and 12 hexadecimal digits; "prod" must not take "prod.eu" along.
    pattern = f"kvo1:{settings.namespace}.{'?' * 12}:*" if settings.namespace else "kvo1:*"
    return f"{await _purge_redis(address.url, pattern)} blocks removed"


async def _purge_redis(url: str, pattern: str) -> int:
    """Unlink what is named so; how many there were."""
    from redis.exceptions import RedisError

    client = _redis(url)
    removed = 0
    try:
        batch: list[bytes] = []
        async for name in client.scan_iter(match=pattern, count=1000):
            batch.append(name)
            if len(batch) == 500:
                removed += await client.unlink(*batch)
                batch.clear()
        if batch:
            removed += await client.unlink(*batch)
    except (RedisError, OSError, TimeoutError, UnicodeError) as error:
        without_secrets = Scrubber(MembershipSettings().model_copy(update={"url": SecretStr(url)}))
        why = without_secrets(str(error) or type(error).__name__)
        raise NodeUnreachable(f"purging ended after {removed} blocks: {why}") from error
    finally:
        await client.aclose()
    return removed


def _redis(url: str) -> Redis:
    """A client, not connected. Raises UnsupportedError, whose text quotes nothing of the URL."""
    from redis.asyncio import Redis

    try:
        client = Redis.from_url(url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S)
        pool = client.connection_pool
        pool.connection_class(**pool.connection_kwargs)  # an option that it does not know is said here, and not at the first use
    except (TypeError, ValueError):
        raise UnsupportedError("its URL is none of a Redis server, or has an option that redis-py does not know or take") from None
    return client


def _purge_infinistore(url: str) -> str:
    """The server empties its whole map, others' values too; the memory comes back as it evicts."""
    try:
        with urlopen(Request(url, method="POST"), timeout=TIMEOUT_S) as answer:
            return f"purged: {answer.read(200).decode(errors='replace')}"
    except (URLError, OSError) as error:
        raise NodeUnreachable(f"no answer from {url} ({error}): --manage-port is the server's HTTP port") from error
