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
    gc.collect()
    before = open_descriptors()
    yield
    gc.collect()
    # The loop of the fixture `anyio_backend` may be set up and torn down around this one.
    left = {fd: what for fd, what in open_descriptors().items() if fd not in before and ("memfd" in what or "pidfd" in what)}
    assert not left
