"""What the tests of the second tier's use share: a core with nodes that answer when they are told to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.l1.rig import run

from kvoffload.l1 import (
    Effect,
    L1Config,
    L1Core,
    L1Statistics,
    RemoteConfig,
    RemoteStatistics,
    State,
    ToPrefetcher,
    ToRank,
    ToScheduler,
    ToWriter,
)
from kvoffload.l1.core import L1Message
from kvoffload.l2.ring import NodeAddress
from kvoffload.messages import (
    BlockKey,
    BlocksFilled,
    BlocksFound,
    FetchBlocks,
    FetchFinished,
    FindBlocks,
    LoadFinished,
    LoadOutcome,
    MatchPrefix,
    Node,
    NodesChanged,
    ParentMissing,
    PrefixHit,
    ReserveSlots,
    SegmentGrown,
    SlotGrant,
    StartLoad,
    TransfersSettled,
    WriteBlocks,
    WriteFinished,
)

TOKENS = 16
"""Of a block."""


@dataclass(frozen=True)
class TestRing:
    """Block ``i`` of each `chain` belongs to the node ``i % len(names)``."""

    __test__ = False

    names: tuple[Node, ...] = ("n0", "n1", "n2")
    homeless: frozenset[BlockKey] = frozenset()
    version: int = 1

    @property
    def nodes(self) -> tuple[NodeAddress, ...]:
        return tuple(NodeAddress(name, f"redis://{name}") for name in self.names)

    def node_of(self, key: BlockKey) -> Node | None:
        if key in self.homeless or not self.names:
            return None
        block = int(key[::-1].lstrip(b"\0").rpartition(b".")[2])
        return self.names[block % len(self.names)]

    def nodes_of(self, keys: Sequence[BlockKey]) -> list[Node | None]:
        return [self.node_of(key) for key in keys]


@dataclass
class Judge:
    """Says yes or no to every load, and remembers what it was asked and told."""

    answer: bool = True
    asked: list[tuple[int, float, Mapping[Node, int], int]] = field(default_factory=list)
    observed: list[tuple[Node, int, int, float]] = field(default_factory=list)
    forgotten: list[Node] = field(default_factory=list)

    def should_load(self, tokens: int, tokens_per_s: float, blocks_by_node: Mapping[Node, int], block_bytes: int) -> bool:
        self.asked.append((tokens, tokens_per_s, dict(blocks_by_node), block_bytes))
        return self.answer

    def observe_fetch(self, node: Node, blocks: int, num_bytes: int, seconds: float) -> None:
        self.observed.append((node, blocks, num_bytes, seconds))

    def forget(self, node: Node) -> None:
        self.forgotten.append(node)


class RemoteRig:
    """A core that checks itself after each message; what it asks of nodes is kept, by node and in order, until the test answers."""

    def __init__(self, slots: int, ring: TestRing | None = None, remote: Mapping[str, object] | None = None, **config: object) -> None:
        given: dict[str, object] = {"min_tokens": TOKENS, "block_bytes": 100, "max_writing_share": 1.0, **(remote or {})}
        self.core = L1Core(L1Config(**config), slots, RemoteConfig(**given))  # type: ignore[arg-type]
        self.now = 5.0
        self.job = self.sequence = 0
        self.hits: list[PrefixHit] = []
        self.grants: list[SlotGrant] = []
        self.missing: list[ParentMissing] = []
        self.finds: list[tuple[Node, FindBlocks]] = []
        self.fetches: list[tuple[Node, FetchBlocks]] = []
        self.writes: list[tuple[Node, WriteBlocks]] = []
        for rank in range(self.core._config.ranks):
            self.send(SegmentGrown(rank, slots))
        self.send(NodesChanged(ring or TestRing()))

    # ------------------------------------------------------------ the engine's side

    def send(self, message: L1Message) -> None:
        self._sort(self.core.handle(message, self.now) + self._rest())

    def advance(self, seconds: float) -> None:
        """Time goes by, and what is due is done."""
        self.now += seconds
        self._sort(self.core.tick(self.now) + self._rest())

    def _rest(self) -> list[Effect]:
        effects: list[Effect] = []
        while self.core.has_work:
            effects += self.core.go_on(self.now)
        return effects

    def close(self) -> None:
        self._sort(self.core.close())

    def save(self, keys: Sequence[BlockKey], start: int = 0) -> tuple[int, ...]:
        """Reserve and fill; the slots."""
        grant = self.reserve(keys, start)
        if grant.slots:
            self.fill(grant)
        return grant.slots

    def reserve(self, keys: Sequence[BlockKey], start: int = 0) -> SlotGrant:
        self.job += 1
        self.send(ReserveSlots(self.job, (run(keys, start),)))
        return self.grants.pop()

    def fill(self, grant: SlotGrant, *failed: int) -> None:
        """Filled, save for the blocks at these places."""
        bad = tuple(grant.slots[at] for at in failed)
        self.send(BlocksFilled(grant.job, 0, tuple(slot for slot in grant.slots if slot not in bad), bad))

    def ask(self, keys: Sequence[BlockKey], request: str = "r", wait_s: float = 1.0, local: int = 0, speed: float = 0.0) -> None:
        """A match; its answer, now or later, goes to ``hits``."""
        self.sequence += 1
        self.send(MatchPrefix(request, self.sequence, tuple(keys), self.now + wait_s, local, speed, TOKENS))

    def match(self, keys: Sequence[BlockKey], request: str = "r", **how: Any) -> PrefixHit:
        """A match that is answered at once."""
        before = len(self.hits)
        self.ask(keys, request, **how)
        assert len(self.hits) == before + 1, "it waits"
        return self.hits[-1]

    def load(self, hit: PrefixHit) -> int:
        """Use all of a hit; the job."""
        self.job += 1
        self.send(StartLoad(self.job, hit.request, hit.sequence, 0, len(hit.slots)))
        return self.job

    def loaded(self, job: int, outcome: LoadOutcome = LoadOutcome.LOADED) -> None:
        self.send(LoadFinished(job, 0, outcome))

    def fail_load(self, job: int) -> None:
        self.loaded(job, LoadOutcome.FAILED)

    # ------------------------------------------------------------ the nodes' side

    def answer_finds(self, has: Callable[[BlockKey], bool] = lambda key: True, node: Node | None = None) -> None:
        """The questions to this node (to all) are answered."""
        for to, find in self._taken(self.finds, node):
            self.send(BlocksFound(find.batch, to, tuple(map(has, find.keys))))

    def finish_fetches(self, node: Node | None = None, *, seconds: float = 0.5, **keys: Sequence[BlockKey]) -> None:
        """The fetches from this node (from all) end: all came, but these ``absent``, ``failed`` and ``unsettled`` ones."""
        for to, fetch in self._taken(self.fetches, node):
            slots = {kind: tuple(s for s, k in zip(fetch.slots, fetch.keys, strict=True) if k in keys[kind]) for kind in keys}
            fetched = tuple(slot for slot in fetch.slots if not any(slot in bad for bad in slots.values()))
            self.send(
                FetchFinished(
                    fetch.batch, to, fetched, slots.get("absent", ()), slots.get("failed", ()), slots.get("unsettled", ()), seconds
                )
            )

    def finish_writes(self, node: Node | None = None, **keys: Sequence[BlockKey]) -> None:
        """The writes to this node (to all) end: all stored, but these ``failed`` and ``unsettled`` ones."""
        for to, write in self._taken(self.writes, node):
            slots = {kind: tuple(s for s, k in zip(write.slots, write.keys, strict=True) if k in keys[kind]) for kind in keys}
            stored = tuple(slot for slot in write.slots if not any(slot in bad for bad in slots.values()))
            self.send(WriteFinished(write.batch, to, stored, slots.get("failed", ()), slots.get("unsettled", ())))

    def settle(self, batch: int, node: Node, *slots: int) -> None:
        self.send(TransfersSettled(batch, node, slots))

    def put(self, keys: Sequence[BlockKey], request: str = "r") -> PrefixHit:
        """A match that finds all on the nodes and gets it."""
        self.ask(keys, request)
        self.answer_finds()
        self.finish_fetches()
        return self.hits[-1]

    # ------------------------------------------------------------ looking

    def statistics(self) -> L1Statistics:
        return self.core.statistics()

    @property
    def remote(self) -> RemoteStatistics:
        remote = self.core.statistics().remote
        assert remote is not None
        return remote

    def slots_in(self, state: State) -> int:
        return self.core.statistics().slots[state]

    def written(self) -> set[BlockKey]:
        """All keys whose writing is under way."""
        return {key for _, write in self.writes for key in write.keys}

    def _taken(self, table: list[tuple[Node, Any]], node: Node | None) -> list[tuple[Node, Any]]:
        taken = [entry for entry in table if node in (None, entry[0])]
        table[:] = [entry for entry in table if entry not in taken]
        return taken

    def _sort(self, effects: Sequence[Effect]) -> None:
        self.core.check()
        for effect in effects:
            if isinstance(effect, ToRank):
                self.grants.append(effect.message)
            elif isinstance(effect, ToWriter):
                self.writes.append((effect.node, effect.message))
            else:
                self._sort_message(effect)

    def _sort_message(self, effect: ToScheduler | ToPrefetcher) -> None:
        match effect.message:
            case PrefixHit() as hit:
                self.hits.append(hit)
            case ParentMissing() as missing:
                self.missing.append(missing)
            case FindBlocks() as find:
                assert isinstance(effect, ToPrefetcher)
                self.finds.append((effect.node, find))
            case FetchBlocks() as fetch:
                assert isinstance(effect, ToPrefetcher)
                self.fetches.append((effect.node, fetch))
