"""Every link test ends with as many open descriptors as it began with."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest


def open_descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # that of the listing itself
            continue
    return found


@pytest.fixture(autouse=True)
def no_descriptor_leaks() -> Iterator[None]:
    before = open_descriptors()
    yield
    if _left(before):
        gc.collect()  # a mapping that is still referred to by a traceback or a cycle holds its memfd
    assert not _left(before)


def _left(before: dict[int, str]) -> dict[int, str]:
    # Of sockets there are the loop's own, which may be set up and torn down around this fixture.
    return {fd: what for fd, what in open_descriptors().items() if fd not in before and ("memfd" in what or "pidfd" in what)}
