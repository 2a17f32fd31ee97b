"""L2Prefetcher: reads of one node, verified before anybody hears of them."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import assert_never

import anyio
from anyio.abc import TaskGroup

from kvoffload.envelope import Envelope, Fault
from kvoffload.errors import CapacityError, InternalError
from kvoffload.l2.breaker import Breaker, overall
from kvoffload.l2.budget import ByteBudget, Ticket
from kvoffload.l2.node import L2Node, Outcome, value_name
from kvoffload.l2.transfers import Turns, by_block, in_thread, is_all_done
from kvoffload.l2.under_way import OpenBatches, Unsettled
from kvoffload.l2.values import Names, SlotBuffers, Values
from kvoffload.mailbox import EndOfMailbox, Receiver
from kvoffload.messages import Batch, BlocksFound, Drain, FetchBlocks, FetchFinished, FindBlocks, FromL2, Node, ToL2Prefetcher
from kvoffload.observe.logs import get_logger
from kvoffload.observe.profiling import tagged

log = get_logger("l2")


@dataclass(frozen=True, slots=True)
class PrefetcherConfig:
    """``namespace``: of the names on the node. ``name``: the node's, in answers. Times in seconds.

    With less than ``least_s`` left nothing is begun: it would come late, and speak ill of the node. More than ``batches`` at once
    are refused. An ending actor waits ``settle_timeout_s`` for what the node may still write.
    """

    namespace: str
    name: Node
    inflight_bytes: int = 256 << 20
    batches: int = 1024
    hash_threads: int = 2
    least_s: float = 0.001
    settle_timeout_s: float = 2.5
    discard_timeout_s: float = 1.0


@dataclass(slots=True)
class PrefetcherStatistics:
    """Totals, in blocks unless named otherwise; may outlive an actor, and be handed to the next.

    ``refused`` batches were answered without the node: it is out, draining, or behind; ``late`` ones found no room in time.
    ``outcomes`` are of parts, ``faults`` of parts that came and were not what they should be; those the node is asked to discard.
    """

    asked: int = 0
    found: int = 0
    fetched: int = 0
    absent: int = 0
    failed: int = 0
    unsettled: int = 0
    fetched_bytes: int = 0
    refused: int = 0
    late: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    faults: Counter[Fault] = field(default_factory=Counter)


class L2Prefetcher:
    """What one node has, and its bytes.

    Owns: the reads under way; the slots of a `FetchBlocks` until they are reported, the unsettled ones until that is.
    Receives: `FindBlocks`, `FetchBlocks`, `Drain`.
    Sends: one `BlocksFound` or `FetchFinished` for each, however it ends, and `TransfersSettled`, by ``report``, which returns at once.
    Ends: when its senders have closed and all was answered. Cancelled, or when the node raises (a bug, which is raised again), it
    answers what is left as failed, waits a little for what may still be written, and closes its mailbox.
    """

    def __init__(
        self,
        node: L2Node,
        breaker: Breaker,
        receiver: Receiver[ToL2Prefetcher],
        report: Callable[[FromL2], None],
        slots: SlotBuffers,
        envelope: Envelope,
        config: PrefetcherConfig,
        turns: Turns | None = None,
        clock: Callable[[], float] = time.monotonic,
        statistics: PrefetcherStatistics | None = None,
    ) -> None:
        """``turns`` are shared with the node's writer; ``clock`` is that of the messages' deadlines."""
        self._node = node
        self._breaker = breaker
        self._receiver = receiver
        self._report = report
        self._slots = slots
        self._envelope = envelope
        self._config = config
        self._turns = turns if turns is not None else Turns()
        self._clock = clock
        self.statistics = statistics if statistics is not None else PrefetcherStatistics()
        self._burst: deque[ToL2Prefetcher] = deque()
        self._unanswered: dict[Batch, FindBlocks | FetchBlocks] = {}
        self._open = OpenBatches()
        self._unsettled = Unsettled(node, config.name, report, slots.clear)
        self._budget = ByteBudget(config.inflight_bytes)
        self._is_draining = False
        self._has_no_thread = False

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
            with tagged("l2_prefetcher"):
                while self._burst:
                    self._take(self._burst.popleft(), tasks)

    def _take(self, message: ToL2Prefetcher, tasks: TaskGroup) -> None:
        match message:
            case FindBlocks():
                if self._may_open(message):
                    tasks.start_soon(self._find, message)
            case FetchBlocks():
                if self._may_open(message):
                    # Asked for here: the tasks may start in any order.
                    ticket = self._budget.ask(len(message.slots) * self._slots.block_bytes)
                    tasks.start_soon(self._fetch, message, ticket)
            case Drain():
                self._is_draining = True
                self._budget.refuse_all()
                tasks.start_soon(self._drain, message, self._open.snapshot())
            case _:
                assert_never(message)

    def _may_open(self, message: FindBlocks | FetchBlocks) -> bool:
        """Whether it is begun; if not, it is answered here."""
        if message.batch in self._unanswered:
            raise InternalError(f"batch {message.batch} of node {self._config.name} is under way already: numbers are never used twice")
        self._unanswered[message.batch] = message
        if self._is_draining or len(self._open) >= self._config.batches:
            self.statistics.refused += 1
            self._answer_failed(message)
            return False
        self._open.open(message.batch)
        return True

    def _may_ask(self, deadline: float) -> bool:
        """To be asked right before the node is: the breaker may count on hearing how that went."""
        now = self._clock()
        if deadline - now < self._config.least_s:
            self.statistics.late += 1
            return False
        if not self._breaker.allow(now):
            self.statistics.refused += 1
            return False
        return True

    # ------------------------------------------------------------ finding

    async def _find(self, find: FindBlocks) -> None:
        try:
            if self._may_ask(find.deadline):
                self._answer(BlocksFound(find.batch, self._config.name, await self._ask_node(find)))
        finally:
            self._answer_failed(find)
            self._open.close(find.batch)

    async def _ask_node(self, find: FindBlocks) -> tuple[bool, ...]:
        ranks = self._slots.ranks
        names = Names(self._config.namespace, find.keys, ranks)
        begun = self._clock()
        try:
            parts = await self._node.find(names, find.deadline)
        except BaseException:
            self._record([Outcome.FAILED], begun)
            raise
        if parts is None:
            self._record([Outcome.FAILED if self._clock() < find.deadline else Outcome.LATE], begun)
            return ()
        self._tell_breaker(Outcome.DONE, len(names), begun)
        if len(parts) != len(names):
            raise InternalError(f"node {self._config.name} was asked for {len(names)} names and answered for {len(parts)}")
        found = tuple(parts) if ranks == 1 else tuple(all(parts[start : start + ranks]) for start in range(0, len(parts), ranks))
        self.statistics.asked += len(found)
        self.statistics.found += found.count(True)
        return found

    def _record(self, outcomes: Sequence[Outcome], begun: float) -> float:
        """Tell the breaker; seconds since ``begun``."""
        return self._tell_breaker(overall(outcomes), len(outcomes), begun)

    def _tell_breaker(self, outcome: Outcome, values: int, begun: float) -> float:
        now = self._clock()
        self._breaker.record(outcome, now - begun, now, values)
        return now - begun

    # ------------------------------------------------------------ fetching

    async def _fetch(self, fetch: FetchBlocks, ticket: Ticket) -> None:
        wrong: list[str] = []
        try:
            # Those that wait count as well: what they wait for is the same node that a write would keep busy.
            with self._turns.reading(), ticket:
                is_its_turn = await ticket.wait(fetch.deadline - self._clock())
                if not is_its_turn:
                    self.statistics.late += not self._is_draining
                elif self._may_ask(fetch.deadline):
                    wrong = await self._read(fetch, ticket)
            if wrong:
                await self._node.discard(wrong, self._clock() + self._config.discard_timeout_s)
            if fetch.batch in self._unsettled:
                await self._unsettled.settle()
        finally:
            self._answer_failed(fetch)
            self._open.close(fetch.batch)

    async def _read(self, fetch: FetchBlocks, ticket: Ticket) -> list[str]:
        """Names of what the node has, and should not."""
        values = Values(self._slots, self._config.namespace, fetch.slots, fetch.keys, is_writable=True, envelope=self._envelope)
        outcomes: list[Outcome] = []
        try:
            seconds = await self._read_values(values, fetch.deadline, outcomes)
            self._budget.give_back(ticket)
            finished, wrong = await self._verify(fetch, values, outcomes, seconds)
        except BaseException as error:
            # Cancelled, a call leaves nothing behind; what one that raised leaves, nobody knows.
            loose = fetch.slots if isinstance(error, Exception) else _unsettled_of(fetch.slots, outcomes, self._slots.ranks)
            left = tuple(slot for slot in fetch.slots if slot not in set(loose))
            self._finish(FetchFinished(fetch.batch, self._config.name, (), (), left, loose))
            raise
        self._finish(finished)
        return wrong

    async def _read_values(self, values: Values, deadline: float, outcomes: list[Outcome]) -> float:
        """Read in slices of at most what may be under way; seconds that it took."""
        at_once = max(1, self._config.inflight_bytes // self._slots.value_bytes)
        begun = self._clock()
        try:
            for start in range(0, len(values), at_once):
                items = values[start : start + at_once]
                answer = await self._node.read(items, deadline)
                if len(answer) != len(items):
                    raise InternalError(f"node {self._config.name} read {len(items)} values and answered for {len(answer)}")
                outcomes += answer
        except BaseException:
            self._record([Outcome.FAILED], begun)
            raise
        if is_all_done(outcomes):
            self.statistics.outcomes[Outcome.DONE] += len(outcomes)
            return self._tell_breaker(Outcome.DONE, len(outcomes), begun)
        self.statistics.outcomes.update(outcomes)
        return self._record(outcomes, begun)

    async def _verify(self, fetch: FetchBlocks, values: Values, outcomes: list[Outcome], seconds: float) -> tuple[FetchFinished, list[str]]:
        """The answer, and the names of parts that are wrong. What nobody has proven is no part of a block that came."""
        proven, faults, ranks = values.proven, values.faults, self._slots.ranks
        is_whole = is_all_done(outcomes)
        if not is_whole or proven.count(1) < len(proven):
            left = [place for place, outcome in enumerate(outcomes) if outcome is Outcome.DONE and not proven[place]]
            await self._prove(values, left)
        if is_whole and proven.count(1) == len(proven) and not faults:
            return FetchFinished(fetch.batch, self._config.name, fetch.slots, (), (), (), seconds), []
        for place, outcome in enumerate(outcomes):
            if outcome is Outcome.DONE and place in faults:
                outcomes[place] = Outcome.MALFORMED
                self.statistics.faults[faults[place]] += 1
            elif outcome is Outcome.DONE and not proven[place]:
                outcomes[place] = Outcome.FAILED
        wrong = [place for place, outcome in enumerate(outcomes) if outcome is Outcome.MALFORMED]
        names = [value_name(self._config.namespace, fetch.keys[place // ranks], place % ranks) for place in wrong]
        return self._finished(fetch, by_block(outcomes, ranks), seconds), names

    async def _prove(self, values: Values, places: Sequence[int]) -> None:
        """What was not proven where it was received."""
        if not places:
            return
        try:
            await in_thread(self._hashing, values.prove, places, lambda: False)
        except CapacityError as error:
            if not self._has_no_thread:
                log.error("blocks that came cannot be verified, and are misses", node=self._config.name, reason=str(error))
            self._has_no_thread = True
        else:
            self._has_no_thread = False

    def _finished(self, fetch: FetchBlocks, outcomes: Sequence[Outcome], seconds: float) -> FetchFinished:
        """The answer, of what became of each block."""
        by_result: tuple[list[int], list[int], list[int], list[int]] = ([], [], [], [])
        for slot, outcome in zip(fetch.slots, outcomes, strict=True):
            by_result[_RESULT.get(outcome, _FAILED)].append(slot)
        fetched, absent, failed, unsettled = map(tuple, by_result)
        return FetchFinished(fetch.batch, self._config.name, fetched, absent, failed, unsettled, seconds)

    # ------------------------------------------------------------ answers

    def _finish(self, finished: FetchFinished) -> None:
        """Answer a fetch whose slots were touched."""
        self._slots.clear((*finished.absent, *finished.failed))  # the unsettled ones when they are
        self.statistics.fetched_bytes += len(finished.fetched) * self._slots.block_bytes
        self._answer(finished)
        self._unsettled.add(finished.batch, finished.unsettled)

    def _answer(self, message: BlocksFound | FetchFinished) -> None:
        del self._unanswered[message.batch]
        if isinstance(message, FetchFinished):
            counted = self.statistics
            counted.fetched += len(message.fetched)
            counted.absent += len(message.absent)
            counted.failed += len(message.failed)
            counted.unsettled += len(message.unsettled)
        self._report(message)

    def _answer_failed(self, message: FindBlocks | FetchBlocks) -> None:
        """Unless it was answered; its slots were not touched."""
        if message.batch not in self._unanswered:
            return
        if isinstance(message, FindBlocks):
            self._answer(BlocksFound(message.batch, self._config.name, ()))
        else:
            self._answer(FetchFinished(message.batch, self._config.name, (), (), message.slots))

    async def _drain(self, drain: Drain, batches: Sequence[anyio.Event]) -> None:
        is_done = False
        try:
            is_done = await self._open.wait(batches, max(0.0, drain.deadline - self._clock()))
        finally:
            drain.reply.answer(is_done)

    def _answer_all(self) -> None:
        """Nothing runs any more: answer what has not been, and take nothing more."""
        try:
            while left := self._receiver.receive_nowait():
                self._burst.extend(left)
        except EndOfMailbox:
            pass
        self._receiver.close()
        for message in self._burst:
            if isinstance(message, Drain):
                message.reply.answer(False)
            else:
                self._unanswered.setdefault(message.batch, message)
        self._burst.clear()
        for message in list(self._unanswered.values()):
            self._answer_failed(message)


_FETCHED, _ABSENT, _FAILED, _UNSETTLED = range(4)
_RESULT = {Outcome.DONE: _FETCHED, Outcome.ABSENT: _ABSENT, Outcome.UNSETTLED: _UNSETTLED}


def _unsettled_of(slots: Sequence[int], outcomes: Sequence[Outcome], ranks: int) -> tuple[int, ...]:
    """Of a fetch that got so far."""
    return tuple(dict.fromkeys(slots[index // ranks] for index, outcome in enumerate(outcomes) if outcome is Outcome.UNSETTLED))
