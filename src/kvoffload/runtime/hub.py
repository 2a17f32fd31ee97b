"""The hub of one engine: one index for all ranks, on one loop. It is SchedulerSide's `HubPort`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock

from kvoffload.actors.l1_manager import L1Manager
from kvoffload.bridge import Heartbeat, Inbox
from kvoffload.config import Config
from kvoffload.l1.core import L1Core
from kvoffload.l1.parts import L1Config
from kvoffload.l1.statistics import L1Statistics
from kvoffload.mailbox import OnFull, Receiver, Reply, Sender, ThreadSender, open_mailbox
from kvoffload.mailbox_state import CallSoon
from kvoffload.messages import ConnectorOff, Flush, RankLost, ResetCache, SlotGrant, ToL1Manager, ToScheduler
from kvoffload.observe.logs import get_logger
from kvoffload.runtime.worker import FromRank
from kvoffload.supervisor import Child, RestartPolicy, Supervisor

log = get_logger("hub")

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

    def __init__(self, config: Config, on_answer: Callable[[ToScheduler], None] | None = None) -> None:
        self._config = config
        self._inbox: Inbox[ToScheduler] = Inbox()
        self._on_answer = on_answer or self._inbox.put
        self._opened: _Opened | None = None
        self._opening = Lock()
        self._early_reset: ResetCache | None = None
        self.off_reason: str | None = None

    def open(self, slots: int, ranks: Sequence[RankPort], call_soon: CallSoon, heartbeat: Heartbeat | None) -> None:
        """Every rank is there, with segments of ``slots`` slots; what they report is for `deliver`.

        ``call_soon`` schedules into the loop that `run` will run on; ``heartbeat`` is that loop's.
        """
        sender: Sender[ToL1Manager]
        receiver: Receiver[ToL1Manager]
        sender, receiver = open_mailbox("l1_manager", POSTS, OnFull.REFUSE, call_soon=call_soon)
        core = L1Core(L1Config(ranks=len(ranks), policy=self._config.l1.policy), slots)
        manager = L1Manager(core, receiver, self._to_rank, self._on_answer, time.monotonic)
        posts, reports = sender.threadsafe(), sender.threadsafe()
        sender.close()
        with self._opening:
            if self._early_reset is not None:
                posts.owe(self._early_reset)
            self._opened = _Opened(tuple(ranks), heartbeat, posts, reports, core, manager)

    async def run(self) -> None:
        """L1Manager, supervised: when it crashes its state cannot be trusted, and the connector goes off."""
        assert self._opened is not None
        policy = RestartPolicy(restarts=0, escalate=lambda child, error: self.turn_off(f"{child} crashed: {error!r}"))
        await Supervisor([Child("l1_manager", self._opened.manager.run, policy)]).run()

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

    def close(self) -> None:
        """Let `run` end once what was posted has been handled."""
        self.off_reason = self.off_reason or "closed"
        if self._opened is not None:
            self._opened.posts.close()
            self._opened.reports.close()

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
        # Off or not: a load that was promised before is still reported, and L1 must know of it. Where nobody takes it out any more the
        # mailbox is closed, and drops it.
        if self._opened is not None:
            self._opened.posts.owe(message)

    def take(self) -> Sequence[ToScheduler]:
        return self._inbox.take()

    def wait(self, timeout_s: float) -> bool:
        return self._inbox.wait(timeout_s)

    def flush(self) -> Reply[bool]:
        """Answered when everything posted before is settled: in L1, or dropped. Gone where there is nobody to answer."""
        reply: Reply[bool] = Reply()
        if self._opened is None or self.off_reason is not None:
            reply.gone()
        else:
            self._opened.posts.owe(Flush(reply))
        return reply


@dataclass(frozen=True, slots=True)
class _Opened:
    ranks: tuple[RankPort, ...]
    heartbeat: Heartbeat | None
    posts: ThreadSender[ToL1Manager]
    reports: ThreadSender[ToL1Manager]
    core: L1Core
    manager: L1Manager
