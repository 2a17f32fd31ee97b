"""The harness itself, on vLLM without kvoffload: what it must be able to see, it sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.vllm.harness import BLOCK, Engine, engine
from tests.vllm.outputs import Output, assert_same, difference
from tests.vllm.plain import Plain
from tests.vllm.prompts import prompt, prompts

LENGTHS = [1, 31, 32, 33, 200, 500]


@pytest.fixture(scope="module")
def alone(plain: Plain) -> Iterator[Engine]:  # plain starts meanwhile
    with engine() as started:
        yield started


def test_reproducible_whatever_the_batch(alone: Engine, plain: Plain) -> None:
    asked = prompts(LENGTHS, "reproducible")
    expected = plain.generate(asked, 12)
    assert_same(expected, alone.generate(asked, 12))
    for one, output in zip(asked, expected, strict=True):
        alone.drop_engine_cache()
        [found] = alone.generate([one], 12)
        assert_same([output], [found])
        assert found.cached == 0
        [again] = alone.generate([one], 12)
        assert_same([output], [again])
        assert again.cached == (len(one) - 1) // BLOCK * BLOCK


def test_noise_spoils_what_the_engine_holds(alone: Engine, plain: Plain) -> None:
    asked = [prompt(300, "noise")]
    alone.generate(asked)
    alone.noise()
    [spoilt] = alone.generate(asked)
    assert spoilt.cached == 288
    assert difference(plain.generate(asked)[0], spoilt) is not None
    alone.drop_engine_cache()
    assert_same(plain.generate(asked), alone.generate(asked))


@pytest.mark.parametrize("layer", [0, 2])
def test_one_byte_of_one_block(alone: Engine, plain: Plain, layer: int) -> None:
    """A high byte changes what is said; any byte changes the digest."""
    asked = prompt(300, ("byte", layer))
    alone.generate([asked])
    digests, block = alone.kv_of(asked), alone.cached_blocks(asked)[3]
    alone.llm.collective_rpc("kv_flip", args=(block, layer, 4 * 25, 0x01))
    assert [old == new for old, new in zip(digests, alone.kv_of(asked), strict=True)].count(False) == 1
    alone.llm.collective_rpc("kv_flip", args=(block, layer, 4 * 25, 0x01))
    assert alone.kv_of(asked) == digests
    alone.llm.collective_rpc("kv_flip", args=(block, layer, 4 * 25 + 3, 0x40))
    [wrong] = alone.generate([asked])
    assert difference(plain.generate([asked])[0], wrong) is not None


def test_blocks_of_two_prompts_exchanged(alone: Engine, plain: Plain) -> None:
    asked = prompts([300, 300], "exchanged")
    alone.generate(asked)
    mine, others = (alone.cached_blocks(one)[4] for one in asked)
    alone.llm.collective_rpc("kv_swap", args=(mine, others))
    for expected, wrong in zip(plain.generate(asked), alone.generate(asked), strict=True):
        assert difference(expected, wrong) is not None


def test_blocks_of_one_prompt_exchanged(alone: Engine, plain: Plain) -> None:
    """Attention adds up over all blocks, so the prompt itself says the same: only digests, and prompts that share less, can tell."""
    asked = prompt(300, "exchanged within")
    alone.generate([asked])
    digests, blocks = alone.kv_of(asked), alone.cached_blocks(asked)
    alone.llm.collective_rpc("kv_swap", args=(blocks[4], blocks[6]))
    assert_same(plain.generate([asked]), alone.generate([asked]))
    assert alone.kv_of(asked) != digests
    shorter = [asked[: 5 * BLOCK + 3]]
    assert difference(plain.generate(shorter)[0], alone.generate(shorter)[0]) is not None


def test_example_connector(plain: Plain, tmp_path: Path) -> None:
    """vLLM's own connector passes what ours has to pass, and fails where its files are spoilt."""
    transfer = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    asked = prompts([300, 200], "example")
    with engine(transfer=transfer) as started:
        assert_same(plain.generate(asked), started.generate(asked))
        started.drop_engine_cache()
        started.noise()
        hits = started.generate(asked)
        assert_same(plain.generate(asked), hits)
        assert [hit.cached for hit in hits] == [288, 192]
        for file in tmp_path.rglob("*.safetensors"):
            content = bytearray(file.read_bytes())
            content[-4096:] = bytes(4096)
            file.write_bytes(content)
        started.drop_engine_cache()
        started.noise()
        for expected, wrong in zip(plain.generate(asked), started.generate(asked), strict=True):
            assert difference(expected, wrong) is not None


def test_difference() -> None:
    said = Output((5, 6), ({5: -1.0, 7: -2.0}, {6: -1.0, 5: -1.0 - 1e-5}), 0, "length")
    assert difference(said, said) is None
    assert difference(said, replace(said, cached=3)) is None
    assert "1.00e-03" in str(difference(said, replace(said, logprobs=({5: -1.001, 7: -2.0}, said.logprobs[1]))))
    assert "instead of 5" in str(difference(said, replace(said, tokens=(7, 6))))
    assert difference(said, replace(said, tokens=(5, 5))) is None  # the model could not decide
    assert "tokens" in str(difference(said, replace(said, tokens=(5,))))
    assert "abort" in str(difference(said, replace(said, finish="abort")))
    assert "off by inf" in str(difference(said, replace(said, logprobs=({8: -1.0}, said.logprobs[1]))))
