"""Every message between the parts of kvoffload, grouped by hop.

The flow of a save and of a load::

    SchedulerSide --ReserveSlots--> L1Manager --SlotGrant--> GpuCopy <--SaveBlocks-- WorkerSide
                                        ^------BlocksFilled-----'
    SchedulerSide --MatchPrefix---> L1Manager --PrefixHit--> SchedulerSide
    SchedulerSide --StartLoad-----> L1Manager
    SchedulerSide ..vLLM metadata.> WorkerSide --LoadBlocks--> GpuCopy --LoadFinished--> L1Manager
                                        ^------LoadEnded--------'

and, with a second tier::

    L1Manager --FindBlocks---> L2Prefetcher of a node --BlocksFound----> L1Manager
    L1Manager --FetchBlocks--> L2Prefetcher of a node --FetchFinished--> L1Manager  (--TransfersSettled-->)
    L1Manager --WriteBlocks--> L2Writer of a node ------WriteFinished--> L1Manager  (--TransfersSettled-->)
    Membership --NodesChanged--> L1Manager <--NodeBack-- who keeps a node's actors

Commands are imperatives, facts are in the past tense, answers are nouns. A message carries a batch (a job, a step, a request), never
one block. All are frozen; those that cross the link (`LINK_MESSAGES`) hold plain values only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvoffload.reasons import DropReason as DropReason
from kvoffload.reasons import HitReason as HitReason
from kvoffload.reasons import LoadOutcome as LoadOutcome

if TYPE_CHECKING:
    from kvoffload.l2.ring import Ring
    from kvoffload.mailbox import Reply

BlockKey = bytes
"""24 bytes that identify a block's content and everything before it (`kvoffload.keys`)."""

Job = int
"""One save or load of one step; numbers are never reused within an engine."""

ROOT: BlockKey = b""
"""The parent of a prompt's first block."""


# ---------------------------------------------------------------- SchedulerSide -> L1Manager


@dataclass(frozen=True, slots=True)
class SaveRun:
    """Consecutive full blocks of one request; ``parent`` is the key before ``keys[0]``, ``keys[i]`` the parent of ``keys[i + 1]``."""

    request: str
    parent: BlockKey
    keys: tuple[BlockKey, ...]
    blocks: tuple[int, ...]
    epochs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ReserveSlots:
    """Find slots for what this step makes full and confirmed."""

    job: Job
    runs: tuple[SaveRun, ...]


@dataclass(frozen=True, slots=True)
class MatchPrefix:
    """How much of this chain of keys, from block 0, is READY, or can be by ``deadline`` (`time.monotonic`, in seconds)?

    ``local`` is how many of them the engine's own cache has: what L2 has of those is of no use. ``tokens_per_s`` is how fast the
    engine computes prompts, 0.0 where that is not known yet; each block has ``block_tokens`` tokens (0: not said).
    """

    request: str
    sequence: int
    keys: tuple[BlockKey, ...]
    deadline: float
    local: int = 0
    tokens_per_s: float = 0.0
    block_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StartLoad:
    """The hit ``sequence`` of ``request`` is being used: blocks ``first`` to ``first + count - 1`` of it, as ``job``; 0 releases it."""

    job: Job
    request: str
    sequence: int
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class ReleaseHit:
    """Give back the hit ``sequence`` of ``request``, used by nobody."""

    request: str
    sequence: int


@dataclass(frozen=True, slots=True)
class ForgetRequest:
    """The request ended or was preempted: release what it holds, save for the leases of its jobs."""

    request: str


@dataclass(frozen=True, slots=True)
class ResetCache:
    """Empty the index: the weights, or what the caller thinks of them, changed."""

    generation: int


# ---------------------------------------------------------------- L1Manager -> SchedulerSide


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """The answer to `MatchPrefix`: ``slots[i]`` holds block ``i``. A hit longer than 0 holds a lease until it is used or released.

    ``pending`` counts the blocks right behind it that are being filled; ``expires`` is the facade's to act on.
    """

    request: str
    sequence: int
    slots: tuple[int, ...]
    pending: int
    generation: int
    expires: float
    reason: HitReason


@dataclass(frozen=True, slots=True)
class ParentMissing:
    """Blocks of these requests were not saved because L1 lacks what comes before them: offer the whole prefix once more."""

    job: Job
    requests: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ConnectorOff:
    """kvoffload has stopped; vLLM goes on as if there were no connector. Sticky. Who sends it says so in the log, who gets it does not."""

    reason: str


# ---------------------------------------------------------------- L1Manager <-> GpuCopy


@dataclass(frozen=True, slots=True)
class SlotGrant:
    """For every `ReserveSlots` admitted, empty where nothing was granted: copy engine block ``blocks[i]`` into ``slots[i]``, in order."""

    job: Job
    slots: tuple[int, ...]
    blocks: tuple[int, ...]
    epochs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlocksFilled:
    """What became of a grant on one rank, by slot; the two sets together are the grant. ``reason`` says why of the failed ones."""

    job: Job
    rank: int
    filled: tuple[int, ...]
    failed: tuple[int, ...]
    reason: DropReason | None = None


@dataclass(frozen=True, slots=True)
class LoadFinished:
    """A load of one rank has ended, and reads its slots no more."""

    job: Job
    rank: int
    outcome: LoadOutcome


@dataclass(frozen=True, slots=True)
class SegmentGrown:
    """The first ``slots`` slots of this rank's segment are populated and may be used."""

    rank: int
    slots: int


