"""One node's two actors, and what keeps them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Protocol, TypeVar

import anyio

from kvoffload.actors.l2_prefetcher import PrefetcherStatistics
from kvoffload.actors.l2_writer import WriterStatistics
from kvoffload.l2.breaker import BreakerStatistics
from kvoffload.l2.node import L2Node
from kvoffload.l2.node_breakers import ReadsBreaker, TellingBreaker
from kvoffload.l2.remains import Remains, Reports
from kvoffload.l2.ring import NodeAddress
from kvoffload.mailbox import OnFull, Receiver, Sender, open_mailbox
from kvoffload.messages import FromL2, ToL2Prefetcher, ToL2Writer
from kvoffload.observe.logs import get_logger
from kvoffload.runtime.node_watch import NodeWatch
from kvoffload.supervisor import Child, RestartPolicy, Supervisor

log = get_logger("l2")

QUEUE = 256
"""Batches that may wait for an actor; more are refused, which makes them misses, and writes that are dropped."""
RESTARTS = 5
"""Crashes of an actor within a minute, after which its node is out for `RETRY_S`."""
RETRY_S = 60.0
CLOSE_S = 1.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class NodeStatistics:
    """One node, as of now; the totals are over all lives of its actors."""

    reads: PrefetcherStatistics
    writes: WriterStatistics
    reading: BreakerStatistics
    writing: BreakerStatistics


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

    def __init__(self, name: str, make: Callable[[Receiver[T], Reports], Runs], report: Callable[[FromL2], None]) -> None:
        self.name = name
        self.reports = Reports(report)
        self.is_out = False
        """It crashed too often, and is left alone for a while."""
        self._make = make
        self._sender: Sender[T] | None = None
        self.is_leaving = False

    def offer(self, message: T) -> bool:
        """False: refused, it is behind, or between two lives, or has ended."""
        return self._sender is not None and self._sender.offer(message)

    async def run(self) -> None:
        """One life."""
        if self.is_leaving:
            return
        sender: Sender[T]
        receiver: Receiver[T]
        sender, receiver = open_mailbox(self.name, QUEUE, OnFull.REFUSE)
        self._sender = sender
        try:
            await self._make(receiver, self.reports).run()
        finally:
            self._sender = None
            sender.close()

    def leave(self) -> None:
        """Let it end once it has dealt with what it was given."""
        self.is_leaving = True
        if self._sender is not None:
            self._sender.close()
            self._sender = None


@dataclass(frozen=True, slots=True)
class NodeParts:
    """What one node is made of. ``remains`` reports to whom the lives do."""

    address: NodeAddress
    node: L2Node
    state: NodeState
    prefetcher: Life[ToL2Prefetcher]
    writer: Life[ToL2Writer]
    remains: Remains


class NodeActors:
    """A node's client, its prefetcher and its writer.

    Owns: the client; the slots that an actor's end left unsettled. Sends: ``back``, when an actor that was given up is tried again, or
    the node is used again after it was left alone. Ends: when it was told to `leave`, both actors have and nothing reads or writes a
    slot for this node; or when cancelled, and then what its client could not settle in time may.
    """

    def __init__(self, parts: NodeParts, back: Callable[[], None]) -> None:
        self.address = parts.address
        self.node = parts.node
        self.state = parts.state
        self.prefetcher = parts.prefetcher
        self.writer = parts.writer
        self._remains = parts.remains
        self._back = back
        self._watch = NodeWatch(parts.node, parts.state.reading, parts.state.writing, back, faults=parts.state.reads.faults)
        self._has_left = anyio.Event()
        self._is_closed = False

    @property
    def is_out(self) -> bool:
        """An actor of it was given up, for now."""
        return self.prefetcher.is_out or self.writer.is_out

    async def run(self) -> None:
        policy = RestartPolicy(restarts=RESTARTS, escalate=self._give_up, retry_s=RETRY_S)
        children = [Child(life.name, partial(self._run, life), policy) for life in (self.prefetcher, self.writer)]
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._watch.run)
                tasks.start_soon(self._settle)
                await Supervisor(children).run()
                tasks.cancel_scope.cancel()
            await self._close()
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(CLOSE_S):
                await self._close()
            if self._remains:
                log.error("slots stay out of use: their node may still touch them", node=self.address.name, slots=len(self._remains))

    async def _run(self, life: Life[ToL2Prefetcher] | Life[ToL2Writer]) -> None:
        if life.is_out and not life.is_leaving:
            life.is_out = False
            log.warning("node tried again", node=self.address.name, actor=life.name)
            self._back()
        try:
            await life.run()
        finally:
            self._remains.add(life.reports.left(), of_fetches=life is self.prefetcher)
            if self._remains:
                self._has_left.set()

    async def _settle(self) -> None:
        """What an actor's end left, as soon as that can be."""
        while True:
            await self._has_left.wait()
            self._has_left = anyio.Event()
            try:
                await self._remains.settle()
            except Exception as error:  # left until the client is closed
                log.error("a node failed to settle", node=self.address.name, exc_info=error)

    async def _close(self) -> None:
        """Once, unless it was cancelled."""
        if self._is_closed:
            return
        try:
            await self.node.close()
        except Exception as error:  # one client's bug must not end the others
            log.error("closing a node's client failed", node=self.address.name, exc_info=error)
        else:
            self._remains.closed()
        self._is_closed = True

    def leave(self) -> None:
        """The table does not name this address any more."""
        self.prefetcher.leave()
        self.writer.leave()

    def _give_up(self, child: str, error: BaseException) -> None:
        for life in (self.prefetcher, self.writer):
            life.is_out |= life.name == child
        log.error("node out: tried again in a while", node=self.address.name, actor=child, again_in_s=RETRY_S, reason=repr(error))
