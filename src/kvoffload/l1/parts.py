"""What the verbs of L1 (`saving`, `matching`, `removal`) work on together."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from kvoffload.errors import ConfigError
from kvoffload.l1.eviction import EvictionPolicy, PolicyName, make_policy
from kvoffload.l1.eviction.evictor import Evictor
from kvoffload.l1.index import KeyIndex
from kvoffload.l1.inflight import Inflight
from kvoffload.l1.leases import Leases
from kvoffload.l1.remote import Remote, RemoteConfig
from kvoffload.l1.slots import SlotTable
from kvoffload.l1.states import State
from kvoffload.l1.statistics import Counts
from kvoffload.messages import BlockKey

T = TypeVar("T")

Slices = Generator[None, None, T]
"""What may take long, and yields where others may have their turn. Nothing else is handled until it has ended."""

MANY = 32
"""From so many slots on numpy is faster than a loop."""


@dataclass(frozen=True, slots=True)
class L1Config:
    """How L1 behaves; how large it is at most is the segments' to say."""

    ranks: int = 1
    policy: PolicyName = "s3fifo"
    hit_lifetime_s: float = 10.0
    """How long after the answer a hit may be used; kept by whoever got it, L1 has no timer."""
    max_waiting_share: float = 0.5
    """A new hit is refused when more than this share of the usable slots would be protected from eviction."""
    small_ratio: float = 0.1
    """The small queue's share under S3FIFO."""
    keeps: bool = True
    """False: slots are for what is on its way to or from nodes, and for nothing else."""
    slice_blocks: int = 512
    """After so many blocks of one message others have their turn; that takes less than a millisecond."""

    def __post_init__(self) -> None:
        if not 1 <= self.ranks <= 64:
            raise ConfigError(f"ranks must be from 1 to 64, not {self.ranks}")
        if not 0 < self.max_waiting_share <= 1:
            raise ConfigError(f"max_waiting_share must be above 0 and at most 1, not {self.max_waiting_share}")
        if not 0 < self.small_ratio < 1:
            raise ConfigError(f"small_ratio must be between 0 and 1, not {self.small_ratio}")
        if self.slice_blocks < 1:
            raise ConfigError(f"slice_blocks must be at least 1, not {self.slice_blocks}")


class Pace:
    """For many small things, one after the other: when it is others' turn."""

    __slots__ = ("_blocks", "_slice")

    def __init__(self, slice_blocks: int) -> None:
        self._slice = slice_blocks
        self._blocks = 0

    def is_over(self, blocks: int) -> bool:
        """Whether others should have their turn before the next thing, which is of so many blocks."""
        is_over = self._blocks > 0 and self._blocks + blocks > self._slice
        self._blocks = blocks if is_over else self._blocks + blocks
        return is_over


class Parts:
    """One L1's slots, index, policy, jobs and leases, what it counts, and what it keeps of the second tier, where there is one."""

    __slots__ = ("config", "counts", "evictor", "generation", "index", "inflight", "leases", "many", "policy", "remote", "slots")

    def __init__(self, config: L1Config, capacity: int, remote: RemoteConfig | None = None) -> None:
        self.config = config
        self.generation = 0
        if remote is None and not config.keeps:
            raise ConfigError("L1 shall keep nothing, and there is no second tier: switch one of them on")
        self.slots = SlotTable(capacity, keeps=config.keeps)
        self.index = KeyIndex()
        self.policy: EvictionPolicy = make_policy(config.policy, capacity, cast("Sequence[BlockKey]", self.slots.keys), config.small_ratio)
        self.evictor = Evictor(self.slots, self.index, self.policy)
        self.inflight = Inflight(config.ranks)
        self.leases = Leases(self.slots)
        self.counts = Counts()
        self.remote = Remote(remote, capacity) if remote is not None else None
        self.many = MANY

    @property
    def room(self) -> int:
        """How many slots leases and loads may protect: their share, less what fetches hold, also where that waits for its parent."""
        room = int(self.config.max_waiting_share * self.slots.usable)
        return room if self.remote is None else room - len(self.remote.fetch_of) - self.slots.counts[State.FILLED]

    def pace(self) -> Pace:
        """A new one."""
        return Pace(self.config.slice_blocks)

    def sliced(self, items: Sequence[T]) -> Iterator[Sequence[T]]:
        """What may be done of this without giving others their turn, in order; at least one, empty or not."""
        size = self.config.slice_blocks
        if len(items) <= size:
            yield items
            return
        for start in range(0, len(items), size):
            yield items[start : start + size]
