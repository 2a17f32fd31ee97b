"""The nodes that the pipeline's tests of the second tier run against."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.pipeline.sites import KINDS, Site, open_site


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say of what runs against InfiniStore that it does: its environment is made before the first test, where one wants it."""
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec") and "infinistore" in item.callspec.params.values():
            item.fixturenames = [*item.fixturenames, "infinistore_prepared"]


@pytest.fixture(params=KINDS)
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """A node of the test's own."""
    yield from open_site(request, is_mortal=True)
