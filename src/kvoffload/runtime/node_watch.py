"""What watches one node: it is probed while it is left alone, and the log says when that is and when it is used again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import anyio

from kvoffload.envelope import Fault
from kvoffload.l2.breaker import BreakerState
from kvoffload.l2.node import L2Node, NodeUnreachable, Outcome
from kvoffload.l2.node_breakers import ReadsBreaker, TellingBreaker
from kvoffload.messages import Node
from kvoffload.observe.logs import get_logger

log = get_logger("l2")

LOOK_S = 0.25
"""How often it is looked whether a node that is left alone may be probed; where there is but a doubt it is probed at once."""
PING_S = 2.0
RENEWED_S = 60.0
"""Connections that are renewed more often than this, as by a firewall that forgets them, say less of their node than of the network."""
TOLD_S = 60.0
"""Of one node the log hears once in so long."""

READS, WRITES = "its blocks are misses", "nothing is written to it"


class NodeLog:
    """One line when a node is left alone, and one when it is used again; but not again before `TOLD_S` have passed."""

    def __init__(self, name: Node, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._clock = clock
        self._told: set[str] = set()  # what of it is left alone, as far as the log says
        self._told_at: float | None = None
        self._faults: dict[Fault, int] = {}
        self._told_faults_at: float | None = None

    def left_alone(self, what: str, reason: str, wait_s: float, trouble: str | None = None) -> None:
        """To be called at each opening: one that was too soon after the last is told of later, if it lasts."""
        now = self._clock()
        if what in self._told or (self._told_at is not None and now - self._told_at < TOLD_S):
            return
        self._told.add(what)
        self._told_at = now
        more = {} if trouble is None else {"trouble": trouble}
        log.warning(f"node left alone: {what}", node=self._name, reason=reason, tried_again_in_s=round(wait_s, 1), **more)

    def used_again(self, what: str) -> None:
        if what in self._told:
            self._told.remove(what)
            log.warning("node used again", node=self._name, after=what)  # seen wherever its trouble was

    def wrong_values(self, faults: Mapping[Fault, int]) -> None:
        """``faults``: of its values, so far."""
        now = self._clock()
        if faults == self._faults or (self._told_faults_at is not None and now - self._told_faults_at < TOLD_S):
            return
        counts = {f"wrong_{fault.value}": more for fault, count in faults.items() if (more := count - self._faults.get(fault, 0))}
        self._faults = dict(faults)
        self._told_faults_at = now
        log.warning("node sent values that are not what was written: they are misses", node=self._name, **counts)


class NodeWatch:
    """Owns: the probes of a node's reads. Receives: what its breakers say. Sends: ``back``, when it is used again. Ends: when cancelled."""

    def __init__(
        self,
        node: L2Node,
        reading: ReadsBreaker,
        writing: TellingBreaker,
        back: Callable[[], None],
        faults: Mapping[Fault, int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``faults`` of the node's values so far, a live object; ``clock`` is that of the breakers, and of the node's deadlines."""
        self._node = node
        self._reading = reading
        self._back = back
        self._clock = clock
        self._faults: Mapping[Fault, int] = faults if faults is not None else {}
        self._log = NodeLog(node.name, clock)
        self._doubted = anyio.Event()
        self._renewals = node.renewals
        self._renewed_at = -RENEWED_S
        self._trouble: str | None = None
        """Of the last probe."""
        reading.on_doubt = lambda: self._doubted.set()
        for breaker, what in ((reading, READS), (writing, WRITES)):
            breaker.on_opened = partial(self._opened, what)
            breaker.on_closed = partial(self._closed, what)

    async def run(self) -> None:
        """Try a node that is left alone, so that no request has to."""
        while True:
            with anyio.move_on_after(LOOK_S):
                await self._doubted.wait()
            self._doubted = anyio.Event()
            begun = self._clock()
            if self._faults:
                self._log.wrong_values(self._faults)
            self._look_for_renewals(begun)
            if self._reading.allow_probe(begun):
                outcome = await self._probe(begun)
                now = self._clock()
                self._reading.record(outcome, now - begun, now)

    def _look_for_renewals(self, now: float) -> None:
        """A node that was restarted so quickly that nothing failed has lost what it had all the same."""
        renewals = self._node.renewals
        is_well = self._reading.state is BreakerState.CLOSED  # else it will be said when it is
        if renewals != self._renewals and is_well and now - self._renewed_at >= RENEWED_S:
            self._tell_back(now)

    async def _probe(self, begun: float) -> Outcome:
        try:
            await self._node.ping(begun + PING_S)
        except NodeUnreachable as error:
            self._trouble = str(error)
        except Exception as error:  # a client's bug is no reason to leave its node alone for ever, nor to end the others
            log.error("probing a node failed", node=self._node.name, exc_info=error)
            self._trouble = type(error).__name__
        else:
            self._trouble = None
            return Outcome.DONE
        return Outcome.FAILED

    def _opened(self, what: str, reason: str, wait_s: float) -> None:
        self._log.left_alone(what, reason, wait_s, self._trouble if what is READS else None)

    def _closed(self, what: str) -> None:
        self._log.used_again(what)
        self._tell_back(self._clock())

    def _tell_back(self, now: float) -> None:
        self._renewals, self._renewed_at = self._node.renewals, now
        self._back()
