"""The hub of one engine: one index for all ranks, and the second tier, on one loop. It is SchedulerSide's `HubPort`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING

import anyio

from kvoffload.actors.l1_manager import L1Manager
from kvoffload.bridge import Heartbeat, Inbox
from kvoffload.config import Config
from kvoffload.errors import KVOffloadError, PeerError, UnsupportedError
from kvoffload.l1.core import L1Core
from kvoffload.l1.parts import L1Config
from kvoffload.l1.statistics import L1Statistics
from kvoffload.mailbox import OnFull, Receiver, Reply, Sender, ThreadSender, open_mailbox
from kvoffload.mailbox_state import CallSoon
from kvoffload.messages import (
    AboutNodes,
    ConnectorOff,
    Drain,
    Flush,
    FromL2,
    Node,
    NodesChanged,
    RankLost,
    ResetCache,
    SlotGrant,
    ToL1Manager,
    ToScheduler,
)
from kvoffload.observe.logs import get_logger
from kvoffload.runtime.worker import FromRank
from kvoffload.supervisor import Child, RestartPolicy, Supervisor

if TYPE_CHECKING:
    from kvoffload.l1.remote import RemoteConfig
    from kvoffload.runtime.l2 import L2Runtime, MakeNode
    from kvoffload.runtime.node_actors import NodeStatistics
    from kvoffload.runtime.nodes_health import NodesHealth
    from kvoffload.runtime.shared import Shared

log = get_logger("hub")

WRITING_SHARE, WRITING_SHARE_OF_FEW, FEW_SLOTS = 0.25, 0.5, 1024
"""Of L1, that may wait to be written: those slots cannot be evicted, and a node that is slow must not cost L1 its use. Of a small L1 it
is more, or not even one prompt might be written.
"""
STAGING_SHARE = 0.5
"""The same where L1 keeps nothing, from the grant of a slot on: the other half is for loads."""
DRAIN_S = 1.5
"""For what is on its way to the second tier when everything ends."""
POSTS = 4096
"""Requests that may wait for L1Manager; answers and releases have room of their own."""


@dataclass(frozen=True, slots=True)
class RankPort:
    """How the hub reaches one rank: ``send`` on the loop, ``is_fresh`` from any thread (its loop, and the way to it, are alive)."""

    send: Callable[[SlotGrant | ConnectorOff], None]
    is_fresh: Callable[[], bool] = field(default=lambda: True)


class HubRuntime:
    """Runs L1Manager for all ranks, from `open` on.

    `run` is the loop's half. The `HubPort` below is for vLLM's thread (or the caller's): it never waits, save `wait`, and works from
    the start; what is offered before `open` is refused.
    """

    def __init__(self, config: Config, on_answer: Callable[[ToScheduler], None] | None = None, make_node: MakeNode | None = None) -> None:
        """``make_node`` makes the clients of the second tier's nodes, on the loop; None: real ones."""
        self._config = config
        self._make_node = make_node
        self._inbox: Inbox[ToScheduler] = Inbox()
        self._on_answer = on_answer or self._inbox.put
        self._opened: _Opened | None = None
        self._opening = Lock()
        self._early_reset: ResetCache | None = None
        self._is_reset = False
        self.off_reason: str | None = None

    def open(
        self,
        slots: int,
        ranks: Sequence[RankPort],
        call_soon: CallSoon,
        heartbeat: Heartbeat | None,
        shared: Shared | None = None,
    ) -> None:
        """Every rank is there, with segments of ``slots`` slots; what they report is for `deliver`.

        ``call_soon`` schedules into the loop that `run` will run on; ``heartbeat`` is that loop's. ``shared`` is what the second
        tier needs; None where blocks must stay in this engine.
        """
        sender: Sender[ToL1Manager]
        receiver: Receiver[ToL1Manager]
        sender, receiver = open_mailbox("l1_manager", POSTS, OnFull.REFUSE, call_soon=call_soon)
        posts, reports = sender.threadsafe(), sender.threadsafe()
        sender.close()
        l2 = self._second_tier(shared) if shared is not None and self._config.l2.backend != "off" else None
        # Without either the connector goes off below, and L1 has nothing to do.
        config = L1Config(ranks=len(ranks), policy=self._config.l1.policy, keeps=self._config.l1.enabled or l2 is None)
        if l2 is None or shared is None:
            core = L1Core(config, slots)
            manager = L1Manager(core, receiver, self._to_rank, self._on_answer, time.monotonic)
        else:
            core = L1Core(config, slots, self._remote_config(shared, slots))
            manager = L1Manager(
                core,
                receiver,
                self._to_rank,
                self._on_answer,
                time.monotonic,
                to_prefetcher=l2.to_prefetcher,
                to_writer=l2.to_writer,
            )
        with self._opening:
            if self._early_reset is not None:
                posts.owe(self._early_reset)
            self._opened = _Opened(tuple(ranks), heartbeat, posts, reports, core, manager, l2)
        if l2 is None:
            self._check_l1("blocks must stay in this engine" if shared is None else "L2 could not be started")

    def _second_tier(self, shared: Shared) -> L2Runtime | None:
        try:
            try:
                from kvoffload.runtime.l2 import L2Runtime  # what it needs comes with extras
            except ImportError as error:
                raise UnsupportedError(f"it needs {error.name}: pip install kvoffload[l2]") from error
            return L2Runtime(self._config.l2, shared, self._from_nodes, self._make_node)
        except KVOffloadError as error:
            log.error("L2 off: blocks stay in this engine", reason=str(error))
            return None

    def _remote_config(self, shared: Shared, slots: int) -> RemoteConfig:
        from kvoffload.l1.remote import RemoteConfig
        from kvoffload.l2.load_or_compute import LoadOrCompute

        settings = self._config.l2
        return RemoteConfig(
            ingestion=settings.ingestion,
            min_tokens=settings.min_tokens,
            retry_after_s=settings.retry_after_s,
            block_bytes=shared.block_bytes,
            load_or_compute=LoadOrCompute() if settings.load_or_compute else None,
            write_queue_blocks=settings.write_queue_blocks,
            max_writing_share=_writing_share(slots) if self._config.l1.enabled else STAGING_SHARE,
        )

    async def run(self) -> None:
        """L1Manager, supervised: when it crashes its state cannot be trusted, and the connector goes off. And the second tier."""
        opened = self._opened
        assert opened is not None
        policy = RestartPolicy(restarts=0, escalate=lambda child, error: self.turn_off(f"{child} crashed: {error!r}"))
        l1 = Supervisor([Child("l1_manager", partial(self._run_l1, opened), policy)])
        if opened.l2 is None:
            await l1.run()
            return
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._run_second_tier, opened.l2)
            await l1.run()
            tasks.cancel_scope.cancel()

    async def _run_l1(self, opened: _Opened) -> None:
        try:
            await opened.manager.run()
        finally:
            opened.has_ended = True

    async def _run_second_tier(self, l2: L2Runtime) -> None:
        """Its end is the end of L2, and of nothing else."""
        policy = RestartPolicy(restarts=0, escalate=self._lose_second_tier)
        await Supervisor([Child("l2", partial(self._run_l2, l2), policy)]).run()

    async def _run_l2(self, l2: L2Runtime) -> None:
        try:
            await l2.run()
        except UnsupportedError as error:
            log.error("L2 off: blocks stay in this engine", reason=str(error))
            self._forget_nodes()
            self._check_l1(str(error))

    def _lose_second_tier(self, child: str, error: BaseException) -> None:
        log.error("L2 off: blocks stay in this engine", reason=repr(error))
        self._forget_nodes()
        self._check_l1(repr(error))

    def _check_l1(self, reason: str) -> None:
        """There is no second tier: without L1 there is nothing."""
        if not self._config.l1.enabled:
            self.turn_off(f"l1.enabled is false, and there is no L2: {reason}")

    def _forget_nodes(self) -> None:
        """L1 asks nobody any more."""
        from kvoffload.l2.ring import RendezvousRing

        self._from_nodes(NodesChanged(RendezvousRing(1 << 62, ())))

    def _from_nodes(self, message: FromL2 | AboutNodes) -> None:
        """What the second tier sends to L1."""
        assert self._opened is not None
        self._opened.reports.owe(message)
        if isinstance(message, NodesChanged):
            self._opened.has_nodes = True

    def turn_off(self, reason: str, *, quiet: bool = False) -> None:
        """No new promise from here on; both halves are told. From any thread.

        ``quiet``: whoever noticed has said it, or the engine is being shut down.
        """
        if self.off_reason is not None:
            return
        self.off_reason = reason
        (log.info if quiet else log.error)("connector off: vLLM goes on without kvoffload", reason=reason)
        message = ConnectorOff(reason)
        self._on_answer(message)
        for rank in self._opened.ranks if self._opened is not None else ():
            rank.send(message)

    def deliver(self, rank: int, message: FromRank) -> None:
        """What a rank sends to the hub. From any thread."""
        if isinstance(message, ConnectorOff):
            self.lose_rank(rank, message.reason, quiet=True)
        elif self._opened is not None:
            self._opened.reports.owe(message)

    def lose_rank(self, rank: int, reason: str, *, quiet: bool = False) -> None:
        """This rank will not report any more, though its process may still use its slots. From any thread."""
        if self._opened is not None:
            self._opened.reports.owe(RankLost(rank, reason))
        self.turn_off(f"rank {rank} is lost: {reason}", quiet=quiet)

    def drain(self, timeout_s: float) -> bool:
        """Where there is a second tier: wait until what was saved is on its nodes, and take nothing new; whether it all is.

        For any thread but the loop's.
        """
        opened = self._opened
        if opened is None or opened.l2 is None:
            return True
        if opened.has_ended:
            return False
        deadline = time.monotonic() + timeout_s
        flushed: Reply[bool] = Reply()
        drained: Reply[bool] = Reply()
        try:
            # A drain alone would end with L1: nothing new goes to the nodes from then on, not even what is being saved.
            opened.posts.owe(Flush(flushed))
            is_whole = flushed.wait_sync(timeout_s * 0.7) is True
            opened.posts.owe(Drain(deadline, drained))
            return drained.wait_sync(max(0.0, deadline - time.monotonic()) + 0.1) is True and is_whole
        except PeerError:
            opened.posts.owe(Drain(deadline, drained))
            return False

    def close(self) -> None:
        """Let `run` end once what was posted has been handled."""
        self.off_reason = self.off_reason or "closed"
        if self._opened is not None:
            self._opened.posts.close()
            self._opened.reports.close()

    def node_statistics(self) -> dict[Node, NodeStatistics]:
        """Of each node of the second tier; empty where there is none. As of now, from any thread."""
        return self._opened.l2.statistics() if self._opened is not None and self._opened.l2 is not None else {}

    def nodes_health(self) -> NodesHealth | None:
        """Of the second tier; None where there is none. As of now, from any thread."""
        return self._opened.l2.health() if self._opened is not None and self._opened.l2 is not None else None

    @property
    def knows_nodes(self) -> bool:
        """L1 was told of the second tier's nodes, or there is none to be told of."""
        return self._opened is None or self._opened.l2 is None or self._opened.has_nodes

    def statistics(self) -> L1Statistics | None:
        """As of now, read while the loop may be writing: figures of one moment, not of one instant."""
        return self._opened.core.statistics() if self._opened is not None else None

    def _to_rank(self, rank: int, grant: SlotGrant) -> None:
        assert self._opened is not None
        self._opened.ranks[rank].send(grant)

    # ------------------------------------------------------------ HubPort

    @property
    def is_live(self) -> bool:
        opened = self._opened
        if opened is None or self.off_reason is not None:
            return False
        if opened.heartbeat is not None and not opened.heartbeat.fresh():
            return False
        return all(rank.is_fresh() for rank in opened.ranks)

    def offer(self, message: ToL1Manager) -> bool:
        opened = self._opened
        return opened is not None and opened.posts.offer(message)

    def owe(self, message: ToL1Manager) -> None:
        if self._opened is None and isinstance(message, ResetCache):
            # There is nothing to forget yet, but who asks counts generations from here on, and L1 must count along.
            with self._opening:
                if self._opened is None:
                    self._early_reset = message
                    return
        elif isinstance(message, ResetCache) and self._opened is not None and self._opened.l2 is not None and not self._is_reset:
            self._is_reset = True
            log.warning("L2 off from here on: a reset may mean other weights than those that its blocks are known by; restart to use it")
        # Off or not: a load that was promised before is still reported, and L1 must know of it. Where nobody takes it out any more the
        # mailbox is closed, and drops it.
        if self._opened is not None:
            self._opened.posts.owe(message)

    def take(self) -> Sequence[ToScheduler]:
        return self._inbox.take()

    def wait(self, timeout_s: float) -> bool:
        return self._inbox.wait(timeout_s)

    def flush(self, *, nodes: bool = True) -> Reply[bool]:
        """Answered when everything posted before is settled: stored, or dropped; ``nodes``: on the nodes of L2 too.

        Gone where there is nobody to answer.
        """
        reply: Reply[bool] = Reply()
        if self._opened is None or self.off_reason is not None:
            reply.gone()
        else:
            self._opened.posts.owe(Flush(reply, nodes))
        return reply


def _writing_share(slots: int) -> float:
    return WRITING_SHARE if slots >= FEW_SLOTS else WRITING_SHARE_OF_FEW


@dataclass(slots=True)
class _Opened:
    ranks: tuple[RankPort, ...]
    heartbeat: Heartbeat | None
    posts: ThreadSender[ToL1Manager]
    reports: ThreadSender[ToL1Manager]
    core: L1Core
    manager: L1Manager
    l2: L2Runtime | None
    has_ended: bool = False
    """L1Manager has: nobody takes what is posted."""
    has_nodes: bool = False
