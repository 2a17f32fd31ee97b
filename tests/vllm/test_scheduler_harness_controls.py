"""Negative controls: with one thing broken, the harness must fail, and for the right reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("vllm")

from kvoffload.connector.record import RequestRecord
from kvoffload.connector.scheduler_side import SchedulerSide
from kvoffload.connector.worker_side import WorkerSide
from kvoffload.messages import DropReason, LoadFinished, ReleaseHit
from kvoffload.testing.harness import OracleError, draw_settings, run
from kvoffload.testing.sim.engine import make_request
from kvoffload.testing.sim.settings import BLOCK_SIZE, SimSettings
from kvoffload.testing.sim.simulation import Simulation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

pytestmark = pytest.mark.vllm


def must_fail(match: str, *, seeds: int = 60, changes: dict[str, object] | None = None, **broken: Any) -> None:
    def live_on() -> None:
        for seed in range(seeds):
            run(draw_settings(seed).with_(**{"faults": False, "hook_fail_share": 0.0, **(changes or {})}), **broken)

    with pytest.raises(OracleError, match=match):
        live_on()


SLOW: dict[str, object] = {
    "actions": 400,
    "blocks": 22,
    "slots": 80,
    "save_ticks": 2.0,
    "load_ticks": 80.0,
    "hub_ticks": 20.0,
    "fail_share": 0.0,
    "refuse_share": 0.0,
}
"""Copies so slow that blocks are reused meanwhile, in an engine's cache so small that they are."""


# ---------------------------------------------------------------- copies


def test_a_save_committed_without_the_ledger_check() -> None:
    def spoil(simulation: Simulation) -> None:
        simulation.copies.sabotage.ignore_ledger = True

    must_fail("reads wrong KV", changes=SLOW, prepare=spoil)


def test_a_load_claimed_and_not_done() -> None:
    def spoil(simulation: Simulation) -> None:
        simulation.copies.sabotage.claim_loads = True

    must_fail("reads wrong KV", prepare=spoil)


def test_blocks_swapped() -> None:
    def spoil(simulation: Simulation) -> None:
        simulation.copies.sabotage.swap_blocks = True

    must_fail("reads wrong KV", prepare=spoil)


def test_a_token_altered() -> None:
    def spoil(simulation: Simulation) -> None:
        memory, progress = simulation.memory, simulation.worker._progress

        def altering() -> None:
            progress()
            memory.slots[0][3] += 1

        simulation.worker._progress = altering

    must_fail("reads wrong KV", prepare=spoil)


# ---------------------------------------------------------------- the ledger


class _Silent:
    """A ledger that hears no bumps."""

    def __init__(self, ledger: Any) -> None:
        self._ledger = ledger

    def bump(self, ids: Sequence[int]) -> None:
        pass

    def epochs(self, ids: Sequence[int]) -> tuple[int, ...]:
        epochs: tuple[int, ...] = self._ledger.epochs(ids)
        return epochs


class _DeafSide(SchedulerSide):
    @contextmanager
    def deaf(self) -> Iterator[None]:
        ledger = self._ledger
        self._ledger = _Silent(ledger)
        try:
            yield
        finally:
            self._ledger = ledger


class _NoBumpsForAdmitted(_DeafSide):
    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        with self.deaf():
            super().update_state_after_alloc(request, blocks, num_external_tokens)


class _NoBumpsForLoads(_DeafSide):
    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        if not num_external_tokens:
            super().update_state_after_alloc(request, blocks, num_external_tokens)
            return
        with self.deaf():
            super().update_state_after_alloc(request, blocks, num_external_tokens)


class _NoBumpsForRunning(_DeafSide):
    def _bump(self, output: SchedulerOutput) -> None:
        pass


@pytest.mark.parametrize("side", [_NoBumpsForAdmitted, _NoBumpsForLoads, _NoBumpsForRunning])
def test_a_path_without_bumps_is_seen_at_once(side: type[SchedulerSide]) -> None:
    must_fail("without a new epoch", scheduler_side=side)


def reuse_blocks_under_a_held_save(
    side: type[SchedulerSide] = SchedulerSide, max_batched_tokens: int = 64, *, ignore_ledger: bool = False
) -> Simulation:
    """Blocks whose save has not begun are freed, given to another request, and written; then the save is let go."""
    settings = SimSettings(
        seed=1, faults=False, blocks=22, slots=100, max_batched_tokens=max_batched_tokens, hub_ticks=30.0, load_ticks=30.0, save_ticks=30.0
    )
    simulation = Simulation(settings, side)
    simulation.oracle.check_bumps = False
    simulation.copies.hold_saves = True
    simulation.copies.sabotage.ignore_ledger = ignore_ledger
    tokens = list(range(100, 100 + 8 * BLOCK_SIZE))
    simulation.add(make_request("first", tokens, 30))
    while not simulation.scheduler.requests["first"].num_output_tokens:
        simulation.step()
    simulation.abort("first")
    # 12 blocks are free beside the 9 of the first request, and go first.
    for name, blocks in (("beside", 12), ("upon", 9)):
        prompt = list(range(300, 300 + blocks * BLOCK_SIZE))
        simulation.add(make_request(name, prompt, 1, salt=name, kvoffload={"save": False}))
        while name in simulation.scheduler.requests:
            simulation.step()
    simulation.copies.hold_saves = False
    for _ in range(30):
        simulation.progress()
    assert simulation.reset(running=False, connector=False)
    simulation.add(make_request("again", tokens, 1))
    simulation.finish()
    return simulation


