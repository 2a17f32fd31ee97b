"""Each rule of the stand-in is broken once: the call answers what CUDA documents, and the stand-in says which rule that was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.cuda.standin import Standin
from tests.cuda.standin_breakers import BREAKERS
from tests.cuda.standin_rig import ANY, STREAM, Gpu, opened, pages

pytestmark = pytest.mark.cuda


@pytest.fixture
def gpu(standin: Standin) -> Iterator[Gpu]:
    with opened(standin) as device:
        yield device


def test_every_rule_is_broken_here(standin: Standin) -> None:
    assert set(BREAKERS) == set(standin.rules())


@pytest.mark.parametrize("rule", BREAKERS)
def test_rule(gpu: Gpu, rule: str) -> None:
    breaker, answer = BREAKERS[rule]
    assert breaker(gpu) == answer
    assert {violation.rule for violation in gpu.standin.violations()} == {rule}
    gpu.standin.expect(rule)


def test_what_breaks_no_rule_is_no_violation(gpu: Gpu) -> None:
    slots, kv, stream, event = gpu.pinned(), gpu.device(value=3), gpu.stream(), gpu.event()
    assert gpu.batch(stream, [(slots[i * 64 :], kv[i * 128 :], 64) for i in range(8)]) == 0
    gpu.record(event, stream)
    gpu.do("cuEventSynchronize", event)
    assert (slots[:512] == 3).all()
    assert (slots[512:] == 0).all()
    assert gpu.standin.violations() == []


def test_a_violation_says_who_and_what(gpu: Gpu) -> None:
    gpu.call("cuStreamSynchronize", 0x1234)
    violation = gpu.standin.expect("unknown-handle")[0]
    assert (violation.function, violation.call) == ("cuStreamSynchronize", gpu.standin.calls("cuStreamSynchronize")[0].number)
    assert str(violation) == "[unknown-handle] cuStreamSynchronize: 0x1234 never was a stream"


def test_check_raises_for_violations_and_for_leaks(gpu: Gpu) -> None:
    event = gpu.event()
    with pytest.raises(AssertionError, match=r"\[leak\] event 0x[0-9a-f]+, made by call \d+"):
        gpu.standin.check()
    gpu.call("cuEventRecord", event, 0x1234)
    with pytest.raises(AssertionError, match=r"\[unknown-handle\] cuEventRecord"):
        gpu.standin.check(leaks=False)
    with pytest.raises(AssertionError, match="nothing broke the rule race"):
        gpu.standin.expect("race")
    gpu.standin.expect("unknown-handle")


def test_rules_hold_for_both_forms_of_a_batch(gpu: Gpu) -> None:
    slots, kv, stream = gpu.pinned(), gpu.device(), gpu.stream()
    for form in (12080, 13000):
        assert gpu.batch(stream, [(slots, kv, 16), (slots[16:], kv[16:], 16)], orders=[STREAM, ANY], indices=[0, 1], form=form) == 0
        assert gpu.batch(stream, [(slots, kv, 16), (slots[16:], kv[16:], 16)], orders=[STREAM, ANY], indices=[0, 2], form=form) == 1
        gpu.standin.expect("batch-attributes")
        assert gpu.batch(stream, [(slots, kv, 16), (pages(1), kv[16:], 16)], form=form) == 1
        gpu.standin.expect("batch-pageable")
    assert gpu.failed_index.value == 1  # only the older form says which copy it was
    gpu.standin.wait_idle()
