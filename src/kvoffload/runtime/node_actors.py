"""One node's two actors, and what keeps them."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import anyio

from kvoffload.actors.l2_prefetcher import PrefetcherStatistics
from kvoffload.actors.l2_writer import WriterStatistics
from kvoffload.l2.breaker import Breaker, BreakerSettings, BreakerState, BreakerStatistics
from kvoffload.l2.node import L2Node, NodeUnreachable, Outcome
from kvoffload.l2.ring import NodeAddress
from kvoffload.mailbox import OnFull, Receiver, Sender, open_mailbox
from kvoffload.messages import ToL2Prefetcher, ToL2Writer
from kvoffload.observe.logs import get_logger
from kvoffload.supervisor import Child, RestartPolicy, Supervisor

log = get_logger("l2")

QUEUE = 256
"""Batches that may wait for an actor; more are refused, which makes them misses, and writes that are dropped."""
RESTARTS = 5
"""Crashes of an actor within a minute, after which its node is out until the table names another address for it."""
CLOSE_S = 1.0
PROBE_S = 0.25
"""How often a node that is left alone is looked after; when it may be tried again is its breaker's to say."""
PING_S = 2.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class NodeStatistics:
    """One node, as of now; the totals are over all lives of its actors."""

    reads: PrefetcherStatistics
    writes: WriterStatistics
    reading: BreakerStatistics
    writing: BreakerStatistics


class TellingBreaker(Breaker):
    """Calls ``on_closed`` when the node is used again."""

    def __init__(self, settings: BreakerSettings | None = None) -> None:
        super().__init__(settings)
        self.on_closed: Callable[[], None] = lambda: None

    def record(self, outcome: Outcome, seconds: float, now: float, values: int = 0) -> None:
        was_closed = self.state is BreakerState.CLOSED
        super().record(outcome, seconds, now, values)
        if not was_closed and self.state is BreakerState.CLOSED:
            self.on_closed()


class ReadsBreaker(TellingBreaker):
    """For requests that wait: one that waited in vain is enough, and none is ever the probe. `NodeActors` probes, by a ping."""

    def __init__(self) -> None:
        super().__init__(BreakerSettings(timeouts=1))

    def allow(self, now: float) -> bool:
        if self.state is BreakerState.CLOSED:
            return True
        super().allow(-math.inf)  # counts the refusal
        return False

    def allow_probe(self, now: float) -> bool:
        """Whether it is time for a probe; whoever is told True must make and `record` it."""
        return self.state is not BreakerState.CLOSED and super().allow(now)


@dataclass(frozen=True, slots=True)
class NodeState:
    """What outlives a node's actors: what they counted, and whether the node is left alone."""

    reads: PrefetcherStatistics = field(default_factory=PrefetcherStatistics)
    writes: WriterStatistics = field(default_factory=WriterStatistics)
    reading: ReadsBreaker = field(default_factory=ReadsBreaker)
    writing: TellingBreaker = field(default_factory=TellingBreaker)

    def statistics(self) -> NodeStatistics:
        return NodeStatistics(self.reads, self.writes, self.reading.statistics(), self.writing.statistics())


class Runs(Protocol):
    async def run(self) -> None: ...


class Life(Generic[T]):
    """An actor that may be restarted, with a new mailbox for each of its lives: what one life leaves behind, it answers as failed."""

    def __init__(self, name: str, make: Callable[[Receiver[T]], Runs]) -> None:
        self.name = name
        self._make = make
        self._sender: Sender[T] | None = None
        self._is_leaving = False

    def offer(self, message: T) -> bool:
        """False: refused, it is behind, or between two lives, or has ended."""
        return self._sender is not None and self._sender.offer(message)

    async def run(self) -> None:
        """One life."""
        if self._is_leaving:
            return
        sender: Sender[T]
        receiver: Receiver[T]
        sender, receiver = open_mailbox(self.name, QUEUE, OnFull.REFUSE)
        self._sender = sender
        try:
            await self._make(receiver).run()
        finally:
            self._sender = None
            sender.close()

    def leave(self) -> None:
        """Let it end once it has dealt with what it was given."""
        self._is_leaving = True
        if self._sender is not None:
            self._sender.close()
            self._sender = None


class NodeActors:
    """A node's client, its prefetcher and its writer.

    Owns: the client. Ends: when it was told to `leave` and both actors have, or when cancelled; nothing reads or writes a slot for
    this node then, save what its client could not settle in time.
    """

    def __init__(
        self, address: NodeAddress, node: L2Node, state: NodeState, prefetcher: Life[ToL2Prefetcher], writer: Life[ToL2Writer]
    ) -> None:
        self.address = address
        self.node = node
        self.state = state
        self.prefetcher = prefetcher
        self.writer = writer

    async def run(self) -> None:
        policy = RestartPolicy(restarts=RESTARTS, escalate=self._give_up)
        children = [Child(life.name, _run(life), policy) for life in (self.prefetcher, self.writer)]
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._probe)
                await Supervisor(children).run()
                tasks.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(CLOSE_S):
                await self._close()

    async def _probe(self) -> None:
        """Try a node that is left alone, so that no request has to."""
        breaker = self.state.reading
        while True:
            await anyio.sleep(PROBE_S)
            begun = time.monotonic()
            if not breaker.allow_probe(begun):
                continue
            try:
                await self.node.ping(begun + PING_S)
                outcome = Outcome.DONE
            except NodeUnreachable:
                outcome = Outcome.FAILED
            except Exception as error:  # a client's bug is no reason to leave its node alone for ever, nor to end the others
                log.error("probing a node failed", node=self.address.name, exc_info=error)
                outcome = Outcome.FAILED
            now = time.monotonic()
            breaker.record(outcome, now - begun, now)

    async def _close(self) -> None:
        try:
            await self.node.close()
        except Exception as error:  # one client's bug must not end the others
            log.error("closing a node's client failed", node=self.address.name, exc_info=error)

    def leave(self) -> None:
        """The table does not name this address any more."""
        self.prefetcher.leave()
        self.writer.leave()

    def _give_up(self, child: str, error: BaseException) -> None:
        log.error("node out, until the table changes", node=self.address.name, actor=child, reason=repr(error))


def _run(life: Life[ToL2Prefetcher] | Life[ToL2Writer]) -> Callable[[], Awaitable[None]]:
    return life.run
