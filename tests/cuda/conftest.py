"""All tests here run on the stand-in for libcuda, in this very process: no test that asks for a GPU may share it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.cuda import standin as module


@pytest.fixture(scope="session", autouse=True)
def loaded() -> module.Standin:
    """Before anything asks for a driver."""
    return module.load()


@pytest.fixture
def standin(loaded: module.Standin) -> Iterator[module.Standin]:
    """A machine as after start-up. When the test has ended nothing is left of what it made, and no rule was broken."""
    loaded.reset()
    yield loaded
    loaded.check()
    loaded.reset()
