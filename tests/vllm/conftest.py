"""Fixtures of the tests with real vLLM, which share one plain vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.vllm.plain import Plain

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in Path(str(item.path)).parents and "plain" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.vllm)
            # Others' warnings, of a program that is started in here, are none of our tests' business.
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(300))


@pytest.fixture(scope="session")
def plain() -> Iterator[Plain]:
    """vLLM without connector, the reference of every comparison."""
    pytest.importorskip("vllm")
    reference = Plain()
    yield reference
    reference.close()
