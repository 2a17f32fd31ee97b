"""One rank's half at work: its slots as they become usable, its copy threads, and the GpuCopy actor that leads them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from kvoffload.actors.gpu_copy import FromGpuCopy, GpuCopy, GpuCopyConfig
from kvoffload.bridge import Inbox
from kvoffload.config import Config
from kvoffload.copy.hands import CopyFact, CopyHands, HandsConfig, LoadJob
from kvoffload.ledger import Ledger
from kvoffload.limits import available_bytes
from kvoffload.mailbox import OnFull, Receiver, Sender, open_mailbox
from kvoffload.mailbox_state import CallSoon
from kvoffload.messages import (
    ConnectorOff,
    Job,
    LoadBlocks,
    LoadEnded,
    LoadOutcome,
    SaveBlocks,
    SegmentGrown,
    SlotGrant,
    ToGpuCopy,
)
from kvoffload.observe.logs import get_logger
from kvoffload.populate import Populator
from kvoffload.runtime.rank import Rank, WrapEngine
from kvoffload.supervisor import Child, RestartPolicy, Supervisor

log = get_logger("worker")

__all__ = ["FromRank", "Rank", "WorkerRuntime", "WrapEngine"]

FromRank = FromGpuCopy | ConnectorOff


class WorkerRuntime:
    """Runs one rank. `run` is the loop's half; what vLLM's thread calls is the `CopyPort` below and never waits, save `wait`.

    ``call_soon`` schedules into the loop that `run` runs on. Reports go to ``to_hub`` of `attach`; until then only growth is remembered.
    """

    def __init__(self, config: Config, rank: Rank, call_soon: CallSoon, on_load_ended: Callable[[LoadEnded], None] | None = None) -> None:
        self.rank = rank
        self.off_reason: str | None = None
        self._config = config
        self._inbox: Inbox[LoadEnded] = Inbox()
        self._on_load_ended = on_load_ended or self._inbox.put
        self._to_hub: Callable[[FromRank], None] | None = None
        self._grown: SegmentGrown | None = None
        self._is_started = False
        self._populates = False
        self._lock = threading.Lock()
        sender: Sender[ToGpuCopy | CopyFact]
        receiver: Receiver[ToGpuCopy | CopyFact]
        sender, receiver = open_mailbox("gpu_copy", 1024, OnFull.REFUSE, call_soon=call_soon)
        self._grants = sender
        self._facts = sender.threadsafe()
        hands_config = HandsConfig(
            rank=rank.number,
            max_loads=config.loads.max_jobs,
            max_saves=config.save.max_jobs,
            pair_timeout_s=config.save.pair_timeout_s,
        )
        self.hands = CopyHands(rank.engine, self._on_load_ended, self._facts.owe, hands_config)
        self._gpu_copy = GpuCopy(GpuCopyConfig(rank=rank.number), self.hands, receiver, self._report)
        self._populator = Populator(rank.segment, self._segment_grown, headroom=self._headroom, preparation=rank.preparation(config))

    # ------------------------------------------------------------ life

    def start(self) -> None:
        """Make the first slots usable, and start the threads. The rest of the slots follow once the hub is there.

        On a GPU this takes up to ``gpu.pin_at_start_s``: now no CUDA graph is being captured, and later memory is pinned only when the
        first step has run. What will not be pinned does not wait. Raises CapacityError where memory does not suffice for one slot, and
        CopyError where the device cannot be used any more.
        """
        self._populator.first_slots(self._config.gpu.pin_at_start_s if self.rank.gpu is not None else 0.0)
        self.rank.tell()
        self.hands.start()
        self._is_started = True
        self._populate_rest()

    async def run(self) -> None:
        """The actor, supervised: one crash ends it, and with it the connector."""
        policy = RestartPolicy(restarts=0, escalate=lambda child, error: self.turn_off(f"{child} crashed: {error!r}"))
        await Supervisor([Child("gpu_copy", self._gpu_copy.run, policy)]).run()

    def attach(self, ledger: Ledger, to_hub: Callable[[FromRank], None]) -> None:
        """The hub is there: check saves against its ledger, and report to it. ``to_hub`` may be called from any thread."""
        self.rank.engine.use_ledger(ledger)
        with self._lock:
            self._to_hub = to_hub
            grown = self._grown
        self._populate_rest()
        if grown is not None:
            to_hub(grown)
        if self.off_reason is not None:
            to_hub(ConnectorOff(self.off_reason))

    def _populate_rest(self) -> None:
        """Only for a hub: a scheduler's half that is off cannot tell this one, which would take all of its memory for nothing."""
        with self._lock:
            if self._populates or not self._is_started or self._to_hub is None or self.off_reason is not None:
                return
            self._populates = True
        self._populator.start()

    def turn_off(self, reason: str, *, quiet: bool = False) -> None:
        """Save nothing more, start no load that has not started; running copies end. The hub is told. From any thread."""
        if self._stop(reason):
            say = log.info if quiet else log.error
            say("connector off on this rank: vLLM goes on without kvoffload", rank=self.rank.number, reason=reason)
            self._report(ConnectorOff(reason))

    def _stop(self, reason: str) -> bool:
        if self.off_reason is not None:
            return False
        self.off_reason = reason
        self.hands.stop_saving()
        self.hands.withdraw_all_unstarted()
        self._populator.close(0)
        return True

    def close(self, timeout_s: float) -> bool:
        """End the threads, and with them `run`, and give all memory back. False when a copy is still running, or the driver at work:
        then the memory is left to the end of the process.
        """
        self.off_reason = self.off_reason or "closed"
        deadline = time.monotonic() + timeout_s
        ended = self._populator.close(timeout_s / 2)
        ended = self.hands.close(timeout_s / 2) and ended
        self._grants.close()
        self._facts.close()
        return ended and self._give_back(deadline)

    def _give_back(self, deadline: float) -> bool:
        """In a thread: a driver takes seconds for a hundred GiB, and an engine that ends has no time for that."""
        thread = threading.Thread(target=self.rank.close, name="kvoffload-close", daemon=True)
        thread.start()
        thread.join(max(0.1, deadline - time.monotonic()))
        return not thread.is_alive()

    # ------------------------------------------------------------ from the hub

    def deliver(self, message: SlotGrant | ConnectorOff) -> None:
        """On the loop: what the hub sends to this rank."""
        if isinstance(message, SlotGrant):
            self._grants.owe(message)
        elif self._stop(message.reason):
            log.info("connector off on this rank, by the hub", rank=self.rank.number, reason=message.reason)

    def _report(self, message: FromRank) -> None:
        """From any thread. Before the hub is there only growth has happened."""
        with self._lock:
            to_hub = self._to_hub
            if isinstance(message, SegmentGrown):
                self._grown = message
        if to_hub is not None:
            to_hub(message)

    def _headroom(self) -> int:
        """Bytes that may still be taken: what was free at the start may be somebody else's by now."""
        return available_bytes().bytes - self._config.l1.reserve_bytes

    def _segment_grown(self, slots: int) -> None:
        """On the populating thread."""
        self._facts.owe(SegmentGrown(self.rank.number, slots))

    # ------------------------------------------------------------ CopyPort

    def mark(self) -> object:
        mark = self.rank.engine.mark()
        self._populator.allow()  # a real step is being run: graphs were captured before
        return mark

    def save(self, message: SaveBlocks) -> bool:
        return self.hands.saved(message)

    def load(self, message: LoadBlocks) -> LoadJob | None:
        if self.off_reason is not None:
            return None
        return self.hands.load(message)

    def withdrawn(self, job: Job, request: str) -> None:
        self._facts.owe(LoadEnded(job, request, LoadOutcome.WITHDRAWN, ()))

    def take(self) -> Sequence[LoadEnded]:
        return self._inbox.take()

    def wait(self, timeout_s: float) -> bool:
        return self._inbox.wait(timeout_s)
