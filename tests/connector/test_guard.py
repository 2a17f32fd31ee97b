"""No exception leaves a hook, not even one of what is to make up for it."""

from __future__ import annotations

from typing import Any

import pytest

from kvoffload.connector.guard import never_raises


class Hooks:
    """A connector with one hook of each kind; ``faults`` says what raises."""

    def __init__(self, *faults: str) -> None:
        self.faults = faults
        self.told: list[tuple[str, str]] = []
        self.made_up: list[tuple[Any, ...]] = []

    def hook_failed(self, hook: str, error: Exception) -> None:
        self.told.append((hook, str(error)))
        self.fault("telling")

    def fault(self, where: str) -> None:
        if where in self.faults:
            raise RuntimeError(where)

    @never_raises("neutral")
    def plain(self, number: int) -> str:
        """Says its number."""
        self.fault("hook")
        return f"said {number}"

    def _instead(self, number: int) -> str:
        self.made_up.append((number,))
        self.fault("instead")
        return f"made up {number}"

    @never_raises("neutral", _instead)
    def with_instead(self, number: int, *, twice: bool = False) -> str:
        self.fault("hook")
        return f"said {number * (1 + twice)}"


def test_what_works_is_not_touched() -> None:
    hooks = Hooks()
    assert hooks.plain(1) == "said 1"
    assert hooks.with_instead(2, twice=True) == "said 4"
    assert (hooks.told, hooks.made_up) == ([], [])
    assert (Hooks.plain.__name__, Hooks.plain.__doc__) == ("plain", "Says its number.")


@pytest.mark.parametrize("also", [(), ("telling",)])
def test_a_failure_is_told_and_vllm_gets_what_is_neutral(also: tuple[str, ...]) -> None:
    hooks = Hooks("hook", *also)
    assert hooks.plain(1) == "neutral"
    assert hooks.with_instead(2) == "made up 2"
    assert hooks.told == [("plain", "hook"), ("with_instead", "hook")]
    assert hooks.made_up == [(2,)]


def test_what_makes_up_for_it_may_fail_too() -> None:
    hooks = Hooks("hook", "telling", "instead")
    assert hooks.with_instead(3) == "neutral"
    assert hooks.made_up == [(3,)]


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_ends_of_the_process_pass(end: type[BaseException]) -> None:
    class Ends(Hooks):
        def fault(self, where: str) -> None:
            raise end

    with pytest.raises(end):
        Ends().plain(1)
