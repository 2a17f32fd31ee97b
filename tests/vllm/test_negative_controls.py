"""What must fail: each way of bringing back something else than what was saved makes the tests' own check fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from tests.vllm.connectors import faulty_config
from tests.vllm.harness import Engine, engine
from tests.vllm.outputs import assert_same, difference
from tests.vllm.plain import Plain
from tests.vllm.prompts import prompt
from tests.vllm.roundtrip import check_hits, check_roundtrip

from kvoffload.testing.copy_faults import FaultyCopyEngine


@pytest.fixture(scope="module")
def served(plain: Plain) -> Iterator[Engine]:
    with engine(transfer=faulty_config()) as started:
        yield started
        started.assert_nothing_leaked()


Spoil = Callable[[FaultyCopyEngine], None]
FAULTS: dict[str, tuple[Spoil, Spoil]] = {
    "a byte altered on save": (lambda copies: copies.corrupt_next("save"), lambda copies: None),
    "a byte altered on load": (lambda copies: None, lambda copies: copies.corrupt_next("load")),
    "two blocks swapped on save": (lambda copies: copies.swap_next("save"), lambda copies: None),
    "two blocks swapped on load": (lambda copies: None, lambda copies: copies.swap_next("load")),
    "a load claimed and not done": (lambda copies: None, lambda copies: copies.lie_next_load()),
}


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_fault_is_seen(served: Engine, plain: Plain, fault: str | None) -> None:
    asked = [prompt(300, fault)]
    on_save, on_load = FAULTS[fault] if fault is not None else (lambda copies: None, lambda copies: None)
    on_save(served.copies)
    served.generate(asked)
    kv = [served.kv_of(asked[0])]
    served.forget()
    on_load(served.copies)
    if fault is None:
        check_hits(served, plain, asked, kv=kv)
    else:
        with pytest.raises(AssertionError, match=r"other bytes|outputs differ"):
            check_hits(served, plain, asked, kv=kv)
    served.reset()


def test_a_load_not_done_changes_what_is_said(served: Engine, plain: Plain) -> None:
    """Outputs alone tell as well: in several processes there is nothing else to look at."""
    asked = prompt(300, "said")
    check_roundtrip(served, plain, [asked])
    served.forget()
    served.copies.lie_next_load()
    [wrong] = served.generate([asked])
    assert wrong.cached == 288
    assert difference(plain.generate([asked])[0], wrong) is not None
    served.reset()


def test_a_failed_load_is_computed_instead(served: Engine, plain: Plain) -> None:
    """Not every fault must show: what the copy engine admits, the engine computes again."""
    asked = [prompt(300, "failed"), prompt(200, "failed")]
    check_roundtrip(served, plain, asked)
    served.forget()
    served.copies.fail_next(1, "load")
    assert_same(plain.generate(asked), served.generate(asked))
    served.forget()
    served.copies.fail_next(100, "save")
    new = [prompt(150, "never saved")]
    assert_same(plain.generate(new), served.generate(new))
    served.forget()
    assert served.generate(new)[0].cached == 0
