"""bfloat16, as models are run: the same request alone gives the same bits, so here nothing is tolerated."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.vllm.connectors import faulty_config
from tests.vllm.harness import Engine, engine
from tests.vllm.outputs import assert_same
from tests.vllm.plain import Plain
from tests.vllm.prompts import prompt

from kvoffload.testing.model import R8

HALF = "bfloat16"


@pytest.fixture(scope="module")
def served(plain: Plain) -> Iterator[Engine]:
    with engine(R8, transfer=faulty_config(), dtype=HALF, num_gpu_blocks_override=64) as started:
        yield started
        started.assert_nothing_leaked()


@pytest.mark.parametrize("length", [65, 130, 250])
def test_bit_for_bit(served: Engine, plain: Plain, length: int) -> None:
    asked = [prompt(length, HALF)]
    expected = plain.generate(asked, 12, shape=R8, dtype=HALF)
    assert_same(expected, served.generate(asked, 12), tolerance=0.0)
    # How many tokens are computed at once is visible in half precision, so a hit is held against vLLM's own hit.
    warm = served.generate(asked, 12)
    kv = served.kv_of(asked[0])
    served.forget()
    [found] = served.generate(asked, 12)
    assert_same(warm, [found], tolerance=0.0)
    assert found.cached == warm[0].cached
    assert found.cached == (length - 1) // 32 * 32
    loaded = found.cached // 32
    assert served.kv_of(asked[0])[:loaded] == kv[:loaded]
