"""``kvoffload members`` on a real server: what it prints, what it writes, and what it exits with."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

import pytest
from tests.l2.test_nodes_table import MALFORMED, node, table

from kvoffload.cli import main
from kvoffload.cli.members import Table
from kvoffload.config import MembershipSettings
from kvoffload.l2.nodes_table import SLOTS, parse_table
from kvoffload.testing.valkey import ValkeyServer, free_port

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def shared() -> Iterator[ValkeyServer]:
    with ValkeyServer(requirepass="hunter2secret") as started:
        yield started


@pytest.fixture
def server(shared: ValkeyServer) -> ValkeyServer:
    shared.command("FLUSHALL")
    return shared


@pytest.fixture
def members(server: ValkeyServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command against the server, whose URL is in the variable; its status, stdout and stderr."""
    monkeypatch.setenv("KVOFFLOAD_L2_MEMBERSHIP_URL", server.url)

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["members", *arguments])
        captured = capsys.readouterr()
        assert "hunter2secret" not in captured.out + captured.err
        return status, captured.out, captured.err

    return run


def put(server: ValkeyServer, data: bytes, key: str = "kvcache_nodes") -> None:
    assert server.command("SET", key, data) == b"+OK"


def get(server: ValkeyServer, key: str = "kvcache_nodes") -> bytes | None:
    return Table(MembershipSettings.model_validate({"url": server.url, "key": key})).read()


def test_set_writes_a_table_that_list_shows(server: ValkeyServer, members: Command) -> None:
    status, out, err = members("set", "kv-1=[fd00::2]:12345", "kv-0=10.0.0.11:12345")
    assert (status, err) == (0, "")
    assert "written" in out
    written, problems = parse_table(get(server) or b"")
    assert problems == ()
    assert written.version == 1
    assert [str(node) for node in written.nodes] == ["kv-0=10.0.0.11:12345", "kv-1=[fd00::2]:12345"]
    status, out, err = members("list")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "version 1, 2 nodes"
    shares = {line.split()[0]: line.split()[1:] for line in lines[3:]}
    assert shares["kv-1"][0] == "[fd00::2]:12345"
    assert sum(int(share[1]) for share in shares.values()) == SLOTS
    assert all(share[2].endswith("%") for share in shares.values())


def test_versions_count_on_and_what_moves_is_told(server: ValkeyServer, members: Command) -> None:
    members("set", "a=h1:1", "b=h2:1", "c=h3:1")
    status, out, _ = members("set", "a=h1:1", "b=h9:1", "d=h4:1")
    assert status == 0
    assert "new: d; gone: c; new address: b" in out
    told = re.search(r"(\d+) of 4096 slots \(\d+%\) get another owner", out)
    assert told is not None
    assert 0.25 < int(told[1]) / SLOTS < 0.75, "those of c, which left, and the share of d"
    assert parse_table(get(server) or b"")[0].version == 2


def test_the_same_again_writes_nothing(server: ValkeyServer, members: Command) -> None:
    members("set", "a=h1:1", "b=h2:1")
    before = get(server)
    status, out, _ = members("set", "b=h2:1", "a=H1:1")
    assert (status, get(server)) == (0, before)
    assert "nothing to change: version 1" in out


def test_a_dry_run_writes_nothing(server: ValkeyServer, members: Command) -> None:
    status, out, _ = members("set", "--dry-run", "a=h1:1")
    assert (status, get(server)) == (0, None)
    assert "version 1, 1 nodes" in out
    assert "dry run" in out


