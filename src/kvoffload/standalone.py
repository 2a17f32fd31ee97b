"""kvoffload without vLLM: for asyncio programs (anyio's, so trio's too) that have paged KV tensors of their own."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import anyio
import anyio.to_thread

from kvoffload.bridge import LoopThread
from kvoffload.config import Config
from kvoffload.connector.saver import MAX_BLOCKS_PER_JOB, cut
from kvoffload.errors import ConfigError, CopyError, MisuseError
from kvoffload.keys import KeyChain
from kvoffload.l1.statistics import L1Statistics
from kvoffload.layout import Tensor
from kvoffload.ledger import Ledger
from kvoffload.mailbox import Reply
from kvoffload.messages import (
    ROOT,
    ConnectorOff,
    HitReason,
    LoadBlocks,
    LoadEnded,
    LoadOutcome,
    MatchPrefix,
    ParentMissing,
    PrefixHit,
    ReleaseHit,
    ReserveSlots,
    ResetCache,
    SaveBlocks,
    SaveRun,
    StartLoad,
    ToScheduler,
)
from kvoffload.namespace import namespace_digest
from kvoffload.runtime.hub import DRAIN_S, HubRuntime, RankPort
from kvoffload.runtime.shared import SegmentView, Shared
from kvoffload.runtime.worker import Rank, WorkerRuntime

if TYPE_CHECKING:
    from kvoffload.runtime.l2 import MakeNode

NODES_TIMEOUT_S = 30.0
MAX_SAVES = 32
"""Saves under way at once; a further one waits."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What a save came to: of ``tokens`` given in full blocks, the first ``stored_tokens`` can be matched now."""

    tokens: int
    stored_tokens: int


@dataclass(slots=True)
class Hit:
    """A leased prefix: its first ``tokens`` tokens, a multiple of the block size, can be loaded, once, while the match is open."""

    tokens: int
    blocks: int
    reason: HitReason
    _answer: PrefixHit
    _is_open: bool = True


@asynccontextmanager
async def open_runtime(config: Config | Mapping[str, object] | None = None) -> AsyncIterator[Runtime]:
    """A runtime of one rank, on a thread of its own: ``config`` as of `Config.load`, or its extra settings. Closed with the block.

    `Runtime.register` comes first. Raises ConfigError; with L2 also where ``model.version`` is not set.
    """
    config = config if isinstance(config, Config) else Config.load(config)
    if config.l2.backend != "off" and not config.model.version:
        raise ConfigError(
            "l2 needs model.version here: nothing else tells one model's blocks from another's of the same shape. "
            "Let it name the model and its weights"
        )
    runtime = Runtime(config)
    try:
        yield runtime
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(runtime._close)


class CudaStream(Protocol):
    """Such as torch.cuda.Stream is."""

    @property
    def cuda_stream(self) -> int:
        """The CUstream."""
        ...


