"""An engine cache far too small: requests are preempted, blocks change hands while their saves are in flight. And an L1 far too small."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.vllm.connectors import faulty_config
from tests.vllm.harness import BLOCK, Engine, engine
from tests.vllm.outputs import assert_same, difference
from tests.vllm.plain import Plain
from tests.vllm.prompts import prompt, prompts

from kvoffload.messages import DropReason

SLOW_S = (0.015, 0.03, 0.06, 0.12)
"""The first is enough, unless the machine is so busy that the engine itself is slower than that."""


@pytest.fixture
def small(plain: Plain) -> Iterator[Engine]:
    with engine(transfer=faulty_config(), num_gpu_blocks_override=26, max_model_len=512) as started:
        yield started
        started.assert_nothing_leaked()


@pytest.fixture
def tiny(plain: Plain) -> Iterator[Engine]:
    """Two or three requests fill it, and the next ones take their blocks at once."""
    with engine(transfer=faulty_config(), num_gpu_blocks_override=14, max_model_len=384) as started:
        yield started
        started.assert_nothing_leaked()


def _workload(seed: object) -> list[list[int]]:
    return prompts([100, 180, 60, 150, 90, 210, 120, 75], seed)


def test_preempted_and_reloaded(small: Engine, plain: Plain) -> None:
    asked = _workload("preempted")
    assert_same(plain.generate(asked, 70), small.generate(asked, 70))
    assert small.preemptions() > 0
    small.forget()
    found = small.generate(asked, 70)
    assert_same(plain.generate(asked, 70), found)
    assert sum(output.cached for output in found) >= BLOCK * len(asked)
    assert small.loaded_blocks() > 0


def _reuse(tiny: Engine, plain: Plain, seed: object) -> list[str]:
    """Blocks change hands all the time; then every prompt is asked once more. How the answers differ from plain vLLM's, if they do."""
    asked = [*_workload(seed), *_workload((seed, 2))]
    expected = plain.generate(asked, 2)
    assert_same(expected, tiny.generate(asked, 2))
    tiny.copies.slow(0)
    differences: list[str | None] = []
    for one, output in zip(asked, expected, strict=True):
        tiny.forget()
        [found] = tiny.generate([one], 2)
        differences.append(difference(output, found))
    assert tiny.loaded_blocks() > 0
    return [text for text in differences if text is not None]


def test_saves_slower_than_reuse(tiny: Engine, plain: Plain) -> None:
    for slow_s in SLOW_S:
        tiny.copies.slow(slow_s)
        assert _reuse(tiny, plain, slow_s) == []
        if DropReason.OVERWRITTEN in tiny.l1().drops:
            return
    raise AssertionError("no block was overwritten under its save: this tested nothing")


def test_saves_slower_than_reuse_without_the_ledger(tiny: Engine, plain: Plain) -> None:
    """The negative control: where nobody looks at the ledger, the same workload brings back the wrong KV."""
    tiny.copies.ignore_ledger()
    for slow_s in SLOW_S:
        tiny.copies.slow(slow_s)
        if _reuse(tiny, plain, slow_s):
            return
    raise AssertionError("wrong KV was not noticed, or there was none")


def test_l1_churns(plain: Plain) -> None:
    """L1 holds 30 blocks of the 60 that pass through again and again: some come back, all are right."""
    extra = {"l1": {"capacity_bytes": 30 * 53248}}
    with engine(transfer=faulty_config(**extra)) as started:
        asked = prompts([300, 150, 330, 90, 200, 310, 160, 250], "churn")
        expected = plain.generate(asked, 4)
        cached = 0
        for turn in range(3):
            order = range(len(asked)) if turn != 1 else reversed(range(len(asked)))
            for index in order:
                for _ in range(2):
                    [found] = started.generate([asked[index]], 4)
                    assert_same([expected[index]], [found])
                    cached += found.cached
                    started.forget()
        assert cached > 0
        assert started.l1().evictions > 0
        started.assert_nothing_leaked()


@pytest.mark.long
def test_preempted_for_long(small: Engine, plain: Plain) -> None:
    for seed in range(6):
        small.copies.slow([0.0, 0.002, SLOW_S[0]][seed % 3])
        asked = [*_workload(seed), *_workload((seed, 2)), prompt(300, seed)]
        for _ in range(2):
            assert_same(plain.generate(asked, 60), small.generate(asked, 60))
            small.forget()
    assert small.preemptions() > 20
