"""Prompts that begin alike, hits of which the engine has a part, the next turn of a conversation, and salts that keep apart."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.vllm.connectors import faulty_config
from tests.vllm.harness import BLOCK, Engine, engine
from tests.vllm.outputs import assert_same
from tests.vllm.plain import Plain
from tests.vllm.prompts import prompt
from tests.vllm.roundtrip import check_roundtrip, compare_kv


@pytest.fixture(scope="module")
def served(plain: Plain) -> Iterator[Engine]:
    with engine(transfer=faulty_config()) as started:
        yield started
        started.assert_nothing_leaked()


@pytest.mark.parametrize("shared", [31, 32, 33, 64, 200])
def test_a_prefix_saved_by_another(served: Engine, plain: Plain, shared: int) -> None:
    prefix = prompt(shared, ("prefix", shared))
    first, second = [*prefix, *prompt(70, "a")], [*prefix, *prompt(90, "b")]
    check_roundtrip(served, plain, [first])
    served.forget()
    [found] = served.generate([second])
    assert_same(plain.generate([second]), [found])
    assert found.cached == shared // BLOCK * BLOCK


def test_many_with_one_prefix_at_once(served: Engine, plain: Plain) -> None:
    prefix = prompt(160, "system prompt")
    asked = [[*prefix, *prompt(20 + 11 * index, index)] for index in range(6)]
    check_roundtrip(served, plain, asked)


def test_the_same_prompt_several_times_at_once(served: Engine, plain: Plain) -> None:
    asked = [prompt(200, "same")] * 4
    assert_same(plain.generate(asked), served.generate(asked))
    served.forget()
    found = served.generate(asked)
    assert_same(plain.generate(asked), found)
    assert [output.cached for output in found] == [192] * 4


@pytest.mark.parametrize("in_engine", [1, 32, 64, 150, 320])
def test_a_part_is_in_the_engine(served: Engine, plain: Plain, in_engine: int) -> None:
    """vLLM has the first blocks, L1 the others: only those are loaded, and behind the right ones."""
    asked = prompt(330, ("part", in_engine))
    served.generate([asked])
    kv = served.kv_of(asked)
    served.forget()
    start = [*asked[:in_engine], 7]
    assert_same(plain.generate([start]), served.generate([start]))
    served.flush()
    loads = served.loaded_blocks()
    [found] = served.generate([asked])
    assert_same(plain.generate([asked]), [found])
    assert found.cached == 320
    assert served.loaded_blocks() - loads == 10 - in_engine // BLOCK
    assert compare_kv(served, [asked], [kv], [found]) == 10


def test_the_next_turn_loads_what_was_said(served: Engine, plain: Plain) -> None:
    history = prompt(50, "conversation")
    for turn in range(4):
        [said] = served.generate([history], 45)
        assert_same(plain.generate([history], 45), [said])
        whole = [*history, *said.tokens]
        history = [*whole, *prompt(9, turn)]
        served.forget()
        [found] = served.generate([history], 3)
        assert_same(plain.generate([history], 3), [found])
        assert found.cached == (len(whole) - 1) // BLOCK * BLOCK
        served.forget()


def test_salts_do_not_share(served: Engine, plain: Plain) -> None:
    asked = prompt(200, "salted")
    expected = plain.generate([asked])
    salts: list[str | None] = ["a", "b", None]
    for salt in salts:
        [cold] = served.generate([asked], salts=[salt])
        assert_same(expected, [cold])
        assert cold.cached == 0
        served.forget()
    for salt in salts:
        [hit] = served.generate([asked], salts=[salt])
        assert_same(expected, [hit])
        assert hit.cached == 192
        served.forget()
    [other] = served.generate([asked], salts=["c"])
    assert other.cached == 0


def test_hits_among_misses(served: Engine, plain: Plain) -> None:
    known = [prompt(length, "known") for length in (90, 210, 330)]
    served.generate(known)
    served.forget()
    mixed = [known[0], prompt(120, "unknown"), known[1], prompt(50, "unknown"), known[2]]
    found = served.generate(mixed, 12)
    assert_same(plain.generate(mixed, 12), found)
    assert [output.cached for output in found] == [64, 0, 192, 0, 320]
