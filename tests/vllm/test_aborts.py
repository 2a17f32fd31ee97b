"""Requests that are aborted at any moment, loads pending and saves in flight included: nobody else notices."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from tests.vllm.connectors import faulty_config
from tests.vllm.harness import Engine, engine
from tests.vllm.outputs import assert_same
from tests.vllm.plain import Plain
from tests.vllm.prompts import prompt, prompts
from tests.vllm.roundtrip import check_hits, check_roundtrip

BLOCKS = 40


@pytest.fixture(scope="module")
def served(plain: Plain) -> Iterator[Engine]:
    with engine(transfer=faulty_config(), num_gpu_blocks_override=BLOCKS) as started:
        yield started
        started.assert_nothing_leaked()


def _free(served: Engine) -> int:
    return int(served.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


def test_a_load_is_pending(served: Engine, plain: Plain) -> None:
    """Its blocks go to nobody until its copy has ended, and then it is reported, once (vLLM dies of a second time)."""
    asked = prompt(330, "load pending")
    check_roundtrip(served, plain, [asked])
    served.forget()
    served.copies.hold_loads()
    name = served.submit(asked)
    served.step_until(lambda: served.copies.wait_held("load", 0))
    held = served.copies.calls[-1].blocks
    served.abort([name])
    others = prompts([300, 250, 280], "others")
    names = [served.submit(one, 20) for one in others]
    served.run()  # three requests in what is left of the engine's cache
    assert _free(served) <= BLOCKS - 1 - len(held)
    served.copies.release()
    served.step_until(lambda: _free(served) == BLOCKS - 1) if served.step() else None
    for _ in range(400):
        if _free(served) == BLOCKS - 1:
            break
        served.idle_steps(1)
    served.assert_nothing_leaked()
    assert_same(plain.generate(others, 20), [served.take(one) for one in names])
    served.forget()
    check_hits(served, plain, [asked])


def test_a_save_is_held_while_its_blocks_change_hands(served: Engine, plain: Plain) -> None:
    """The held copy reads, when it is let go, what others have written: it must not become a block of its prompt."""
    asked = prompt(330, "save held")
    served.copies.hold_saves()
    name = served.submit(asked, 60)
    for _ in range(6):
        served.step()
    assert served.copies.wait_held("save")
    served.abort([name])
    others = prompts([400, 400, 330], "takers")  # more than the engine's cache holds
    found = served.generate(others, 30)
    assert_same(plain.generate(others, 30), found)
    served.copies.release()
    served.forget()
    again = served.generate([asked])
    assert_same(plain.generate([asked]), again)
    assert again[0].cached == 0  # all of its blocks were in one copy, and all were overwritten
    served.forget()
    check_hits(served, plain, [asked])


def _abort_at_random(served: Engine, plain: Plain, seed: int, rounds: int) -> None:
    draw = random.Random(seed)
    asked = prompts([330, 100, 210, 64, 40, 150], ("random", seed))
    served.generate(asked)
    served.forget()
    expected = plain.generate(asked, 16)
    for _ in range(rounds):
        served.copies.slow(draw.choice([0, 0.002, 0.01]))
        names = [served.submit(one, 16) for one in asked]
        for _ in range(draw.randrange(12)):
            served.step()
        gone = draw.sample(range(len(names)), draw.randrange(1, len(names)))
        served.abort([names[index] for index in gone if not served.is_finished(names[index])])
        served.run()
        kept = [index for index in range(len(names)) if index not in gone]
        assert_same([expected[index] for index in kept], [served.take(names[index]) for index in kept])
        for index in gone:
            if served.is_finished(names[index]):
                served.take(names[index])
        served.flush()
        for _ in range(400):
            if _free(served) == BLOCKS - 1:
                break
            served.idle_steps(1)
        if draw.random() < 0.6:
            served.forget()
    served.copies.slow(0)
    # What was aborted on its way may have been saved in part only: computed once more, then all of it is there.
    served.forget()
    assert_same(expected, served.generate(asked, 16))
    served.forget()
    check_hits(served, plain, asked, 16)
    served.assert_nothing_leaked()


@pytest.mark.parametrize("seed", range(2))
def test_at_random_moments(served: Engine, plain: Plain, seed: int) -> None:
    _abort_at_random(served, plain, seed, rounds=6)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10, 16))
def test_at_many_random_moments(served: Engine, plain: Plain, seed: int) -> None:
    _abort_at_random(served, plain, seed, rounds=20)
