"""Prompts that are computed in chunks, alone and beside the answers to others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.vllm.connectors import faulty_config
from tests.vllm.harness import Engine, engine
from tests.vllm.outputs import assert_same
from tests.vllm.plain import Plain
from tests.vllm.prompts import prompt, prompts
from tests.vllm.roundtrip import check_roundtrip


@pytest.fixture(scope="module")
def chunked(plain: Plain) -> Iterator[Engine]:
    with engine(transfer=faulty_config(), max_num_batched_tokens=72, max_num_seqs=4) as started:
        yield started
        started.assert_nothing_leaked()


def test_chunked_prefill(chunked: Engine, plain: Plain) -> None:
    check_roundtrip(chunked, plain, prompts([300, 500, 71, 72, 73, 144, 33], "chunked"))


def test_chunked_prefill_among_answers(chunked: Engine, plain: Plain) -> None:
    """Chunks of one prompt share their steps with the answers to others, and with loads."""
    asked = prompts([400, 40, 350, 90, 200], "among answers")
    check_roundtrip(chunked, plain, asked, tokens=40)
    chunked.forget()
    mixed = [asked[0], prompt(300, "new"), asked[2], prompt(35, "new")]
    found = chunked.generate(mixed, 20)
    assert_same(plain.generate(mixed, 20), found)
    assert [output.cached for output in found] == [384, 0, 320, 0]