@dataclass(frozen=True, slots=True)
class RankLost:
    """The link to this rank is gone, or its GpuCopy is: no report will come, and its process may still read and write slots."""

    rank: int
    reason: str


# ---------------------------------------------------------------- WorkerSide -> GpuCopy, and back


@dataclass(frozen=True, slots=True)
class SaveBlocks:
    """The step that computed the blocks of ``job`` was launched; ``after`` is the copy engine's own token for its end."""

    job: Job
    after: object


@dataclass(frozen=True, slots=True)
class LoadBlocks:
    """Copy ``slots[i]`` into engine block ``blocks[i]``, once ``after`` has happened."""

    job: Job
    request: str
    slots: tuple[int, ...]
    blocks: tuple[int, ...]
    after: object


@dataclass(frozen=True, slots=True)
class LoadEnded:
    """Into WorkerSide's inbox: a promised load is over. Unless LOADED, none of its engine blocks holds KV."""

    job: Job
    request: str
    outcome: LoadOutcome
    blocks: tuple[int, ...]


# ---------------------------------------------------------------- L1Manager <-> the L2 actors of a node

Node = str
"""A node's name, unique among the nodes of a ring. At another address it is the same place in the ring, and begins empty-handed."""

Batch = int
"""One question, fetch or write of L1Manager's, to one node; numbers are never reused within an engine."""


@dataclass(frozen=True, slots=True)
class FindBlocks:
    """Which of these does the node have? To be answered by ``deadline`` (`time.monotonic`, s), with `BlocksFound`, always."""

    batch: Batch
    keys: tuple[BlockKey, ...]
    deadline: float


@dataclass(frozen=True, slots=True)
class BlocksFound:
    """``found[i]``: the node says that it has block ``keys[i]``, whole, of every rank. Empty where it could not be asked."""

    batch: Batch
    node: Node
    found: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class FetchBlocks:
    """Read block ``keys[i]`` into ``slots[i]`` of every rank's segment, parents first, and verify it. Answered with `FetchFinished`."""

    batch: Batch
    slots: tuple[int, ...]
    keys: tuple[BlockKey, ...]
    deadline: float


@dataclass(frozen=True, slots=True)
class FetchFinished:
    """What became of a `FetchBlocks`, by slot; the four sets together are the fetch. Only ``fetched`` ones hold their block, verified.

    Something may still write into ``unsettled`` ones: a `TransfersSettled` follows when nothing does. ``seconds`` is how long the
    node took over it, waiting for its turn left out.
    """

    batch: Batch
    node: Node
    fetched: tuple[int, ...]
    absent: tuple[int, ...]
    failed: tuple[int, ...]
    unsettled: tuple[int, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class WriteBlocks:
    """Seal ``slots[i]``, which holds block ``keys[i]``, and store it. Answered with `WriteFinished`; the slots are leased until then."""

    batch: Batch
    slots: tuple[int, ...]
    keys: tuple[BlockKey, ...]


@dataclass(frozen=True, slots=True)
class WriteFinished:
    """What became of a `WriteBlocks`, by slot. The node has the ``stored`` ones now (or had them before); something may still read the
    ``unsettled`` ones, and a `TransfersSettled` follows when nothing does."""

    batch: Batch
    node: Node
    stored: tuple[int, ...]
    failed: tuple[int, ...]
    unsettled: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TransfersSettled:
    """Nothing reads or writes these slots of a fetch or write any more, which had been reported unsettled."""

    batch: Batch
    node: Node
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NodesChanged:
    """The nodes, and which block belongs to which, from now on."""

    ring: Ring


@dataclass(frozen=True, slots=True)
class NodeBack:
    """The node answers, or takes writes, again after it had been left alone. Who knows what it has lost meanwhile."""

    node: Node


# ---------------------------------------------------------------- to every actor


@dataclass(frozen=True, slots=True)
class Flush:
    """Answer when everything that came before this message has been dealt with to its end; ``nodes``: on the nodes of L2 too."""

    reply: Reply[bool]
    nodes: bool = True


@dataclass(frozen=True, slots=True)
class Drain:
    """Take no new work, finish what was begun until ``deadline`` (`time.monotonic`, s), then answer whether all of it was finished."""

    deadline: float
    reply: Reply[bool]


ToL1Manager = (
    ReserveSlots
    | MatchPrefix
    | StartLoad
    | ReleaseHit
    | ForgetRequest
    | ResetCache
    | BlocksFilled
    | LoadFinished
    | SegmentGrown
    | RankLost
    | BlocksFound
    | FetchFinished
    | WriteFinished
    | TransfersSettled
    | NodesChanged
    | NodeBack
    | Flush
    | Drain
)
ToL2Prefetcher = FindBlocks | FetchBlocks | Drain
ToL2Writer = WriteBlocks | Flush | Drain
FromL2 = BlocksFound | FetchFinished | WriteFinished | TransfersSettled
AboutNodes = NodesChanged | NodeBack
ToScheduler = PrefixHit | ParentMissing | ConnectorOff
ToGpuCopy = SlotGrant | Flush | Drain
ToWorker = LoadEnded | ConnectorOff

LINK_MESSAGES: tuple[type, ...] = (SlotGrant, BlocksFilled, LoadFinished, SegmentGrown, ConnectorOff)
"""What may cross the link between processes; the place in this tuple is the tag on the wire, so append only."""
