"""The connector's half in vLLM's scheduler: hooks into messages, answers into hook results."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvoffload.connector.matcher import Matcher, MatchSettings
from kvoffload.connector.metadata import PlannedLoad, StepMetadata
from kvoffload.connector.ports import HubPort, LedgerPort
from kvoffload.connector.prefill_rate import PrefillRate
from kvoffload.connector.record import RequestRecord
from kvoffload.connector.saver import Saver
from kvoffload.keys import Extras, KeyChain
from kvoffload.messages import ConnectorOff, Job, ParentMissing, PrefixHit, ResetCache, StartLoad, ToScheduler
from kvoffload.observe.logs import get_logger

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

log = get_logger("scheduler_side")

SWEEP_S = 1.0
"""How often hits that grew too old are looked for, and statistics taken."""

_COMPUTES, _IDLES = StepMetadata(), StepMetadata(idle=True)
"""What most steps say; nobody writes to them."""


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """``block_size`` in tokens; ``namespace`` is the root of all keys, 24 bytes. ``rate_window``: learn how fast the engine computes
    prompts, with so many steps planned before the first of them has ended; 0: nobody wants to know.
    """

    block_size: int
    namespace: bytes
    match: MatchSettings
    save: bool = True
    rate_window: int = 0


@dataclass(slots=True)
class SchedulerCounters:
    """Since the last time they were taken; tokens and blocks."""

    queried_tokens: int = 0
    hit_tokens: int = 0
    loads: int = 0
    failed_loads: int = 0
    unloaded_tokens: int = 0


class SchedulerSide:
    """All methods are hooks of vLLM's scheduler, on its thread; none waits, save the two short waits of `Matcher`.

    ``identify`` gives what else than tokens identifies a request's blocks: bytes for all of them, a function of
    (first token, end token), or None where it cannot be told (the request then has no keys).
    """

    def __init__(
        self,
        hub: HubPort,
        ledger: LedgerPort,
        settings: SchedulerSettings,
        identify: Callable[[Request], Extras],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hub = hub
        self._take = hub.take
        self._ledger = ledger
        self._settings = settings
        self._identify = identify
        self._jobs = itertools.count(1)
        self.matcher = Matcher(hub, settings.match, self._pump, clock)
        self.saver = Saver(hub, ledger, self._next_job, block_size=settings.block_size)
        self.records: dict[str, RequestRecord] = {}
        self.counters = SchedulerCounters()
        self.off_reason: str | None = None
        self._live: set[str] = set()
        self._planned: list[PlannedLoad] = []
        self._loading: dict[str, PlannedLoad] = {}
        """Loads promised to vLLM and not reported finished, by request; they outlive their record."""
        self._generation = 0
        self._step = 0
        self._rate = PrefillRate(settings.rate_window) if settings.rate_window else None
        self._clock = clock
        self._next_sweep = clock() + SWEEP_S
        self.has_statistics = False
        """It is time to take them: about once a second."""

    def _next_job(self) -> Job:
        return next(self._jobs)

    # ------------------------------------------------------------ requests come and go

    def on_new_request(self, request: Request) -> None:
        extras = self._identify(request)
        may_save, may_load = opt_outs(request)
        may_save = may_save and extras is not None and self._settings.save
        may_load = may_load and extras is not None and not request.skip_reading_prefix_cache
        chain = KeyChain(self._settings.namespace, self._settings.block_size)
        self.records[request.request_id] = RequestRecord(request, chain, extras, may_save=may_save, may_load=may_load)

    def request_finished(self, request: Request) -> None:
        if self._rate is not None:
            self._rate.finished(self._clock())
        self._live.discard(request.request_id)
        record = self.records.pop(request.request_id, None)
        if record is None:
            return
        if request.request_id in self._loading:
            # The load goes on; its credit comes back when it is reported.
            record.has_credit = False
        self.matcher.forget(record)

    # ------------------------------------------------------------ loading

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        record = self.records.get(request.request_id)
        if record is None:
            return 0, False
        record.local_tokens = num_computed_tokens
        self._notice_changes(record)
        if not record.may_load or self.off_reason is not None:
            return 0, False
        tokens = self.matcher.answer(record, num_computed_tokens, engine_is_idle=not self._live)
        return tokens, bool(tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        request_id = request.request_id
        (ids,) = blocks.get_block_ids()
        record = self.records.get(request_id)
        size = self._settings.block_size
        # Before a load has been reported vLLM's own count is the loaded one, afterwards nobody asks us: what lies behind either is new.
        known = record.local_tokens if record is not None and not request.num_computed_tokens else request.num_computed_tokens
        self._ledger.bump(ids[known // size :])
        if record is None:
            self._live.add(request_id)
            if num_external_tokens:
                self.plan_withdrawn(request_id, ids, num_external_tokens)
            return
        self._notice_changes(record)
        self._live.add(request_id)
        hit = self.matcher.take_hit(record)
        if not num_external_tokens:
            if hit is not None:
                self._hub.owe(StartLoad(self._next_job(), request_id, hit.sequence, 0, 0))
                self.matcher.return_credit(record)
            self._count_query(request, record.local_tokens, 0)
            return
        self._count_query(request, record.local_tokens, num_external_tokens)
        if hit is None or not record.has_credit:
            log.error("vLLM took tokens that were not promised", request=request_id, tokens=num_external_tokens)
            if hit is not None:
                self._hub.owe(StartLoad(self._next_job(), request_id, hit.sequence, 0, 0))
            self.plan_withdrawn(request_id, ids, num_external_tokens)
            return
        first = known // size
        count = -(-num_external_tokens // size)
        job = self._next_job()
        self._hub.owe(StartLoad(job, request_id, hit.sequence, first, count))
        load = PlannedLoad(job, request_id, hit.slots[first : first + count], tuple(ids[first : first + count]))
        record.set_saved(first + count)
        self._planned.append(load)
        self._loading[request_id] = load
        self.counters.loads += 1

    def plan_withdrawn(self, request_id: str, blocks: list[int], num_external_tokens: int) -> None:
        """Never to happen: vLLM waits for a load that nobody can do, into the last of ``blocks``. It is reported failed, and computed."""
        if any(load.request == request_id for load in self._planned):
            return
        count = -(-num_external_tokens // self._settings.block_size)
        load = PlannedLoad(self._next_job(), request_id, (), tuple(blocks[-count:]), withdrawn=True)
        self._planned.append(load)
        self._loading[request_id] = load

    def _count_query(self, request: Request, local: int, external: int) -> None:
        if request.num_computed_tokens:
            return
        self.counters.queried_tokens += request.num_tokens - local
        self.counters.hit_tokens += external

    def update_connector_output(self, output: KVConnectorOutput) -> None:
        if not output.finished_recving:
            return
        invalid = output.invalid_block_ids
        for request_id in output.finished_recving:
            load = self._loading.pop(request_id, None)
            if load is None:
                continue
            record = self.records.get(request_id)
            failed = bool(invalid) and not invalid.isdisjoint(load.blocks)
            if failed:
                self.counters.failed_loads += 1
                self.counters.unloaded_tokens += len(load.blocks) * self._settings.block_size
            if record is None:
                if load.slots:
                    self.matcher.return_credit()
                continue
            if load.slots:
                self.matcher.return_credit(record)
            if failed:
                record.load_failed = True
                record.set_saved(0)

    # ------------------------------------------------------------ each step

    def build_connector_meta(self, output: SchedulerOutput) -> StepMetadata:
        self._step += 1
        # In every step, between two of vLLM's forwards, with cold caches: so as few calls as can be.
        self.matcher.has_waited_in_vain = False
        messages = self._take()
        if messages:
            self._handle(messages)
        now = self._clock()
        if now >= self._next_sweep:
            self._sweep()
        if self._rate is not None:
            self._rate.planned(output.total_num_scheduled_tokens, now)
            self.matcher.tokens_per_s = self._rate.tokens_per_s
        if output.preempted_req_ids:
            for request_id in output.preempted_req_ids:
                record = self.records.get(request_id)
                if record is not None:
                    self._notice_changes(record)
        new = output.scheduled_cached_reqs.new_block_ids
        if new.count(None) != len(new) or output.kv_cache_block_copies:
            self._bump(output)
        saves = self.saver.plan(output, self.records) if self.off_reason is None else ()
        if not saves and not self._planned:
            return _COMPUTES if output.total_num_scheduled_tokens else _IDLES
        return StepMetadata(saves, self.take_planned(), not output.total_num_scheduled_tokens)

    def _sweep(self) -> None:
        """Give back the hits that nobody asked for in time: requests deep in vLLM's queue are not asked about, and must not hold slots."""
        now = self._clock()
        self._next_sweep = now + SWEEP_S
        self.has_statistics = True
        for record in self.records.values():
            self.matcher.expire(record, now)

    def _notice_changes(self, record: RequestRecord) -> None:
        """A preemption, once: after a reset vLLM admits a request again before it says that it was preempted. A session's next input."""
        if record.refresh():
            self._live.discard(record.request_id)
            self.matcher.restart(record)
            extras, before = self._identify(record.request), record.extras
            record.extras = extras
            if extras != before:
                record.chain.recut(0)  # they rest on what was proven then: an adapter's files may be others by now
            if extras is None:
                record.may_save = record.may_load = False

    def take_planned(self) -> tuple[PlannedLoad, ...]:
        """The loads that were promised since the last step."""
        if not self._planned:
            return ()
        loads, self._planned = tuple(self._planned), []
        return loads

    def _bump(self, output: SchedulerOutput) -> None:
        """Every block handed out for this step has a new owner. (Blocks of admitted requests: `update_state_after_alloc`.)"""
        cached = output.scheduled_cached_reqs
        resumed = cached.resumed_req_ids
        for request_id, new in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if new is not None and request_id not in resumed:
                self._ledger.bump(new[0])
        if output.kv_cache_block_copies:
            self._ledger.bump([copy.dst_block_id for copy in output.kv_cache_block_copies])

    def _pump(self) -> None:
        self._handle(self._take())

    def _handle(self, messages: Sequence[ToScheduler]) -> None:
        for message in messages:
            match message:
                case PrefixHit():
                    self.matcher.on_hit(message, self.records.get(message.request))
                case ParentMissing():
                    for request_id in message.requests:
                        record = self.records.get(request_id)
                        if record is not None:
                            self.saver.offer_again(record, self._step)
                case ConnectorOff():
                    self.turn_off(message.reason, quiet=True)

    # ------------------------------------------------------------ ends

    def reset_cache(self) -> None:
        """Empty L1 and forget every answer; loads promised but not sent are sent as withdrawn."""
        self._generation += 1
        self.matcher.generation = self._generation
        self._hub.owe(ResetCache(self._generation))
        for request_id, record in self.records.items():
            self.matcher.reset(record)
            if request_id in self._live or request_id in self._loading:
                # Its blocks may mix what was computed before and after.
                record.may_save = False
        self._planned = [PlannedLoad(load.job, load.request, load.slots, load.blocks, withdrawn=True) for load in self._planned]

    def turn_off(self, reason: str, *, quiet: bool = False) -> None:
        """No new promise and no new save from here on. The ledger and the promised loads go on."""
        if self.off_reason is None:
            self.off_reason = reason
            (log.info if quiet else log.error)("connector off: vLLM goes on without kvoffload", reason=reason)

    @property
    def has_pending_loads(self) -> bool:
        return bool(self._loading)


def opt_outs(request: Request) -> tuple[bool, bool]:
    """(may save, may load) by ``kv_transfer_params={"kvoffload": {"save": false, "load": false}}``; what else stands there is ignored."""
    params = request.kv_transfer_params
    wishes = params.get("kvoffload") if isinstance(params, dict) else None
    if wishes is None:
        return True, True
    if not isinstance(wishes, dict) or not all(key in ("save", "load") and isinstance(value, bool) for key, value in wishes.items()):
        log.warning(
            "kv_transfer_params['kvoffload'] ignored: give {'save': bool, 'load': bool}",
            request=request.request_id,
            given=repr(wishes)[:200],
        )
        return True, True
    return wishes.get("save", True), wishes.get("load", True)
