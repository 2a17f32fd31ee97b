"""Every `@pytest.mark.anyio` test runs on asyncio and on trio, in virtual time; `@pytest.mark.real_clock` gives it the real one."""

from __future__ import annotations

from typing import Any

import pytest

from kvoffload.testing.clock import virtual_backend

pytest_plugins = ["tests.infinistore.fixtures"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "real_clock: this anyio test runs on the real clock, as it works with threads or processes")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    if request.node.get_closest_marker("real_clock"):
        return request.param, {}
    return virtual_backend(request.param)
