"""The harness around the real server: what it tells of a server that ended, and that nothing of it is left."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.infinistore import environment, raw
from tests.infinistore.environment import Environment, NotRun
from tests.infinistore.server import InfiniStoreServer, ServerFailed

TREE = Path(__file__).parent.parent.parent


def test_it_restarts_empty_on_its_port_or_on_another(infinistore_server: InfiniStoreServer) -> None:
    with raw.connect(infinistore_server) as connection:
        assert raw.stored(connection, "key", b"value") == raw.STORED
    assert infinistore_server.stored() == 1
    before = infinistore_server.address
    infinistore_server.restart()
    assert infinistore_server.address == before
    with raw.connect(infinistore_server) as connection:
        assert not raw.exists(connection, "key")
    infinistore_server.restart(same_port=False)
    assert infinistore_server.address != before
    assert infinistore_server.stored() == 0


def test_a_frozen_server_answers_when_it_goes_on(infinistore_server: InfiniStoreServer) -> None:
    with raw.connect(infinistore_server) as connection:
        infinistore_server.stop()
        connection.sendall(raw.exist("key"))
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        infinistore_server.cont()
        connection.settimeout(10)
        assert raw.numbers(connection, 2) == [raw.STORED, 1]


def test_one_that_something_else_ended_is_told(infinistore_environment: Environment) -> None:
    with InfiniStoreServer(infinistore_environment) as server:
        server.check()
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
        assert server.died_by == -signal.SIGKILL
        with pytest.raises(AssertionError, match=r"ended the server, return code -9; its log ends:\n(.*\n)*.*server started"):
            server.check()
        server.start()
        server.kill()
        assert server.died_by is None
        server.check()


def test_a_port_that_is_taken_is_told_with_the_log(infinistore_server: InfiniStoreServer, infinistore_environment: Environment) -> None:
    second = InfiniStoreServer(infinistore_environment)
    with pytest.raises(ServerFailed, match=f"on port {infinistore_server.port} did not become ready(.*\n)*.*address already in use"):
        second.start(port=infinistore_server.port)
    second.close()


def test_it_ends_with_the_process_that_started_it(infinistore_environment: Environment) -> None:
    program = (
        "from tests.infinistore.environment import prepare\n"
        "from tests.infinistore.server import InfiniStoreServer\n"
        "import os, sys\n"
        "server = InfiniStoreServer(prepare()); server.start()\n"
        "print(server.pid, flush=True); os.kill(os.getpid(), 9)\n"
    )
    child = subprocess.run([sys.executable, "-c", program], cwd=TREE, capture_output=True, text=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr
    try:
        server = os.pidfd_open(int(child.stdout))
    except ProcessLookupError:
        return
    ended, _, _ = select.select([server], [], [], 10)
    os.close(server)
    assert ended


def test_no_compiler_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NotRun, match="no C compiler; install gcc"):
        environment.built(tmp_path)
