"""Servers of this machine, as if they were far away."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from kvoffload.errors import PeerError

CHILD = Path(__file__).parent / "l2_far_child.py"


class FarAway:
    """Redis or Valkey servers on these ports of 127.0.0.1, at ``urls``, a round trip of ``round_trip_s`` away; a context manager."""

    def __init__(self, ports: Sequence[int], round_trip_s: float) -> None:
        """Raises PeerError."""
        command = (sys.executable, str(CHILD), str(round_trip_s / 2), *map(str, ports))
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        lines = [self._process.stdout.readline() for _ in ports]
        if not all(lines):
            self.close()
            raise PeerError("the child process that delays what servers say did not start")
        self.urls = [f"redis://127.0.0.1:{int(line)}" for line in lines]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
