"""The compiled loops in numba's cache. What they do is tested through the client."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kvoffload


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_change_in_any_of_its_files_compiles_the_loops_again(tmp_path: Path) -> None:
    """numba by itself would look at the loops' own file alone."""
    package = tmp_path / "src" / "kvoffload"
    shutil.copytree(Path(kvoffload.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))

    def compiled() -> set[str]:
        environ = {**os.environ, "PYTHONPATH": str(package.parent), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
        script = "from kvoffload.l2 import infinistore_native as native; print(native.__file__); native.loops()"
        answer = subprocess.run([sys.executable, "-c", script], env=environ, check=True, capture_output=True, text=True)
        assert str(package) in answer.stdout
        return {path.name for path in (tmp_path / "cache").rglob("infinistore_native.*.nbc")}

    first = compiled()  # find, read and write; find and read again, keeping the lock
    assert len(first) == 5
    assert compiled() == first
    for name in ("infinistore_socket.py", "infinistore_wire.py", "system_calls.py"):
        before = compiled()
        with (package / "l2" / name).open("a") as file:
            file.write("# changed")
        assert len(compiled()) == len(before) + 5


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_the_loops_that_wait_let_go_of_the_lock_and_the_others_keep_it(tmp_path: Path) -> None:
    """Also when they come from numba's cache, which by itself would give one for the other."""
    environ = {**os.environ, "PYTHONPATH": str(Path(kvoffload.__file__).parent.parent), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    for _ in range(2):
        answer = subprocess.run([sys.executable, "-c", _TICKS], env=environ, check=True, capture_output=True, text=True)
        let_go, kept = map(int, answer.stdout.split())
        assert let_go > 20
        assert kept < 5


_TICKS = """
import socket, sys, threading, time
from kvoffload.l2 import infinistore_native as native, infinistore_socket as wired
from kvoffload.l2.infinistore_transfers import address_of
sys.setswitchinterval(1e-5)

def ticks(ask):
    ours, theirs = socket.socketpair()
    control, address = wired.new_control()
    control[wired.DEADLINE_NS] = time.monotonic_ns() + 500_000_000
    request, answers = bytearray(b"request"), bytearray(8)
    memory = address_of(request), len(request), address_of(answers), len(answers)
    status, count = [], 0
    thread = threading.Thread(target=lambda: status.append(ask(ours.fileno(), *memory, address)))
    thread.start()
    while thread.is_alive():
        thread.join(0.001)
        count += 1
    assert status == [wired.EXPIRED], status
    return count

loops = native.loops()
print(ticks(loops.ask), ticks(loops.ask_at_once))
"""