@pytest.mark.parametrize(("side", "max_batched_tokens"), [(_NoBumpsForAdmitted, 400), (_NoBumpsForRunning, BLOCK_SIZE)])
def test_a_path_without_bumps_ends_in_wrong_kv(side: type[SchedulerSide], max_batched_tokens: int) -> None:
    with pytest.raises(OracleError, match="reads wrong KV"):
        reuse_blocks_under_a_held_save(side, max_batched_tokens)


def test_a_held_save_committed_without_the_ledger_check() -> None:
    with pytest.raises(OracleError, match="reads wrong KV"):
        reuse_blocks_under_a_held_save(ignore_ledger=True)


@pytest.mark.parametrize("max_batched_tokens", [400, BLOCK_SIZE])
def test_with_all_bumps_such_a_save_is_dropped(max_batched_tokens: int) -> None:
    simulation = reuse_blocks_under_a_held_save(SchedulerSide, max_batched_tokens)
    assert simulation.core.statistics().drops[DropReason.OVERWRITTEN] > 0
    assert not simulation.oracle.answers_in_tokens


# ---------------------------------------------------------------- reports


class _ReportsTwice(WorkerSide):
    last: set[str] | None = None

    @property
    def has_news(self) -> bool:
        return True

    def get_finished(self, *, idle: bool) -> set[str] | None:
        finished = super().get_finished(idle=idle)
        self.last, last = finished, self.last
        return (finished or set()) | last if last else finished


class _ReportsNothing(WorkerSide):
    def get_finished(self, *, idle: bool) -> set[str] | None:
        super().get_finished(idle=idle)
        return None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return set()


class _HidesFailures(WorkerSide):
    def get_block_ids_with_load_errors(self) -> set[int]:
        super().get_block_ids_with_load_errors()
        return set()


class _NeverWithdraws(WorkerSide):
    def _withdraw_late(self) -> None:
        pass


@pytest.mark.parametrize(
    ("side", "match", "changes"),
    [
        (_ReportsTwice, "does not wait for", {}),
        (_ReportsNothing, "requests never end", {}),
        (_HidesFailures, "reads wrong KV", {"fail_share": 0.5}),
        (_NeverWithdraws, "did not start in time", {"faults": True, "start_deadline_s": 0.05}),
    ],
)
def test_wrong_reports(side: type[WorkerSide], match: str, changes: dict[str, object]) -> None:
    must_fail(match, changes=changes, worker_side=side)


# ---------------------------------------------------------------- what is remembered, held and given back


class _DeafToResets(SchedulerSide):
    def reset_cache(self) -> None:
        pass


class _RemembersAnswers(SchedulerSide):
    """Answers given before a reset are used after it."""

    def reset_cache(self) -> None:
        kept = {name: (record.phase, record.hit, record.has_credit) for name, record in self.records.items()}
        credits = self.matcher.credits
        super().reset_cache()
        self.matcher.credits = credits
        for name, record in self.records.items():
            record.phase, record.hit, record.has_credit = kept[name]


class _SavesAcrossResets(SchedulerSide):
    def reset_cache(self) -> None:
        kept = {name: record.may_save for name, record in self.records.items()}
        super().reset_cache()
        for name, record in self.records.items():
            record.may_save = kept[name]


class _KeepsCredits(SchedulerSide):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.matcher.return_credit = _keep  # type: ignore[method-assign]


def _keep(record: RequestRecord | None = None) -> None:
    if record is not None:
        record.has_credit = False


class _WaitsForEver(SchedulerSide):
    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        tokens, is_async = super().get_num_new_matched_tokens(request, num_computed_tokens)
        return (None, False) if tokens == 0 else (tokens, is_async)


class _TakesTheWholePrompt(SchedulerSide):
    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        tokens, is_async = super().get_num_new_matched_tokens(request, num_computed_tokens)
        return (tokens + self._settings.block_size, is_async) if tokens else (tokens, is_async)


@pytest.mark.parametrize(
    ("side", "match"),
    [
        (_DeafToResets, "reads wrong KV"),
        (_RemembersAnswers, "reads wrong KV|leases"),
        (_SavesAcrossResets, "held KV at a reset"),
        (_KeepsCredits, "load credits"),
        (_WaitsForEver, "was told to wait"),
        (_TakesTheWholePrompt, "was promised|carries"),
    ],
)
def test_wrong_memory(side: type[SchedulerSide], match: str) -> None:
    def look_away(simulation: Simulation) -> None:
        simulation.oracle.check_resets = side is not _DeafToResets

    must_fail(match, seeds=150, scheduler_side=side, prepare=look_away)


@pytest.mark.parametrize(("lost", "match"), [(LoadFinished, "open loads"), (ReleaseHit, "leases")])
def test_lost_messages(lost: type, match: str) -> None:
    def spoil(simulation: Simulation) -> None:
        handle = simulation.core.handle
        simulation.core.handle = lambda message, now: [] if isinstance(message, lost) else handle(message, now)  # type: ignore[method-assign]

    must_fail(match, seeds=150, prepare=spoil)
