"""SIGTERM and SIGKILL to each of vLLM's processes, and an orderly end: nothing of ours is left that vLLM's own processes do not hold."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.vllm import environment
from tests.vllm.insides import until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

END_S = 90.0
"""For all of vLLM's processes to end; takes seconds, on a busy machine more."""

SERVE = """
import sys
from tests.vllm.connectors import transfer_config
from tests.vllm.harness import Engine
from tests.vllm.prompts import prompts
if __name__ == "__main__":
    served = Engine(processes=int(sys.argv[1]), transfer=transfer_config())
    asked = prompts([300, 200], "signals")
    served.generate(asked, 4)
    served.forget()
    hits = served.generate(asked, 4)
    print("served", [hit.cached for hit in hits], flush=True)
    try:
        for line in sys.stdin:
            pass
    finally:
        if sys.argv[2] == "close":
            served.close()
"""


class Running:
    """An engine in processes of its own."""

    def __init__(self, processes: int, how: str, temporary: Path) -> None:
        path = os.pathsep.join([str(environment.ROOT / "src"), str(environment.ROOT)])
        # vLLM's own socket paths are long: the temporary directory must not be.
        variables = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(temporary)}
        program = temporary / "serve.py"
        program.write_text(SERVE)
        self.errors = temporary / "stderr"
        self._started: dict[int, str] = {}
        with self.errors.open("w") as errors:
            self.parent = subprocess.Popen(
                [sys.executable, str(program), str(processes), how],
                env=variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def wait_served(self) -> str:
        assert self.parent.stdout is not None
        for line in self.parent.stdout:
            if line.startswith("served"):
                self._started = {pid: started_at(pid) for pid in [self.parent.pid, *descendants(self.parent.pid)]}
                return line
        raise AssertionError(self.errors.read_text()[-4000:])

    def processes(self) -> dict[int, str]:
        """Those of its processes that have not ended, by id, with their titles; what waits to be reaped has ended."""
        found = {}
        for pid, started in self._started.items():
            with suppress(OSError):
                if started_at(pid) == started and (title := Path(f"/proc/{pid}/cmdline").read_bytes()):
                    found[pid] = title.replace(b"\0", b" ").decode().strip()
        return found

    def pid_of(self, which: str) -> int:
        """Of "parent", "EngineCore" or "Worker"."""
        if which == "parent":
            return self.parent.pid
        [pid] = [pid for pid, title in self.processes().items() if title.startswith("VLLM") and which in title]
        return pid

    def end(self) -> None:
        if self.parent.stdin is not None:
            with suppress(OSError):
                self.parent.stdin.close()

    def kill_all(self) -> None:
        for pid in self.processes() or [self.parent.pid]:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.end()
        assert self.parent.stdout is not None
        self.parent.stdout.close()
        self.parent.wait(30)


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def started_at(pid: int) -> str:
    """Tells a process from a later one of the same id."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]


def memories(pids: Iterable[int] = ()) -> dict[tuple[int, int], set[int]]:
    """Our shared memories by device and inode, and the processes that hold them."""
    found: dict[tuple[int, int], set[int]] = {}
    for pid in pids or [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]:
        with suppress(OSError):
            for number in os.listdir(f"/proc/{pid}/fd"):
                with suppress(OSError):
                    path = f"/proc/{pid}/fd/{number}"
                    if os.readlink(path).startswith("/memfd:kvoffload"):
                        stat = os.stat(path)
                        found.setdefault((stat.st_dev, stat.st_ino), set()).add(pid)
    return found


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Short, as pytest's own are too long for the paths of vLLM's sockets."""
    with tempfile.TemporaryDirectory(prefix="kv") as directory:
        yield Path(directory)


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if "kvoffload" in name}


def check_signal(temporary: Path, processes: int, which: str, number: signal.Signals) -> None:
    before = shared_memory()
    running = Running(processes, "leave", temporary)
    try:
        assert "served [288, 192]" in running.wait_served()
        mine = set(memories(list(running.processes())))
        assert len(mine) == 2, "a segment and a ledger"
        os.kill(running.pid_of(which), number)
        if which == "parent":
            running.parent.wait(END_S)
            # What vLLM orphans is ended by whoever cleans up: what we hold has to go with it.
            for pid, title in running.processes().items():
                if "EngineCore" in title:
                    os.kill(pid, signal.SIGTERM)
        else:
            until(lambda: number_of(running, which) == 0, f"{which} has ended", END_S)
            running.end()
        until(lambda: not running.processes(), f"all have ended, but {running.processes()}", END_S)
        assert not mine & set(memories())
        assert left(temporary) == []
        assert shared_memory() <= before
    finally:
        running.kill_all()


def number_of(running: Running, which: str) -> int:
    return sum(title.startswith("VLLM") and which in title for title in running.processes().values())


def left(temporary: Path) -> list[str]:
    """Of ours in the temporary directory; vLLM leaves what it leaves."""
    return [str(path) for path in temporary.rglob("*") if "kvoffload" in path.name and "kvoffload-test-models" not in str(path)]


def test_sigkill_in_process(temporary: Path) -> None:
    check_signal(temporary, 1, "parent", signal.SIGKILL)


CASES = [(1, "parent"), (2, "parent"), (2, "Worker"), (3, "parent"), (3, "EngineCore"), (3, "Worker")]


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize(("processes", "which"), CASES)
def test_a_signal(temporary: Path, processes: int, which: str, number: signal.Signals) -> None:
    check_signal(temporary, processes, which, number)


@pytest.mark.long
@pytest.mark.parametrize(("processes", "how"), [(1, "leave"), (1, "close"), (2, "leave"), (3, "leave")])
def test_an_orderly_end_is_quiet_and_leaves_nothing(temporary: Path, processes: int, how: str) -> None:
    running = Running(processes, how, temporary)
    try:
        running.wait_served()
        mine = set(memories(list(running.processes())))
        running.end()
        assert running.parent.wait(END_S) == 0
        until(lambda: not running.processes(), "all have ended", END_S)
        assert not mine & set(memories())
        assert left(temporary) == []
        said = [line for line in running.errors.read_text().splitlines() if "[kvoffload" in line or "kvoffload-" in line]
        assert said == []
    finally:
        running.kill_all()