def test_a_flag_wins_over_a_variable(server: ValkeyServer, members: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVOFFLOAD_L2_MEMBERSHIP_URL", "redis://127.0.0.1:1")
    monkeypatch.setenv("KVOFFLOAD_L2_MEMBERSHIP_KEY", "mine")
    assert members("set", "--url", server.url, "a=h:1")[0] == 0
    assert get(server, "mine") is not None
    assert members("set", "--url", server.url, "--key", "yours", "a=h:1")[0] == 0
    assert get(server, "yours") is not None
    assert get(server) is None


def test_problems_are_listed(server: ValkeyServer, members: Command) -> None:
    put(server, table(node("kv-0", (4000, 10)), node("kv-1", (11, 2000))))
    status, out, _ = members("list")
    assert status == 0
    assert "problem: node kv-0: a range that wraps" in out


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_table_is_told_and_can_be_replaced(what: str, server: ValkeyServer, members: Command) -> None:
    put(server, MALFORMED[what][0])
    status, out, err = members("list")
    assert (status, out) == (1, "")
    assert "table" in err
    assert members("set", "a=h:1")[0] == 0
    assert parse_table(get(server) or b"")[0].nodes[0].name == "a"


def test_the_version_of_a_malformed_table_is_counted_on_where_it_can_be_read(server: ValkeyServer, members: Command) -> None:
    put(server, b'{"nodes": 3, "version": 41}')
    _, out, _ = members("set", "a=h:1")
    assert parse_table(get(server) or b"")[0].version == 42
    assert "the table that is there is replaced" in out
    put(server, b"hello")
    _, out, _ = members("set", "a=h:1")
    assert "its version cannot be read" in out


def test_no_table(members: Command) -> None:
    status, _, err = members("list")
    assert status == 1
    assert "no table under 'kvcache_nodes'" in err


def test_a_key_of_another_type_is_left_alone(server: ValkeyServer, members: Command) -> None:
    server.command("HSET", "kvcache_nodes", "a", "b")
    for arguments in (["list"], ["set", "a=h:1"]):
        status, _, err = members(*arguments)
        assert status == 1
        assert "of another type" in err
    assert server.command("TYPE", "kvcache_nodes") == b"+hash"


def test_no_redis_and_a_wrong_password(server: ValkeyServer, members: Command) -> None:
    for url in (f"redis://:hunter2secretly@127.0.0.1:{server.port}", f"redis://:hunter2secret@127.0.0.1:{free_port()}"):
        status, out, err = members("list", "--url", url)
        assert (status, out) == (1, "")
        assert err.startswith("kvoffload members: Redis: ")


def test_who_writes_meanwhile_is_not_lost(server: ValkeyServer) -> None:
    redis = Table(MembershipSettings.model_validate({"url": server.url}))
    put(server, b"one")
    old = redis.read()
    put(server, b"two")
    assert not redis.replace(old, b"mine"), "it was another before the transaction"
    assert not redis.replace(b"two", b"mine", before_execution=lambda: put(server, b"three")), "it became another within it"
    assert redis.replace(b"three", b"mine")
    assert get(server) == b"mine"
    assert not redis.replace(None, b"mine"), "there was none when we looked"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["set", "a"], "is not NAME=HOST:PORT"),
        (["set", "a=h"], "is not NAME=HOST:PORT"),
        (["set", "a=h:x"], "is not NAME=HOST:PORT"),
        (["set", "a=h:1/x"], "is not NAME=HOST:PORT"),
        (["set", "a=me@h:1"], "is not NAME=HOST:PORT"),
        (["set", "a=redis://h:1"], "is not NAME=HOST:PORT"),
        (["set", "=h:1"], "no name of a node"),
        (["set", "a b=h:1"], "no name of a node"),
        (["set", "a=h:0"], "0 is no port"),
        (["set", "a=10.0.0.300:1"], "neither a host name nor"),
        (["set", "a=h:1", "a=h:2"], "names of their own"),
        (["set", "a=h:1", "b=H:1"], "the same address: h:1"),
        (["list", "--url", "http://h"], "--url must start with"),
        (["list", "--key", ""], "--key is empty"),
    ],
)
def test_nonsense_is_refused_before_anybody_is_asked(arguments: list[str], text: str, server: ValkeyServer, members: Command) -> None:
    status, out, err = members(*arguments)
    assert (status, out) == (2, "")
    assert text in err
    assert get(server) is None


def test_a_url_is_needed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVOFFLOAD_L2_MEMBERSHIP_URL", raising=False)
    assert main(["members", "list"]) == 2
    assert "which Redis?" in capsys.readouterr().err


def test_wrong_variables_are_told(members: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVOFFLOAD_L2_MEMBERSHIP_TIMEOUT_MS", "soon")
    status, _, err = members("list")
    assert status == 2
    assert "KVOFFLOAD_L2_MEMBERSHIP_TIMEOUT_MS" in err


@pytest.mark.parametrize("arguments", [["members"], ["members", "set"], ["members", "drop"]])
def test_wrong_use_is_explained(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2
    assert "usage: kvoffload members" in capsys.readouterr().err


def test_what_is_written_is_json_in_aibrix_shape(server: ValkeyServer, members: Command) -> None:
    members("set", "only=10.0.0.1:12345")
    written = {"name": "only", "addr": "10.0.0.1", "port": 12345, "slots": [{"start": 0, "end": 4095}]}
    assert json.loads(get(server) or b"") == {"nodes": [written], "version": 1}