class Runtime:
    """Saves blocks of paged tensors to host memory and loads them back. Made by `open_runtime`; for tasks of one event loop."""

    def __init__(self, config: Config, make_node: MakeNode | None = None) -> None:
        """``make_node`` as of `HubRuntime`."""
        self._config = config
        self._make_node = make_node
        self._loop = LoopThread("standalone", self._loop_failed)
        self._parts: _Parts | None = None
        self._counter = itertools.count(1)
        self._answers: dict[str, Reply[PrefixHit]] = {}
        self._loads: dict[int, Reply[LoadEnded]] = {}
        self._saves_room = anyio.Semaphore(MAX_SAVES)
        self._loads_room = anyio.Semaphore(config.loads.max_jobs)
        self._generation = 0
        self._is_closed = False

    async def register(self, tensors: Mapping[str, Tensor], *, block_size: int, stream: CudaStream | int | None = None) -> None:
        """Hand over the paged KV: by layer name a torch tensor or numpy array of shape (num_blocks, ...), one dtype and device each.

        ``block_size`` is in tokens. Checks memory, compiles, proves the layout by a round trip through blocks that it then restores:
        nobody may use the tensors meanwhile. Once per runtime. Raises LayoutError, CapacityError, UnsupportedError, MisuseError.

        ``stream`` is for tensors on a GPU: the one that KV is computed in, a torch.cuda.Stream or a CUstream's handle. Each copy comes
        after all that it was given before the call, and after nothing else: work of other streams must be ordered with it, or be
        finished. By default it is torch's current stream of the thread that calls, at the time of each call; for the tests of
        `register` itself, which run in another thread, everything must be finished then.
        """
        if self._parts is not None or self._is_closed:
            raise MisuseError("register() once, on an open runtime: open another one for other tensors")
        if not tensors or block_size < 1:
            raise MisuseError(f"register() needs at least one tensor, and a block_size of at least 1, not {len(tensors)} and {block_size}")
        self._parts = await anyio.to_thread.run_sync(self._start, dict(tensors), block_size, _handle_of(stream))
        await self._first_slots(self._parts)

    async def _first_slots(self, parts: _Parts) -> None:
        """The news of the first slots is on its way to L1; a save right after `register` shall find them."""
        # A moment after the start, once per runtime: an event for it would have to be L1's own.
        while (statistics := parts.hub.statistics()) is not None and not statistics.usable and parts.hub.off_reason is None:  # noqa: ASYNC110
            await anyio.sleep(0.001)
        if self._config.l2.backend != "off" and self._config.l2.membership.url is None:
            # Nodes that the settings name are there at once, or never; the client's loops may have to be compiled first.
            with anyio.move_on_after(NODES_TIMEOUT_S):
                while not parts.hub.knows_nodes:  # noqa: ASYNC110
                    await anyio.sleep(0.001)

    def _start(self, tensors: Mapping[str, Tensor], block_size: int, current_stream: Callable[[], int] | None) -> _Parts:
        num_blocks = int(next(iter(tensors.values())).shape[0])
        with ExitStack() as undo:
            rank = Rank.prepare(self._config, 0, tensors, num_blocks, lambda engine: engine, current_stream=current_stream)
            undo.callback(rank.close)
            ledger = Ledger(num_blocks)
            undo.callback(ledger.close)
            namespace = namespace_digest(
                {
                    "layout": rank.layout.digest().hex(),
                    "block size": block_size,
                    "model version": self._config.model.version,
                    "user namespace": self._config.namespace,
                }
            )
            self._loop.start()
            undo.callback(self._renew_loop)
            worker = WorkerRuntime(self._config, rank, self._loop.call_soon, self._on_load_ended)
            undo.callback(worker.close, 1.0)
            hub = HubRuntime(self._config, self._on_answer, self._make_node)
            undo.callback(hub.close)
            shared = Shared(namespace, rank.layout.digest(), rank.layout.payload_bytes, (SegmentView(rank.segment),))
            hub.open(rank.segment.slots, [RankPort(worker.deliver)], self._loop.call_soon, self._loop.heartbeat, shared)
            self._loop.submit(worker.run)
            self._loop.submit(hub.run)
            worker.attach(ledger, partial(hub.deliver, rank.number))
            worker.start()
            undo.pop_all()
        return _Parts(hub, worker, ledger, namespace, block_size, num_blocks)

    def _renew_loop(self) -> None:
        """Whoever could not register these tensors may try others."""
        self._loop.stop(1.0)
        self._loop = LoopThread("standalone", self._loop_failed)

    # ------------------------------------------------------------ saving

    async def save(self, tokens: Sequence[int], blocks: Sequence[int], *, salt: bytes = b"") -> Saved:
        """Keep the KV of ``tokens``, whose block *i* lies in engine block ``blocks[i]``; an incomplete last block is left out.

        On a GPU the KV must be finished, or have been given to the stream of `register` before this is called. The caller must not
        change the blocks before this returns. Cancelled, it still waits for what may be reading them. What L1
        has no room for is not stored; that is no error. Raises MisuseError, and CopyError once the runtime is off.
        """
        parts = self._open_parts()
        chain = KeyChain(parts.namespace, parts.block_size)
        chain.extend(tokens, salt)
        full = len(chain.keys)
        if len(blocks) < full:
            raise MisuseError(f"{len(tokens)} tokens fill {full} blocks of {parts.block_size}, but {len(blocks)} blocks were given")
        self._check_blocks(parts, blocks[:full])
        if full:
            mark = parts.worker.mark()  # before anything is awaited: torch's current stream is the thread's, not the task's
            async with self._saves_room:
                with anyio.CancelScope(shield=True):
                    await self._save(parts, tuple(chain.keys), tuple(blocks[:full]), mark)
        async with self._matched(parts, tuple(chain.keys)) as hit:
            return Saved(full * parts.block_size, hit.tokens)

    async def _save(self, parts: _Parts, keys: tuple[bytes, ...], blocks: tuple[int, ...], mark: object) -> None:
        request = f"save-{next(self._counter)}"
        run = SaveRun(request, ROOT, keys, blocks, parts.ledger.epochs(blocks))
        for batch in cut([run], MAX_BLOCKS_PER_JOB):
            job = next(self._counter)
            if parts.hub.offer(ReserveSlots(job, batch)):
                parts.worker.save(SaveBlocks(job, mark))
            # One batch at a time: a save that L1 cannot take at once goes on where it has caught up.
            await parts.hub.flush(nodes=False).wait()

    # ------------------------------------------------------------ loading

    @asynccontextmanager
    async def match(self, tokens: Sequence[int], *, salt: bytes = b"") -> AsyncIterator[Hit]:
        """The longest stored prefix of ``tokens`` in full blocks, leased while the block is open: it is not evicted meanwhile."""
        parts = self._open_parts()
        chain = KeyChain(parts.namespace, parts.block_size)
        chain.extend(tokens, salt)
        async with self._matched(parts, tuple(chain.keys)) as hit:
            yield hit

    @asynccontextmanager
    async def _matched(self, parts: _Parts, keys: tuple[bytes, ...]) -> AsyncIterator[Hit]:
        request = f"match-{next(self._counter)}"
        reply: Reply[PrefixHit] = Reply()
        self._answers[request] = reply
        deadline = time.monotonic() + self._patience_s(len(keys) * parts.block_size)
        try:
            if not parts.hub.offer(MatchPrefix(request, 1, keys, deadline, block_tokens=parts.block_size)):
                answer = PrefixHit(request, 1, (), 0, self._generation, math.inf, HitReason.BUSY)
            else:
                with anyio.CancelScope(shield=True):  # a lease must not come for nobody
                    answer = await reply.wait()
        finally:
            del self._answers[request]
        hit = Hit(len(answer.slots) * parts.block_size, len(answer.slots), answer.reason, answer)
        try:
            yield hit
        finally:
            if hit._is_open and answer.slots:
                parts.hub.owe(ReleaseHit(request, 1))
            hit._is_open = False

    def _patience_s(self, tokens: int) -> float:
        l2 = self._config.l2
        if l2.backend == "off":
            return self._config.match.deadline_ms / 1e3
        wanted_ms = l2.deadline_base_ms + tokens / 1000 * l2.deadline_per_1000_tokens_ms
        return min(wanted_ms, max(l2.deadline_base_ms, l2.deadline_most_ms)) / 1e3

    async def load(self, hit: Hit, blocks: Sequence[int], *, first_block: int = 0) -> int:
        """Fill engine block ``blocks[i]`` with block ``first_block + i`` of the hit, whose lease this uses up; the number of tokens loaded.

        On a GPU it comes after what the stream of `register` was given before the call, and what is given to any stream after this
        has returned finds the KV in the blocks.

        Cancelled, it still waits for a copy that has started. Raises MisuseError, and CopyError when the blocks hold no KV.
        """
        parts = self._open_parts()
        count = len(blocks)
        if first_block < 0 or not 0 < count <= hit.blocks - first_block:
            raise MisuseError(f"blocks {first_block} to {first_block + count - 1} are not among the {hit.blocks} blocks of this hit")
        self._check_blocks(parts, blocks)
        mark = parts.worker.mark()  # before anything is awaited, as for a save
        async with self._loads_room:
            if not hit._is_open:
                raise MisuseError("this hit was loaded already, or its match is over: match again")
            if hit._answer.generation != self._generation:
                raise MisuseError("everything stored was forgotten by reset() since this match: match again")
            hit._is_open = False
            job = next(self._counter)
            reply: Reply[LoadEnded] = Reply()
            self._loads[job] = reply
            answer = hit._answer
            parts.hub.owe(StartLoad(job, answer.request, answer.sequence, first_block, count))
            slots = answer.slots[first_block : first_block + count]
            handle = parts.worker.load(LoadBlocks(job, answer.request, slots, tuple(blocks), mark))
            try:
                if handle is None:
                    parts.worker.withdrawn(job, answer.request)
                    raise CopyError(f"nothing was loaded, the runtime is off: {parts.worker.off_reason}")
                try:
                    ended = await reply.wait()
                except anyio.get_cancelled_exc_class():
                    handle.withdraw()
                    with anyio.CancelScope(shield=True):
                        await reply.wait()
                    raise
            finally:
                del self._loads[job]
        if ended.outcome is not LoadOutcome.LOADED:
            raise CopyError(f"the copy of {count} blocks ended as {ended.outcome.name}: they hold no KV")
        return count * parts.block_size

    # ------------------------------------------------------------ the rest

    async def flush(self) -> None:
        """Wait until everything saved so far is stored, on the nodes of L2 too, or dropped."""
        await self._flush(self._open_parts())

    async def reset(self) -> None:
        """Forget everything stored; open hits cannot be loaded any more."""
        parts = self._open_parts()
        self._generation += 1
        parts.hub.owe(ResetCache(self._generation))
        await self._flush(parts)

    def statistics(self) -> L1Statistics:
        """Slots by state, hits, drops by reason, and more, as of now."""
        statistics = self._open_parts().hub.statistics()
        assert statistics is not None
        return statistics

    async def _flush(self, parts: _Parts) -> None:
        await parts.hub.flush().wait()

    def _open_parts(self) -> _Parts:
        if self._is_closed:
            raise MisuseError("this runtime is closed")
        if self._parts is None:
            raise MisuseError("register() the tensors first")
        if self._parts.hub.off_reason is not None:
            raise CopyError(f"the runtime is off: {self._parts.hub.off_reason}")
        return self._parts

    def _check_blocks(self, parts: _Parts, blocks: Sequence[int]) -> None:
        if len(set(blocks)) != len(blocks):
            raise MisuseError("a block is named twice")
        if blocks and not (min(blocks) >= 0 and max(blocks) < parts.num_blocks):
            raise MisuseError(f"blocks are numbered 0 to {parts.num_blocks - 1}, not {min(blocks)} to {max(blocks)}")

    def _loop_failed(self, error: BaseException) -> None:
        if self._parts is not None:
            self._parts.hub.turn_off(f"the loop failed: {error!r}")

    def _on_answer(self, message: ToScheduler) -> None:
        """On the hub's loop."""
        match message:
            case PrefixHit():
                reply = self._answers.get(message.request)
                if reply is not None:
                    reply.answer(message)
            case ConnectorOff():
                for reply in list(self._answers.values()):
                    reply.gone()
            case ParentMissing():
                pass  # a save offers its whole prefix; what is missing is L1's lack of room

    def _on_load_ended(self, ended: LoadEnded) -> None:
        """On the load thread."""
        reply = self._loads.get(ended.job)
        if reply is not None:
            reply.answer(ended)

    def _close(self) -> None:
        self._is_closed = True
        parts, self._parts = self._parts, None
        if parts is None:
            return
        parts.hub.drain(DRAIN_S)
        parts.hub.close()
        parts.worker.close(3.0)
        self._loop.stop(1.0)
        parts.ledger.close()


def _handle_of(stream: CudaStream | int | None) -> Callable[[], int] | None:
    """For each mark; it holds the stream, which torch would give to somebody else. Raises MisuseError."""
    if stream is None:
        return None
    handle: object = getattr(stream, "cuda_stream", stream)
    if isinstance(handle, bool) or not isinstance(handle, int):
        raise MisuseError(f"stream= is a torch.cuda.Stream or the handle of a CUstream, not {stream!r}")
    return lambda: stream if isinstance(stream, int) else stream.cuda_stream


@dataclass(frozen=True, slots=True)
class _Parts:
    hub: HubRuntime
    worker: WorkerRuntime
    ledger: Ledger
    namespace: bytes
    block_size: int
    num_blocks: int
