"""`reset_prefix_cache(reset_connector=True)` at the worst moments: what was there before is not used afterwards."""

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
def served(plain: Plain) -> Iterator[Engine]:
    with engine(transfer=faulty_config(), num_gpu_blocks_override=28, max_model_len=768) as started:
        yield started
        started.assert_nothing_leaked()


def _assert_unknown(served: Engine, plain: Plain, asked: list[list[int]]) -> None:
    served.drop_engine_cache()
    served.noise(1)
    found = served.generate(asked)
    assert_same(plain.generate(asked), found)
    assert [output.cached for output in found] == [0] * len(asked)


def test_when_nothing_is_under_way(served: Engine, plain: Plain) -> None:
    asked = prompts([200, 40, 100], "idle")
    check_roundtrip(served, plain, asked)
    assert served.reset()
    _assert_unknown(served, plain, asked)
    served.reset()
    check_roundtrip(served, plain, asked)


def test_saves_in_flight(served: Engine, plain: Plain) -> None:
    asked = [prompt(200, "saves in flight")]
    served.copies.hold_saves()
    served.generate(asked)
    assert served.copies.wait_held("save")
    assert served.reset()
    served.copies.release()
    served.flush()
    _assert_unknown(served, plain, asked)
    served.forget()
    assert served.generate(asked)[0].cached == 192  # saved again by the run after the reset


def test_load_pending(served: Engine, plain: Plain) -> None:
    asked, later = prompt(200, "load pending"), prompt(70, "later")
    served.generate([asked, later])
    served.forget()
    served.copies.hold_loads()
    name = served.submit(asked)
    served.step_until(lambda: served.copies.wait_held("load", 0))
    served.reset()  # vLLM's own cache may refuse, as blocks are in use
    assert not served.is_finished(name)
    served.copies.release()
    served.run()
    assert_same(plain.generate([asked]), [served.take(name)])
    served.flush()
    _assert_unknown(served, plain, [later])
    _assert_unknown(served, plain, [asked])  # the request that lived through the reset has saved nothing


@pytest.mark.parametrize("reset", [False, True])
def test_answer_remembered(served: Engine, plain: Plain, reset: bool) -> None:
    """A request knows that it has a hit, but has no room yet. After a reset it must compute; without one it loads (which shows that
    the test does what it says)."""
    big, waiting = prompt(500, ("big", reset)), prompt(460, ("waiting", reset))
    served.generate([waiting])
    served.forget()
    loads = served.loaded_blocks()
    first = served.submit(big, 40)
    for _ in range(3):
        served.step()
    second = served.submit(waiting)
    for _ in range(10):
        served.step()
    assert not served.is_finished(first)
    assert served.loaded_blocks() == loads
    if reset:
        served.reset()
    served.run()
    answer = served.take(second)
    assert_same(plain.generate([waiting]), [answer])
    assert_same(plain.generate([big], 40), [served.take(first)])
    assert (answer.cached > 0, served.loaded_blocks() > loads) == (not reset, not reset)


@pytest.mark.long
def test_resets_all_along(served: Engine, plain: Plain) -> None:
    """Whatever the moment of a reset: right answers, nothing leaked, and saving goes on."""
    import random

    draw = random.Random(3)
    asked = prompts([200, 90, 300, 150, 60, 250], "all along")
    expected = plain.generate(asked, 12)
    for _ in range(25):
        served.copies.slow(draw.choice([0, 0, 0.003, 0.02]))
        names = [served.submit(one, 12) for one in asked]
        for _ in range(draw.randrange(40)):
            served.step()
        served.reset()
        served.run()
        assert_same(expected, [served.take(name) for name in names])
    served.copies.slow(0)
    served.forget()
    served.generate(asked, 12)
    served.forget()
    assert sum(output.cached for output in served.generate(asked, 12)) > 0
