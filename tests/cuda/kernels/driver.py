"""Run the cases in a process of their own: with a sanitizer, or for many mutants, of which some crash and some never end.

    python -m tests.cuda.kernels.driver LIBRARY [--guard BYTES] [--offend WHAT] [--prefix NAME ...]

Prints one line of JSON: for each prefix what the first failing case said, or null. Imports numpy and no more: it is started often.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Mapping

import numpy as np
from tests.cuda.kernels.cases import GUARD, Check, cases
from tests.cuda.kernels.large import LARGE
from tests.cuda.kernels.shim import KERNELS, Geometry, Launch, Shim

CASE_CPU_S = 0.3
"""Processor time that a case of a mutant may take, many times what the slowest takes: an endless loop is a failure too."""


def first_failure(shim: Shim, checks: Mapping[str, Check], limit_s: float = 0) -> str | None:
    for name, check in checks.items():
        for kernel in KERNELS:
            signal.setitimer(signal.ITIMER_VIRTUAL, limit_s)
            try:
                check(shim, kernel)
            except AssertionError as error:
                return f"{name}: {error}"
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return None


def in_a_child(shim: Shim, checks: Mapping[str, Check]) -> str | None:
    """`first_failure`, where a crash and an endless loop are failures as well."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(readable)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.write(writable, json.dumps(first_failure(shim, checks, CASE_CPU_S))[:1000].encode())
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    assert answer, f"the child ended with {status} and said nothing"
    found: str | None = json.loads(answer)
    return found


def offend(shim: Shim, what: str) -> None:
    """Launches that no plan may ask for, at which a sanitizer has to stop the process."""
    kv, slab = (np.zeros(64 * 16, dtype=np.uint8) for _ in range(2))
    address, size = int(kv.ctypes.data), 512
    if what == "misaligned":
        address += 8
    elif what == "beyond":
        size = 64 * 16 + 16
    ids = np.zeros(1, dtype=np.uint64)
    shim.launch(
        "kv_gather", Launch(np.array([[address, 0, size, 0]], dtype=np.uint64), ids, ids, 1, 1, slab.ctypes.data, 0), Geometry(1, 8)
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("library")
    parser.add_argument("--guard", type=int, default=GUARD)
    parser.add_argument("--offend", choices=("misaligned", "beyond"))
    parser.add_argument("--prefix", nargs="*", default=[])
    chosen = parser.parse_args()
    library = ctypes.CDLL(chosen.library)
    if chosen.offend:
        offend(Shim(library), chosen.offend)
    checks = {**cases(chosen.guard), **LARGE}
    np.random.default_rng()  # what is imported late would be in each child
    if chosen.prefix:
        answers = {prefix: in_a_child(Shim(library, prefix), checks) for prefix in chosen.prefix}
    else:
        answers = {"": first_failure(Shim(library), checks)}
    sys.stdout.write(json.dumps(answers) + "\n")


if __name__ == "__main__":
    main()
