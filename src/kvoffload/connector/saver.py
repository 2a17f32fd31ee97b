"""What of each step is offered to L1: blocks that are full, confirmed, and not offered yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvoffload.connector.ports import HubPort, LedgerPort
from kvoffload.connector.record import RequestRecord
from kvoffload.messages import ROOT, DropReason, Job, ReserveSlots, SaveRun

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

MAX_BLOCKS_PER_JOB = 500
"""Where reservations are cut, so that none stalls the hub's loop."""

REOFFER_STEPS = 64
"""A request's whole prefix is offered again at most once in so many steps."""


class Saver:
    """The saving half of SchedulerSide's decisions. All calls are on vLLM's scheduler thread."""

    def __init__(self, hub: HubPort, ledger: LedgerPort, next_job: Callable[[], Job], *, block_size: int) -> None:
        self._hub = hub
        self._ledger = ledger
        self._next_job = next_job
        self._block_size = block_size
        self.offered_blocks = 0
        self.drops: dict[DropReason, int] = {}

    def plan(self, output: SchedulerOutput, records: dict[str, RequestRecord]) -> tuple[Job, ...]:
        """Post reservations for the blocks that this step makes full; their jobs, for the workers.

        A block is full and confirmed when the tokens computed after this step, and known now, cover it. Drafts and
        placeholders of asynchronous scheduling are not among the known tokens.
        """
        runs: list[SaveRun] | None = None
        for request_id, scheduled in output.num_scheduled_tokens.items():
            record = records.get(request_id)
            if record is None:
                continue
            covered = record.request.num_computed_tokens + scheduled
            if covered < record.next_full or not record.may_save:
                continue
            covered = min(covered, record.request.num_tokens)
            if covered < record.next_full or not self._hub.is_live:
                continue
            run = self._run(output, record, covered // self._block_size)
            if run is not None:
                runs = runs or []
                runs.append(run)
        return self._post(runs) if runs else ()

    def _run(self, output: SchedulerOutput, record: RequestRecord, full: int) -> SaveRun | None:
        block_state = output.kv_connector_block_state
        tables = block_state.get_block_ids(record.request_id) if block_state is not None else None
        if tables is None:
            return None
        start = record.saved_blocks
        blocks = tuple(tables[0][start:full])
        if 0 in blocks:
            # The null block holds nobody's tokens: what lies behind it has no prefix here.
            blocks = blocks[: blocks.index(0)]
        record.extend_keys(full * self._block_size)
        keys = tuple(record.chain.keys[start : start + len(blocks)])
        record.set_saved(full)
        if not keys:
            return None
        blocks = blocks[: len(keys)]
        parent = record.chain.keys[start - 1] if start else ROOT
        return SaveRun(record.request_id, parent, keys, blocks, self._ledger.epochs(blocks))

    def _post(self, runs: Sequence[SaveRun]) -> tuple[Job, ...]:
        jobs = []
        for batch in cut(runs, MAX_BLOCKS_PER_JOB):
            job = self._next_job()
            blocks = sum(len(run.keys) for run in batch)
            if self._hub.offer(ReserveSlots(job, batch)):
                jobs.append(job)
                self.offered_blocks += blocks
            else:
                self.drops[DropReason.POST_REFUSED] = self.drops.get(DropReason.POST_REFUSED, 0) + blocks
        return tuple(jobs)

    def offer_again(self, record: RequestRecord, step: int) -> None:
        """L1 lacks what comes before blocks of this request: offer all of them in the next step that schedules it."""
        if record.reoffered_at is None or step - record.reoffered_at >= REOFFER_STEPS:
            record.reoffered_at = step
            record.set_saved(0)


def cut(runs: Sequence[SaveRun], limit: int) -> list[tuple[SaveRun, ...]]:
    """Cut ``runs`` into batches of at most ``limit`` blocks each, in order."""
    batches: list[tuple[SaveRun, ...]] = []
    batch: list[SaveRun] = []
    room = limit
    for run in runs:
        start, length = 0, len(run.keys)
        while start < length:
            if not room:
                batches.append(tuple(batch))
                batch, room = [], limit
            stop = min(length, start + room)
            whole = start == 0 and stop == length
            batch.append(run if whole else slice_run(run, start, stop))
            room -= stop - start
            start = stop
    if batch:
        batches.append(tuple(batch))
    return batches


def slice_run(run: SaveRun, start: int, stop: int) -> SaveRun:
    """Blocks ``start`` to ``stop - 1`` of a run, as a run."""
    parent = run.keys[start - 1] if start else run.parent
    return SaveRun(run.request, parent, run.keys[start:stop], run.blocks[start:stop], run.epochs[start:stop])
