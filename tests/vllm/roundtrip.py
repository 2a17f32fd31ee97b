"""The check that nearly every test makes: cold, noise, hit, and both like plain vLLM."""

from __future__ import annotations

from collections.abc import Sequence

from tests.vllm.harness import Engine
from tests.vllm.outputs import Output, assert_same
from tests.vllm.plain import Plain


def loadable(prompt: list[int], block: int) -> int:
    """Tokens of this prompt that can come from the connector: full blocks, and at least one token is left to compute."""
    return (len(prompt) - 1) // block * block


def compare_kv(engine: Engine, prompts: Sequence[list[int]], before: Sequence[list[bytes]], outputs: Sequence[Output]) -> int:
    """Blocks that were not computed have, in the engine, byte for byte what they had when they were; returns how many were compared."""
    compared = 0
    for prompt, old, output in zip(prompts, before, outputs, strict=True):
        new = engine.kv_of(prompt)
        count = min(len(old), len(new), output.cached // engine.block_size)
        wrong = [index for index in range(count) if old[index] != new[index]]
        assert not wrong, f"blocks {wrong} of a prompt of {len(prompt)} tokens came back with other bytes"
        compared += count
    return compared


def check_roundtrip(engine: Engine, plain: Plain, prompts: Sequence[list[int]], tokens: int = 8) -> list[Output]:
    """Prompts that the engine has never seen: computed, then all of each that can be loaded is loaded. Returns the outputs of the hits."""
    cold = engine.generate(prompts, tokens)
    assert_same(plain.generate(prompts, tokens), cold)
    kv = [engine.kv_of(prompt) for prompt in prompts] if engine.processes == 1 else []
    engine.forget()
    return check_hits(engine, plain, prompts, tokens, kv)


def check_hits(engine: Engine, plain: Plain, prompts: Sequence[list[int]], tokens: int = 8, kv: Sequence[list[bytes]] = ()) -> list[Output]:
    """Prompts that L1 has: all of each that can be loaded is loaded, with the bytes ``kv`` where they are given."""
    hits = engine.generate(prompts, tokens)
    assert_same(plain.generate(prompts, tokens), hits)
    assert [hit.cached for hit in hits] == [loadable(prompt, engine.block_size) for prompt in prompts]
    if kv:
        compared = compare_kv(engine, prompts, kv, hits)
        assert compared == sum(hit.cached for hit in hits) // engine.block_size
    return hits
