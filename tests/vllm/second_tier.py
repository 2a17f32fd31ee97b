"""Engines that share a second tier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.vllm.connectors import faulty_config
from tests.vllm.harness import Engine
from tests.vllm.outputs import Output, assert_same
from tests.vllm.plain import Plain
from tests.vllm.roundtrip import compare_kv, loadable

PATIENT = {"deadline_base_ms": 10_000, "deadline_most_ms": 10_000, "write_timeout_ms": 10_000}
"""However busy the machine is, what is there arrives; a test that is about deadlines sets its own."""


def sharing_config(backend: str, nodes: Sequence[str], **l2: Any) -> dict[str, Any]:
    """``kv_transfer_config`` with these nodes; everything that they have is loaded, and at once."""
    settings = {"backend": backend, "nodes": list(nodes), "min_tokens": 1, "load_or_compute": False, **PATIENT, **l2}
    return faulty_config(l2=settings)


def share(first: Engine, second: Engine, plain: Plain, prompts: Sequence[list[int]], tokens: int = 8) -> list[Output]:
    """What ``first`` computes, ``second``, which has never seen it, finds; both like plain vLLM. The outputs of ``second``."""
    expected = plain.generate(prompts, tokens)
    assert_same(expected, first.generate(prompts, tokens))
    first.flush()
    found = second.generate(prompts, tokens)
    assert_same(expected, found)
    assert [output.cached for output in found] == [loadable(prompt, second.block_size) for prompt in prompts]
    return found


def found_by(later: Engine, plain: Plain, prompts: Sequence[list[int]], kv: Sequence[list[bytes]] = (), tokens: int = 8) -> None:
    """An engine that has never seen these prompts has all of each that can be loaded, with the bytes ``kv`` where they are given."""
    found = later.generate(prompts, tokens)
    assert_same(plain.generate(prompts, tokens), found)
    assert [output.cached for output in found] == [loadable(prompt, later.block_size) for prompt in prompts]
    if kv:
        assert compare_kv(later, prompts, kv, found) == sum(output.cached for output in found) // later.block_size
