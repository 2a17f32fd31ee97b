"""Runs the real InfiniStore server inside its own environment: `python serve.py <address space in GB> <the server's own arguments>`.

Ends when its standard input does, so that no server outlives the tests. Imports nothing of the project.
"""

import os
import resource
import sys
import threading

from infinistore import server


def leave_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(0)


gigabytes = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30, gigabytes << 30))  # some requests make it allocate without end
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
server.prevent_oom = lambda: None  # writes to oom_score_adj what only root may, and nothing here should be spared
threading.Thread(target=leave_with_parent, daemon=True).start()
server.main()
