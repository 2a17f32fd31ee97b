"""L2Writer: writes to one node, sealed, a slice at a time, after its reads."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import assert_never

import anyio
from anyio.abc import TaskGroup

from kvoffload.envelope import Envelope
from kvoffload.errors import CapacityError, InternalError
from kvoffload.l2.breaker import Breaker, overall
from kvoffload.l2.node import L2Node, Outcome
from kvoffload.l2.transfers import Turns, by_block, in_thread, is_all_done
from kvoffload.l2.under_way import OpenBatches, Unsettled
from kvoffload.l2.values import SlotBuffers, Values, seal
from kvoffload.mailbox import EndOfMailbox, Receiver, Reply
from kvoffload.messages import Batch, BlockKey, Drain, Flush, FromL2, Node, ToL2Writer, WriteBlocks, WriteFinished
from kvoffload.observe.logs import get_logger
from kvoffload.observe.profiling import tagged

log = get_logger("l2")


@dataclass(frozen=True, slots=True)
class WriterConfig:
    """``namespace``: of the names on the node. ``name``: the node's, in answers. Times in seconds.

    Batches are cut into slices of ``slice_bytes`` (a block at least), of which up to ``slices`` are under way, but no more than
    ``inflight_bytes``; each may take ``timeout_s``, and waits ``patience_s`` for reads to end. Blocks beyond the ``queue_blocks``
    that wait are dropped, newest first. An ending actor waits ``settle_timeout_s`` for what the node may still read.
    """

    namespace: str
    name: Node
    inflight_bytes: int = 256 << 20
    timeout_s: float = 5.0
    slice_bytes: int = 4 << 20
    slices: int = 4
    patience_s: float = 0.05
    queue_blocks: int = 4096
    hash_threads: int = 2
    settle_timeout_s: float = 2.5


@dataclass(slots=True)
class WriterStatistics:
    """Totals, in blocks unless named otherwise; may outlive an actor, and be handed to the next.

    ``dropped`` ones found the queue full, ``refused`` ones a node that is out, or a drain; both count as failed too. ``impatient``
    slices were written beside reads. ``outcomes`` are of parts.
    """

    stored: int = 0
    failed: int = 0
    unsettled: int = 0
    stored_bytes: int = 0
    dropped: int = 0
    refused: int = 0
    impatient: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)


@dataclass(slots=True)
class _Write:
    """A batch, and what became of its blocks so far."""

    message: WriteBlocks
    left: int
    stored: list[int] = field(default_factory=list)
    unsettled: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Slice:
    """Consecutive blocks of one batch."""

    write: _Write
    slots: tuple[int, ...]
    keys: tuple[BlockKey, ...]


class L2Writer:
    """What goes to one node.

    Owns: the writes under way and those that wait; the headers of slots while it seals them. It never changes a payload.
    Receives: `WriteBlocks`, `Flush`, `Drain`.
    Sends: one `WriteFinished` for each `WriteBlocks`, however it ends, and `TransfersSettled`, by ``report``, which returns at once.
    Ends: when its senders have closed and all was answered. Cancelled, or when the node raises (a bug, which is raised again), it
    answers what is left as failed, waits a little for what may still be read, and closes its mailbox.
    """

    def __init__(
        self,
        node: L2Node,
        breaker: Breaker,
        receiver: Receiver[ToL2Writer],
        report: Callable[[FromL2], None],
        slots: SlotBuffers,
        envelope: Envelope,
        config: WriterConfig,
        turns: Turns | None = None,
        clock: Callable[[], float] = time.monotonic,
        statistics: WriterStatistics | None = None,
    ) -> None:
        """``breaker`` is that of the node's writes; ``turns`` are shared with its prefetcher; ``clock`` is the node's."""
        self._node = node
        self._breaker = breaker
        self._receiver = receiver
        self._report = report
        self._slots = slots
        self._envelope = envelope
        self._config = config
        self._turns = turns if turns is not None else Turns()
        self._clock = clock
        self.statistics = statistics if statistics is not None else WriterStatistics()
        self._burst: deque[ToL2Writer] = deque()
        self._writes: dict[Batch, _Write] = {}
        """Those that are not answered."""
        self._queue: deque[_Slice] = deque()
        self._queued_blocks = 0
        self._running = 0
        self._open = OpenBatches()
        self._unsettled = Unsettled(node, config.name, report, lambda slots: None)
        self._is_draining = False
        self._is_ending = False
        self._slice_blocks = max(1, config.slice_bytes // slots.block_bytes)
        self._slices = max(1, min(config.slices, config.inflight_bytes // (self._slice_blocks * slots.block_bytes)))

    async def run(self) -> None:
        """Until the mailbox ends; once."""
        self._hashing = anyio.CapacityLimiter(self._config.hash_threads)
        try:
            async with anyio.create_task_group() as tasks:
                await self._receive(tasks)
        finally:
            self._answer_all()
            await self._unsettled.settle_finally(self._config.settle_timeout_s)

    async def _receive(self, tasks: TaskGroup) -> None:
        while True:
            try:
                self._burst.extend(await self._receiver.receive_burst())
            except EndOfMailbox:
                return
            with tagged("l2_writer"):
                while self._burst:
                    self._take(self._burst.popleft(), tasks)
                self._start(tasks)

    def _take(self, message: ToL2Writer, tasks: TaskGroup) -> None:
        match message:
            case WriteBlocks():
                self._take_write(message)
            case Flush():
                tasks.start_soon(self._answer_when_over, message.reply, self._open.snapshot(), None)
            case Drain():
                self._is_draining = True
                tasks.start_soon(self._answer_when_over, message.reply, self._open.snapshot(), message.deadline)
            case _:
                assert_never(message)

    def _take_write(self, message: WriteBlocks) -> None:
        batch, blocks = message.batch, len(message.slots)
        if batch in self._writes or len(message.keys) != blocks:
            raise InternalError(
                f"batch {batch} of node {self._config.name} is under way already, or has not a key for each slot: {message}"
            )
        self._writes[batch] = write = _Write(message, blocks)
        self._open.open(batch)
        has_room = self._queued_blocks + blocks <= self._config.queue_blocks
        if self._is_draining or not has_room or not blocks:
            self.statistics.refused += blocks * self._is_draining
            self.statistics.dropped += blocks * (not self._is_draining and not has_room)
            self._finish(write)
            self._open.close(batch)
            return
        self._queued_blocks += blocks
        for start in range(0, blocks, self._slice_blocks):
            end = start + self._slice_blocks
            self._queue.append(_Slice(write, message.slots[start:end], message.keys[start:end]))

    def _start(self, tasks: TaskGroup) -> None:
        while self._queue and self._running < self._slices and not self._is_ending:
            self._running += 1
            piece = self._queue.popleft()
            self._queued_blocks -= len(piece.slots)
            tasks.start_soon(self._write, piece, tasks)

    # ------------------------------------------------------------ writing

    async def _write(self, piece: _Slice, tasks: TaskGroup) -> None:
        """One slice; the last one of a batch to end answers it."""
        write, batch = piece.write, piece.write.message.batch
        try:
            await self._store(piece)
        except BaseException:
            self._is_ending = True
            raise
        finally:
            self._running -= 1
            write.left -= len(piece.slots)
            if not write.left:
                self._finish(write)
            self._start(tasks)
        if not write.left:
            if batch in self._unsettled:
                await self._unsettled.settle()
            self._open.close(batch)

    async def _store(self, piece: _Slice) -> None:
        """What became of the blocks goes into ``piece.write``; those in neither list have failed."""
        config, write = self._config, piece.write
        # Before the turn is waited for: a node that is out holds up nobody.
        if not self._breaker.allow(self._clock()):
            self.statistics.refused += len(piece.slots)
            return
        self.statistics.impatient += not await self._turns.wait_to_write(config.patience_s)
        values = Values(self._slots, config.namespace, piece.slots, piece.keys, is_writable=False)
        try:
            await in_thread(self._hashing, seal, self._envelope, self._slots, piece.slots, piece.keys)
        except CapacityError as error:
            log.error("blocks cannot be sealed, and are not written", node=config.name, blocks=len(piece.slots), reason=str(error))
            self._breaker.record(Outcome.FAILED, 0.0, self._clock())
            return
        try:
            outcomes = await self._write_values(values)
        except Exception:
            write.unsettled += piece.slots  # what a call that raised leaves behind, nobody knows
            raise
        if is_all_done(outcomes):
            self.statistics.outcomes[Outcome.DONE] += len(outcomes)
            write.stored += piece.slots
            return
        self.statistics.outcomes.update(outcomes)
        for slot, outcome in zip(piece.slots, by_block(outcomes, self._slots.ranks), strict=True):
            if outcome is Outcome.DONE:
                write.stored.append(slot)
            elif outcome is Outcome.UNSETTLED:
                write.unsettled.append(slot)

    async def _write_values(self, values: Values) -> list[Outcome]:
        begun = self._clock()
        outcomes: list[Outcome] = [Outcome.FAILED]
        try:
            outcomes = await self._node.write(values, begun + self._config.timeout_s)
        finally:
            now = self._clock()
            self._breaker.record(Outcome.DONE if is_all_done(outcomes) else overall(outcomes), now - begun, now, len(outcomes))
        if len(outcomes) != len(values):
            raise InternalError(f"node {self._config.name} was given {len(values)} values and answered for {len(outcomes)}")
        return outcomes

    # ------------------------------------------------------------ answers

    def _finish(self, write: _Write) -> None:
        """Answer a batch, all of whose blocks are over."""
        message = write.message
        del self._writes[message.batch]
        stored, unsettled = tuple(write.stored), tuple(write.unsettled)
        failed: tuple[int, ...] = ()
        if stored == message.slots:
            stored = message.slots
        else:  # also where slices ended out of order
            over = {*stored, *unsettled}
            failed = tuple(slot for slot in message.slots if slot not in over)
        counted = self.statistics
        counted.stored += len(stored)
        counted.failed += len(failed)
        counted.unsettled += len(unsettled)
        counted.stored_bytes += len(stored) * self._slots.block_bytes
        self._report(WriteFinished(message.batch, self._config.name, stored, failed, unsettled))
        self._unsettled.add(message.batch, unsettled)

    async def _answer_when_over(self, reply: Reply[bool], batches: Sequence[anyio.Event], deadline: float | None) -> None:
        """For Flush and Drain; what waits when a Drain's deadline comes is not written any more."""
        is_done = False
        try:
            is_done = await self._open.wait(batches, None if deadline is None else max(0.0, deadline - self._clock()))
            if deadline is not None and not is_done:
                self._drop_queue()
        finally:
            reply.answer(is_done)

    def _drop_queue(self) -> None:
        """Those that wait have failed. Slices start in order, so a batch that ends here had none that began, or unsettled slots."""
        while self._queue:
            piece = self._queue.popleft()
            self._queued_blocks -= len(piece.slots)
            self.statistics.refused += len(piece.slots)
            piece.write.left -= len(piece.slots)
            if not piece.write.left and piece.write.message.batch in self._writes:
                self._finish(piece.write)
                self._open.close(piece.write.message.batch)

    def _answer_all(self) -> None:
        """Nothing runs any more: answer what has not been, and take nothing more."""
        try:
            while left := self._receiver.receive_nowait():
                self._burst.extend(left)
        except EndOfMailbox:
            pass
        self._receiver.close()
        for message in self._burst:
            if isinstance(message, WriteBlocks):
                self._writes.setdefault(message.batch, _Write(message, len(message.slots)))
            else:
                message.reply.answer(False)
        self._burst.clear()
        for write in list(self._writes.values()):
            self._finish(write)
