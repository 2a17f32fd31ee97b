"""Prompts of every length around the edges of blocks, together and one by one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.vllm.connectors import faulty_config
from tests.vllm.harness import BLOCK, Engine, engine
from tests.vllm.outputs import assert_same
from tests.vllm.plain import Plain
from tests.vllm.prompts import prompt, prompts
from tests.vllm.roundtrip import check_hits, check_roundtrip, loadable

EDGES = [1, 2, 31, 32, 33, 34, 63, 64, 65, 95, 96, 97, 127, 128, 129, 255, 256, 257, 511, 512, 513]


@pytest.fixture(scope="module")
def served(plain: Plain) -> Iterator[Engine]:
    with engine(transfer=faulty_config()) as started:
        yield started
        started.assert_nothing_leaked()


def test_all_together(served: Engine, plain: Plain) -> None:
    check_roundtrip(served, plain, prompts(EDGES, "together"))


@pytest.mark.parametrize("length", [31, 32, 33, 64, 65, 96, 97, 300])
def test_one_by_one(served: Engine, plain: Plain, length: int) -> None:
    before = served.loaded_blocks()
    check_roundtrip(served, plain, [prompt(length, "alone")], tokens=12)
    assert served.loaded_blocks() - before == loadable([0] * length, BLOCK) // BLOCK


@pytest.mark.parametrize("length", [29, 31, 32, 61, 64])
@pytest.mark.parametrize("tokens", [1, 2, 4, 35])
def test_answers_that_fill_blocks(served: Engine, plain: Plain, length: int, tokens: int) -> None:
    """Blocks become full while the answer is made; what was saved of them must be right as well."""
    asked = prompt(length, ("filling", tokens))
    [said] = check_roundtrip(served, plain, [asked], tokens)
    served.forget()
    whole = [*asked, *said.tokens]
    [longer] = served.generate([whole], 4)
    assert_same(plain.generate([whole], 4), [longer])
    # The last token's KV was never computed; and of a prompt at least one token is.
    assert longer.cached == (len(whole) - 1) // BLOCK * BLOCK


def test_again_and_again(served: Engine, plain: Plain) -> None:
    """Loaded blocks are like computed ones: they serve from the engine's cache, and come back once more."""
    asked = prompts([100, 260], "again")
    check_roundtrip(served, plain, asked)
    loads = served.loaded_blocks()
    assert_same(plain.generate(asked), served.generate(asked))
    assert served.loaded_blocks() == loads
    for _ in range(3):
        kv = [served.kv_of(one) for one in asked]
        served.forget()
        check_hits(served, plain, asked, kv=kv)
