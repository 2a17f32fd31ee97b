"""Who goes when a slot is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, assert_never

from kvoffload.l1.eviction.lru import LRU
from kvoffload.l1.eviction.policy import EvictionPolicy
from kvoffload.l1.eviction.s3fifo import S3FIFO
from kvoffload.messages import BlockKey

PolicyName = Literal["s3fifo", "lru"]

__all__ = ["LRU", "S3FIFO", "EvictionPolicy", "PolicyName", "make_policy"]


def make_policy(name: PolicyName, capacity: int, keys: Sequence[BlockKey], small_ratio: float = 0.1) -> EvictionPolicy:
    """The policy of this name for ``capacity`` slots; ``keys[slot]`` is the key of a slot that it orders."""
    match name:
        case "s3fifo":
            return S3FIFO(capacity, keys, small_ratio)
        case "lru":
            return LRU(capacity)
        case _:
            assert_never(name)
