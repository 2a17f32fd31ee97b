"""Memory for the contract tests' values: in a segment, since that is where RDMA needs them, and where an engine has them."""

from __future__ import annotations

import weakref
from collections import deque
from functools import cache

from kvoffload.segment import Segment

ARENA_BYTES = 1 << 30  # as much of it is taken as is in use at the same time


class Arena:
    """Buffers of any size, which come back when the last view of them is gone."""

    def __init__(self, num_bytes: int = ARENA_BYTES) -> None:
        self.segment = Segment.create(num_bytes, 1)
        self._free = [(0, num_bytes)]
        self._returned: deque[tuple[int, int]] = deque()
        """Since the last `take`: finalizers run at any time, in the middle of it too, and in any thread."""

    def take(self, size: int) -> memoryview:
        """Zeros. One byte lies between any two."""
        self._merge_returned()
        index, start = next((index, start) for index, (start, end) in enumerate(self._free) if end - start > size)
        self._free[index] = (start + size + 1, self._free[index][1])
        view = self.segment.array[start : start + size]
        view[:] = 0
        weakref.finalize(view, self._returned.append, (start, start + size + 1))
        return view.data

    def _merge_returned(self) -> None:
        spans = list(self._free)
        while self._returned:
            spans.append(self._returned.popleft())
        merged: list[tuple[int, int]] = []
        for span in sorted(spans):
            if merged and merged[-1][1] == span[0]:
                merged[-1] = (merged[-1][0], span[1])
            else:
                merged.append(span)
        self._free = merged


@cache
def arena() -> Arena:
    """The one of this process."""
    return Arena()
