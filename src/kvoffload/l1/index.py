"""From a block's key to the slot that holds it, or that is being filled with it."""

from __future__ import annotations

from collections.abc import Sequence

from kvoffload.l1.slots import NONE
from kvoffload.messages import BlockKey

SHARDS = 256


class KeyIndex:
    """A dict from key to slot, in 256 shards by the key's first byte (keys are digests, so the shards are even).

    One dict of a million keys stalls for 30 ms and more whenever it is resized, and that does not end when the cache is full: every
    eviction uses up an entry. A shard's resize is not noticed. Hot loops use ``shards[key[0]]`` themselves.
    """

    __slots__ = ("shards",)

    def __init__(self) -> None:
        self.shards: list[dict[BlockKey, int]] = [{} for _ in range(SHARDS)]

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    def find(self, key: BlockKey) -> int:
        """The slot of this key, or NONE."""
        return self.shards[key[0]].get(key, NONE)

    def remove(self, key: BlockKey) -> None:
        """Forget a key that is there."""
        del self.shards[key[0]][key]

    def clear(self) -> None:
        """Forget all keys."""
        self.shards = [{} for _ in range(SHARDS)]

    def length_with(self, keys: Sequence[BlockKey], state: bytearray, floor: int, start: int = 0) -> int:
        """How many of a chain's first keys are here in a state of at least ``floor``; ``keys[:start]`` are known to be.

        A bisection: what is FILLING or more has parents that are, and what is READY has parents that are.
        """
        shards = self.shards
        low, high = start, len(keys)
        if low < high:  # often there is nothing at all: see at once
            key = keys[low]
            slot = shards[key[0]].get(key, NONE)
            if slot < 0 or state[slot] < floor:
                return low
            low += 1
            key = keys[-1]  # or all
            slot = shards[key[0]].get(key, NONE)
            if slot >= 0 and state[slot] >= floor:
                return high
            high -= 1
        while low < high:
            middle = (low + high) >> 1
            key = keys[middle]
            slot = shards[key[0]].get(key, NONE)
            if slot >= 0 and state[slot] >= floor:
                low = middle + 1
            else:
                high = middle
        return low
