"""What a node's writer and prefetcher have in common: what became of values, and whose turn it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import anyio
import anyio.to_thread

from kvoffload.errors import CapacityError
from kvoffload.l2.node import Outcome

P = ParamSpec("P")
T = TypeVar("T")

_GRAVEST = (Outcome.UNSETTLED, Outcome.FAILED, Outcome.LATE, Outcome.FULL, Outcome.MALFORMED, Outcome.ABSENT)


def is_all_done(outcomes: Sequence[Outcome]) -> bool:
    """The usual case, found out at a fraction of what looking at each costs: members of an enum hash and compare in Python."""
    return outcomes.count(Outcome.DONE) == len(outcomes)


def by_block(outcomes: Sequence[Outcome], ranks: int) -> list[Outcome]:
    """What became of each block: DONE where all its parts are, else its gravest part."""
    if is_all_done(outcomes):
        return [Outcome.DONE] * (len(outcomes) // ranks)
    blocks = []
    for start in range(0, len(outcomes), ranks):
        parts = outcomes[start : start + ranks]
        blocks.append(next((outcome for outcome in _GRAVEST if outcome in parts), Outcome.DONE))
    return blocks


async def in_thread(limiter: anyio.CapacityLimiter, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run this in a worker thread, to its end whatever happens. Raises CapacityError where there can be no more threads: a limit on
    processes or memory, which is no reason to end an actor."""
    has_begun = False

    def run() -> T:
        nonlocal has_begun
        has_begun = True
        return function(*args, **kwargs)

    try:
        return await anyio.to_thread.run_sync(run, limiter=limiter)
    except RuntimeError as error:
        if has_begun:
            raise
        raise CapacityError(f"no thread to hash in: {error}") from error


class Turns:
    """Loads before writes, on one node: a write waits while reads are under way, but never longer than its patience."""

    def __init__(self) -> None:
        self._reads = 0
        self._idle: anyio.Event | None = None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While inside, writes wait."""
        self._reads += 1
        try:
            yield
        finally:
            self._reads -= 1
            if not self._reads and self._idle is not None:
                self._idle.set()
                self._idle = None

    async def wait_to_write(self, patience_s: float) -> bool:
        """Until no read is under way, at most ``patience_s``: whether that came to pass."""
        with anyio.move_on_after(patience_s):
            while self._reads:
                if self._idle is None:
                    self._idle = anyio.Event()
                await self._idle.wait()
        return not self._reads
