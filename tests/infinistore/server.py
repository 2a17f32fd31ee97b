"""The real InfiniStore server as a child process that a test may kill, freeze and restart."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Self

from tests.infinistore.environment import HERE, Environment

READY_S = 30.0
ANSWER_S = 10.0


class ServerFailed(Exception):
    """The server did not become ready; the text ends with its log."""


class InfiniStoreServer:
    """One server on loopback, empty at each start. It ends with the process that started it, at the latest.

    ``pool_gb`` is its pool, which costs memory only as it fills; `address` stays the same over `restart`, unless told otherwise.
    Methods block, for half a second at a start and else hardly: a test on a loop may call them, or send them to a thread.
    """

    def __init__(self, environment: Environment, *, pool_gb: int = 1, allocation_kb: int = 64) -> None:
        self._environment = environment
        self._pool_gb = pool_gb
        self._allocation_kb = allocation_kb
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        self._killed = self._stopped = False
        self.port, self.manage_port = 0, 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        """Of the data port, as in `l2.nodes`."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self._running().pid

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def died_by(self) -> int | None:
        """The return code of a server that ended and that nobody here ended, negative for a signal; None while all is well."""
        return None if self._killed or self._process is None else self._process.poll()

    @property
    def log(self) -> str:
        """All it wrote since the first start."""
        return os.pread(self._log.fileno(), 1 << 24, 0).decode(errors="replace")

    def start(self, *, port: int | None = None) -> None:
        """On ``port``, or on a free one. Raises ServerFailed."""
        assert not self.is_alive, "it runs already"
        self._end()
        for _ in range(3):  # a free port may be somebody else's by the time the server binds it
            self.port, self.manage_port = port or free_port(), free_port()
            self._launch()
            if self._is_ready():
                return
            self._end()
            if port is not None:
                break
        raise ServerFailed(f"the InfiniStore server on port {self.port} did not become ready within {READY_S:.0f} s; its log:\n{self.log}")

    def kill(self) -> None:
        """SIGKILL. What it stored is gone, its connections are reset."""
        self._running()
        self._end()

    def stop(self) -> None:
        """SIGSTOP: it holds its connections, and the kernel accepts new ones for it, but nothing is answered until `cont`."""
        os.kill(self.pid, signal.SIGSTOP)
        self._stopped = True

    def cont(self) -> None:
        os.kill(self.pid, signal.SIGCONT)
        self._stopped = False

    def restart(self, *, same_port: bool = True) -> None:
        """Killed if it runs, and started: empty, on its port or on another."""
        if self.is_alive:
            self.kill()
        self.start(port=self.port if same_port else None)

    def check(self) -> None:
        """Raises AssertionError, with the end of its log, if it died or answers no more and it was not told to."""
        if self._killed or self._stopped or self._process is None:
            return
        tail = "\n".join(self.log.splitlines()[-60:])
        assert self.is_alive, f"something ended the server, return code {self.died_by}; its log ends:\n{tail}"
        try:
            self.stored()
        except OSError as error:
            raise AssertionError(f"something made the server answer no more ({error!r}); its log ends:\n{tail}") from error

    def close(self) -> None:
        self._end()
        self._log.close()

    def stored(self) -> int:
        """How many keys it has, by its own count."""
        return int(json.loads(self._manage("GET", "/kvmap_len"))["len"])

    def purge(self) -> None:
        """Forgets all keys. Their memory is freed by later evictions only."""
        self._manage("POST", "/purge")

    def resident_bytes(self) -> int:
        """Of memory."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def wait(self, timeout_s: float = 10.0) -> int:
        """Until it ended by itself: the return code. Raises subprocess.TimeoutExpired."""
        return self._running().wait(timeout_s)

    def expect_end(self, timeout_s: float = 10.0) -> int:
        """As `wait`, for a test that meant to end it."""
        code = self.wait(timeout_s)
        self._killed = True
        return code

    def _launch(self) -> None:
        ports = ("--service-port", str(self.port), "--manage-port", str(self.manage_port))
        pool = ("--prealloc-size", str(self._pool_gb), "--minimal-allocate-size", str(self._allocation_kb))
        self._killed = self._stopped = False
        self._process = subprocess.Popen(
            [self._environment.python, HERE / "serve.py", str(self._pool_gb + 2), *ports, *pool],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LD_PRELOAD": str(self._environment.libverbs), "PYTHONPATH": "", "PYTHONUNBUFFERED": "1"},
            cwd="/",
        )

    def _is_ready(self) -> bool:
        """The management port opens last, from within the loop that serves the data port."""
        for _ in range(int(READY_S / 0.02)):
            try:
                self._running().wait(0.02)
            except subprocess.TimeoutExpired:
                pass
            else:
                return False
            try:
                self.stored()
            except ConnectionRefusedError:
                continue
            except (OSError, http.client.HTTPException, ValueError):  # somebody else's port
                return False
            return True
        return False

    def _manage(self, method: str, path: str) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.manage_port, timeout=ANSWER_S)
        try:
            connection.request(method, path)
            return connection.getresponse().read()
        finally:
            connection.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the server was not started")
        return self._process

    def _end(self) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self._killed = True
            self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
