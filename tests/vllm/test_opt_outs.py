"""Requests that do not want to be saved, or to be served from what was saved, say so in ``kv_transfer_params``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.vllm.connectors import faulty_config
from tests.vllm.harness import Engine, engine
from tests.vllm.outputs import Output, assert_same
from tests.vllm.plain import Plain
from tests.vllm.prompts import prompt
from tests.vllm.roundtrip import check_hits, loadable

TOKENS = 40
"""As many are said: one more block of the request is filled by what it says itself."""


@pytest.fixture(scope="module")
def served(plain: Plain) -> Iterator[Engine]:
    with engine(transfer=faulty_config()) as started:
        yield started
        started.assert_nothing_leaked()


def _ask(served: Engine, asked: list[int], wishes: Any) -> Output:
    name = served.submit(asked, TOKENS, extra_args={"kv_transfer_params": {"kvoffload": wishes}})
    served.run()
    return served.take(name)


def _copies(served: Engine, kind: str) -> int:
    return sum(len(call.blocks) for call in served.copies.calls if call.kind == kind)


def test_a_request_that_is_not_to_be_saved(served: Engine, plain: Plain) -> None:
    asked = prompt(200, "not saved")
    expected = plain.generate([asked], TOKENS)
    saves, used = _copies(served, "save"), served.l1().committed
    assert_same(expected, [_ask(served, asked, {"save": False})])
    served.forget()
    assert (_copies(served, "save"), served.l1().committed) == (saves, used)
    [again] = served.generate([asked], TOKENS)
    assert_same(expected, [again])
    assert again.cached == 0
    served.forget()
    assert served.l1().committed - used == (len(asked) + TOKENS - 1) // served.block_size
    check_hits(served, plain, [asked], TOKENS)


def test_a_request_that_is_not_to_be_served(served: Engine, plain: Plain) -> None:
    """It is computed like one that nobody has seen before; others are served what it saved, or found saved."""
    asked = prompt(200, "not served")
    [said] = served.generate([asked], TOKENS)
    served.forget()
    loads, offered = served.loaded_blocks(), _copies(served, "save")
    found = _ask(served, asked, {"load": False})
    assert_same(plain.generate([asked], TOKENS), [found])
    assert found.cached == 0
    assert served.loaded_blocks() == loads
    served.forget()
    assert _copies(served, "save") == offered, "L1 had all of it"
    longer = [*asked, *said.tokens[:30], *prompt(40, "more")]
    assert _ask(served, longer, {"load": False}).cached == 0
    served.forget()
    check_hits(served, plain, [longer])


def test_served_and_not_saved(served: Engine, plain: Plain) -> None:
    """What is already there is used; what comes on top of it is not kept."""
    start = prompt(130, "start")
    served.generate([start])
    served.forget()
    longer, used = [*start, *prompt(100, "rest")], served.l1().committed
    found = _ask(served, longer, {"save": False, "load": True})
    assert_same(plain.generate([longer], TOKENS), [found])
    assert found.cached == loadable([*start, 0], served.block_size) == 128
    served.forget()
    assert served.l1().committed == used
    [again] = served.generate([longer])
    assert again.cached == 128


def test_neither(served: Engine, plain: Plain) -> None:
    asked = prompt(200, "neither")
    used = served.l1().committed
    for _ in range(2):
        found = _ask(served, asked, {"save": False, "load": False})
        assert_same(plain.generate([asked], TOKENS), [found])
        assert found.cached == 0
        served.forget()
    assert served.l1().committed == used


def test_among_others(served: Engine, plain: Plain) -> None:
    """Of requests in one batch each is done as it wishes."""
    asked = {wish: prompt(150, ("batch", wish)) for wish in ("usual", "save", "load")}
    served.generate([asked["load"], asked["usual"]])
    served.forget()
    names = {}
    for wish, one in asked.items():
        extra = None if wish == "usual" else {"kv_transfer_params": {"kvoffload": {wish: False}}}
        names[wish] = served.submit(one, extra_args=extra)
    served.run()
    found = {wish: served.take(name) for wish, name in names.items()}
    assert_same(plain.generate(list(asked.values())), list(found.values()))
    assert {wish: one.cached for wish, one in found.items()} == {"usual": 128, "save": 0, "load": 0}
    served.forget()
    assert [one.cached for one in served.generate(list(asked.values()))] == [128, 0, 128]


@pytest.mark.parametrize("wishes", ["no", {"save": "false"}, {"keep": False}, []])
def test_wishes_that_nobody_understands_are_said_and_ignored(
    served: Engine, plain: Plain, wishes: Any, caplog: pytest.LogCaptureFixture
) -> None:
    asked = prompt(100, ("odd", str(wishes)))
    _ask(served, asked, wishes)
    served.forget()
    check_hits(served, plain, [asked], TOKENS)
    assert len([record for record in caplog.records if "kv_transfer_params" in record.getMessage()]) == 1
