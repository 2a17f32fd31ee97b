"""The real server as fixtures, for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.infinistore.environment import Environment, NotRun, prepare
from tests.infinistore.server import InfiniStoreServer

__all__ = [
    "infinistore_environment",
    "infinistore_prepared",
    "infinistore_server",
    "infinistore_session",
    "infinistore_shared",
    "pytest_collection_finish",
]

PREPARED = pytest.StashKey[Environment | NotRun]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Its environment may take a minute to make, once: done here, before any test's timeout begins."""
    wanted = any("infinistore_prepared" in getattr(item, "fixturenames", ()) for item in session.items)
    if not wanted or session.config.option.collectonly or PREPARED in session.config.stash:
        return
    try:
        session.config.stash[PREPARED] = prepare()
    except NotRun as reason:
        session.config.stash[PREPARED] = reason


@pytest.fixture(scope="session")
def infinistore_prepared(pytestconfig: pytest.Config) -> Environment | NotRun:
    return pytestconfig.stash[PREPARED]


@pytest.fixture
def infinistore_environment(infinistore_prepared: Environment | NotRun) -> Environment:
    """The server's Python, with the native client in it, and the stand-in to preload. Skips where there is none."""
    if isinstance(infinistore_prepared, NotRun):
        pytest.skip(f"InfiniStore server not run: {infinistore_prepared}")
    return infinistore_prepared


@pytest.fixture(scope="session")
def infinistore_session(infinistore_prepared: Environment | NotRun) -> Iterator[InfiniStoreServer | None]:
    if isinstance(infinistore_prepared, NotRun):
        yield None
        return
    with InfiniStoreServer(infinistore_prepared) as server:
        yield server


@pytest.fixture
def infinistore_shared(infinistore_session: InfiniStoreServer | None, infinistore_environment: Environment) -> Iterator[InfiniStoreServer]:
    """One server for the whole session, emptied before each test; not to be killed or frozen."""
    assert infinistore_session is not None
    try:
        infinistore_session.purge()
    except OSError:  # the test that ended or froze it has failed already
        infinistore_session.restart(same_port=False)
    yield infinistore_session
    infinistore_session.check()


@pytest.fixture
def infinistore_server(infinistore_environment: Environment) -> Iterator[InfiniStoreServer]:
    """A server of the test's own, which must outlive the test unless the test itself ended it."""
    with InfiniStoreServer(infinistore_environment) as server:
        yield server
        server.check()
