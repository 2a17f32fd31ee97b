"""What the real InfiniStore server does, as far as our client rests on it: raw sockets, nothing of ours in between."""

from __future__ import annotations

from tests.infinistore.server import InfiniStoreServer


def test_a_server_starts_counts_and_restarts_empty(infinistore_server: InfiniStoreServer) -> None:
    assert infinistore_server.stored() == 0
    before = infinistore_server.address
    infinistore_server.restart()
    assert infinistore_server.address == before
    infinistore_server.restart(same_port=False)
    assert infinistore_server.address != before
    assert infinistore_server.is_alive
    assert infinistore_server.died_by is None
