"""The simulated bytes: each token position of a block holds one number that tells which tokens it was computed from."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from kvoffload.testing.sim.settings import BLOCK_SIZE

NOTHING = 0
"""What memory holds that nobody has written."""


class SimClock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class SimMemory:
    """Engine blocks and slots, as lists of `BLOCK_SIZE` numbers."""

    def __init__(self, blocks: int, slots: int) -> None:
        self.engine = [[NOTHING] * BLOCK_SIZE for _ in range(blocks)]
        self.slots = [[NOTHING] * BLOCK_SIZE for _ in range(slots)]
        self._garbage = NOTHING

    def garbage(self) -> int:
        """A number that no token has."""
        self._garbage -= 1
        return self._garbage


class SimLedger:
    """The block ledger in a list (`kvoffload.connector.ports.LedgerPort`)."""

    def __init__(self, blocks: int) -> None:
        self._epochs = [0] * blocks

    def bump(self, ids: Sequence[int]) -> None:
        for block in ids:
            self._epochs[block] += 1

    def epochs(self, ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(self._epochs[block] for block in ids)


class Contents:
    """What the KV of a growing sequence of tokens must be: ``values[i]`` tells token ``i`` and all before it, salt and weights."""

    def __init__(self, version: int, salt: str | None) -> None:
        self.version = version
        self._last = hash((version, zlib.crc32(salt.encode()) if salt else 0))
        self.values: list[int] = []

    def extend(self, tokens: Sequence[int], upto: int) -> None:
        """Derive the values of ``tokens[:upto]``; those derived already are taken to be of the same tokens."""
        last = self.values[-1] if self.values else self._last
        for token in tokens[len(self.values) : upto]:
            last = hash((last, token)) or 1
            self.values.append(last)
