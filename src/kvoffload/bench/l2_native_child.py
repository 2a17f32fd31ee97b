"""Runs in a Python that has InfiniStore's native client, and perhaps nothing of ours: ``python l2_native_child.py HOST PORT``.

The native client hangs for ever on a key that is missing, and ends its process with the server's: so it has a process to itself.
A JSON line in, ``[operation, tag, size, count]``; a JSON line out, ``{"seconds": ...}`` or ``{"error": ...}``. Imports nothing of
the project.
"""

import json
import os
import sys
import time
from typing import Any


def key(tag: str, index: int) -> str:
    """As long as names of ours are."""
    return f"{tag}:{index:040}"


def perform(client: Any, numpy: Any, operation: str, tag: str, size: int, count: int) -> float:
    """Seconds for so many values of ``size`` bytes, one after another."""
    keys = [key(tag, index) for index in range(count)]
    buffer = numpy.ones(size, numpy.uint8)
    if operation == "get" and not all(client.check_exist(name) for name in keys):
        raise RuntimeError("the server has evicted some of what was put: is its pool too small, or busy with others' values?")
    begun = time.perf_counter()
    if operation == "put":
        for name in keys:
            client.tcp_write_cache(name, buffer.ctypes.data, size)
    elif operation == "get":
        for name in keys:
            client.tcp_read_cache(name)
    else:
        client.delete_keys(keys)
    return time.perf_counter() - begun


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the client logs to standard output

    def answer(**what: object) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    try:
        import numpy as np

        import infinistore

        config = infinistore.ClientConfig(
            host_addr=sys.argv[1], service_port=int(sys.argv[2]), connection_type=infinistore.TYPE_TCP, log_level="error"
        )
        client = infinistore.InfinityConnection(config)
        client.connect()
    except Exception as error:  # whatever is wrong, who started this is to hear of it
        answer(error=f"{type(error).__name__}: {error}")
        return
    answer(seconds=0.0)
    for line in sys.stdin:
        try:
            answer(seconds=perform(client, np, *json.loads(line)))
        except Exception as error:
            answer(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
