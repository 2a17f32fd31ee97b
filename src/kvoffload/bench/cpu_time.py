"""CPU time of this process and of kvoffload's threads in it."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

OURS = "kvoffload"


def cpu_seconds() -> dict[str, float]:
    """Seconds of CPU so far: ``process``, and each live thread of ours by its name."""
    found = {"process": time.process_time()}
    for thread in threading.enumerate():
        if thread.name.startswith(OURS) and thread.native_id is not None:
            found[thread.name] = found.get(thread.name, 0.0) + thread_seconds(thread.native_id)
    return found


def thread_seconds(native_id: int, proc: Path = Path("/proc/self/task")) -> float:
    """CPU time of one thread of this process, to the nanosecond where the kernel keeps schedstat. 0.0 when it is gone."""
    directory = proc / str(native_id)
    try:
        fields = (directory / "schedstat").read_text().split()
        if fields and fields[0] != "0":
            return int(fields[0]) / 1e9
        # Fields are counted from behind the name, which may hold spaces. utime and stime are the 14th and 15th of all.
        fields = (directory / "stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
