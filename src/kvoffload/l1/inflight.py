"""Jobs that some rank has not reported yet: saves, which hold the slots they fill, and loads, which hold a pin."""

from __future__ import annotations

from dataclasses import dataclass

from kvoffload.errors import InternalError
from kvoffload.l1.slots import NONE
from kvoffload.messages import Job


@dataclass(slots=True)
class SaveJob:
    """A grant of ``slots``, in plan order: within a run, parents before children."""

    slots: tuple[int, ...]
    unreported: int
    """The ranks still to report, a bit each."""


@dataclass(slots=True)
class LoadJob:
    """A load of ``count`` slots down to ``deepest``, which it pins; NONE for a load of a hit that was gone already."""

    deepest: int
    count: int
    unreported: int
    failed: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether it holds nothing, so that nobody needs to wait for it."""
        return self.deepest == NONE


class Inflight:
    """The jobs by number. A report of an unknown job, or a second one of a rank, is a bug and raises InternalError."""

    def __init__(self, ranks: int) -> None:
        self._all = (1 << ranks) - 1
        self.ranks = ranks
        self.saves: dict[Job, SaveJob] = {}
        self.loads: dict[Job, LoadJob] = {}

    def begin_save(self, job: Job, slots: tuple[int, ...]) -> None:
        """These slots were granted, on every rank."""
        self.saves[job] = SaveJob(slots, self._all)

    def begin_load(self, job: Job, deepest: int, count: int) -> None:
        """This load was announced, on every rank; the pin on ``deepest`` is its own."""
        if job in self.loads:
            raise InternalError(f"load {job} was announced twice")
        self.loads[job] = LoadJob(deepest, count, self._all)

    def save_reported(self, job: Job, rank: int) -> SaveJob:
        """One more rank has reported this save; the last one ends it."""
        save = self.saves.get(job)
        if save is None or not self._is_awaited(save.unreported, rank):
            raise InternalError(f"rank {rank} reported save {job}, which is {'unknown' if save is None else 'not awaited from it'}")
        save.unreported &= ~(1 << rank)
        if not save.unreported:
            del self.saves[job]
        return save

    def load_reported(self, job: Job, rank: int) -> LoadJob:
        """One more rank has reported this load; the last one ends it."""
        load = self.loads.get(job)
        if load is None or not self._is_awaited(load.unreported, rank):
            raise InternalError(f"rank {rank} reported load {job}, which is {'unknown' if load is None else 'not awaited from it'}")
        load.unreported &= ~(1 << rank)
        if not load.unreported:
            del self.loads[job]
        return load

    def open_jobs(self) -> frozenset[Job]:
        """All jobs that hold something."""
        return frozenset(self.saves) | {job for job, load in self.loads.items() if not load.is_empty}

    def awaited_from(self, rank: int) -> tuple[list[Job], list[Job]]:
        """The saves and the loads that this rank has not reported."""
        bit = 1 << rank
        return (
            [job for job, save in self.saves.items() if save.unreported & bit],
            [job for job, load in self.loads.items() if load.unreported & bit],
        )

    def _is_awaited(self, unreported: int, rank: int) -> bool:
        return 0 <= rank < self.ranks and bool(unreported >> rank & 1)
