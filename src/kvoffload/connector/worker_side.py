"""The connector's half in vLLM's worker: what the metadata says goes to the copy threads, what they did goes into vLLM's reports."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kvoffload.connector.metadata import PlannedLoad, StepMetadata
from kvoffload.connector.ports import CopyPort, LoadHandle
from kvoffload.messages import Job, LoadBlocks, LoadOutcome, SaveBlocks
from kvoffload.observe.logs import get_logger

log = get_logger("worker_side")


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Seconds. ``start_deadline_s`` bounds when a load's copy may start, not when it ends."""

    start_deadline_s: float = 1.0
    wait_idle_s: float = 0.002


@dataclass(slots=True)
class PendingLoad:
    """A promised load that vLLM has not been told the end of."""

    load: PlannedLoad
    handle: LoadHandle | None
    withdraw_at: float


@dataclass(slots=True)
class WorkerCounters:
    """Since the last time they were taken."""

    loaded_blocks: int = 0
    failed_loads: int = 0
    withdrawn_loads: int = 0
    refused_saves: int = 0


@dataclass(slots=True)
class Report:
    """What vLLM is to be told in this step."""

    finished: set[str] = field(default_factory=set)
    invalid_blocks: set[int] = field(default_factory=set)


class WorkerSide:
    """All methods are hooks of vLLM's model runner, on its thread. Every load in the metadata is reported exactly once, whatever dies.

    ``copies`` is None where this half could not start: loads are then reported failed, saves are left alone.
    """

    def __init__(self, copies: CopyPort | None, settings: WorkerSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._copies = copies
        self._settings = settings
        self._clock = clock
        self._pending: dict[Job, PendingLoad] = {}
        self._report = Report()
        self.counters = WorkerCounters()
        self.has_statistics = False
        """The counters have changed since they were taken."""

    def start_load_kv(self, metadata: StepMetadata) -> None:
        """Hand this step's loads to the copy threads."""
        if not metadata.loads:
            return
        mark = self._copies.mark() if self._copies is not None else None
        now = self._clock()
        for load in metadata.loads:
            handle = None
            self._pending[load.job] = PendingLoad(load, None, now)
            if self._copies is not None and not load.withdrawn:
                handle = self._copies.load(LoadBlocks(load.job, load.request, load.slots, load.blocks, mark))
            if handle is None:
                self._end(load.job, LoadOutcome.WITHDRAWN)
                if self._copies is not None and load.slots:
                    self._copies.withdrawn(load.job, load.request)
            else:
                self._pending[load.job] = PendingLoad(load, handle, now + self._settings.start_deadline_s)

    def start_none(self, metadata: StepMetadata) -> None:
        """`start_load_kv` failed: what of this step's loads was not handed over is off, and vLLM is told."""
        for load in metadata.loads:
            pending = self._pending.setdefault(load.job, PendingLoad(load, None, self._clock()))
            if pending.handle is None:
                self._end(load.job, LoadOutcome.WITHDRAWN)

    def wait_for_save(self, metadata: StepMetadata) -> None:
        """Tell the copy threads that this step's blocks have been computed, or will have been at the mark."""
        if not metadata.saves or self._copies is None:
            return
        mark = self._copies.mark()
        for job in metadata.saves:
            if not self._copies.save(SaveBlocks(job, mark)):
                self.counters.refused_saves += 1
                self.has_statistics = True

    def get_finished(self, *, idle: bool) -> set[str] | None:
        """Requests whose loads have ended. In a step that computes nothing this waits up to ``wait_idle_s``, lock released, for one."""
        if self._pending:
            self._take()
            if idle and self._copies is not None and not self._report.finished and self._pending:
                self._copies.wait(self._settings.wait_idle_s)
                self._take()
            if self._pending:
                self._withdraw_late()
        if not self._report.finished:
            return None
        finished, self._report.finished = self._report.finished, set()
        return finished

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Engine blocks of the loads that `get_finished` just reported and that did not end well."""
        invalid, self._report.invalid_blocks = self._report.invalid_blocks, set()
        return invalid

    @property
    def has_pending_loads(self) -> bool:
        return bool(self._pending)

    @property
    def has_errors(self) -> bool:
        return bool(self._report.invalid_blocks)

    @property
    def has_news(self) -> bool:
        """Loads are pending, or there is something to report."""
        return bool(self._pending) or bool(self._report.finished)

    def _take(self) -> None:
        assert self._copies is not None or not any(pending.handle for pending in self._pending.values())
        if self._copies is not None:
            for ended in self._copies.take():
                self._end(ended.job, ended.outcome)

    def _withdraw_late(self) -> None:
        now = self._clock()
        for job, pending in list(self._pending.items()):
            if now >= pending.withdraw_at and pending.handle is not None and pending.handle.withdraw():
                self._end(job, LoadOutcome.WITHDRAWN)

    def _end(self, job: Job, outcome: LoadOutcome) -> None:
        pending = self._pending.pop(job, None)
        if pending is None:
            return
        self._report.finished.add(pending.load.request)
        self.has_statistics = True
        if outcome is LoadOutcome.LOADED:
            self.counters.loaded_blocks += len(pending.load.blocks)
            return
        self._report.invalid_blocks.update(pending.load.blocks)
        if outcome is LoadOutcome.FAILED:
            self.counters.failed_loads += 1
        else:
            self.counters.withdrawn_loads += 1
        load = pending.load
        log.warning("load not done, vLLM computes these blocks", request=load.request, outcome=outcome.name, blocks=len(load.blocks))
