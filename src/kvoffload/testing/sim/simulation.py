"""vLLM's scheduler, both halves of the connector, L1 and the copies, in one thread, in virtual time, in an order drawn from a seed."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvoffload.connector.ports import CopyPort, HubPort, LedgerPort
from kvoffload.connector.scheduler_side import SchedulerSettings, SchedulerSide
from kvoffload.connector.worker_side import WorkerSettings, WorkerSide
from kvoffload.keys import KEY_BYTES, Extras
from kvoffload.l1.core import L1Core
from kvoffload.l1.parts import L1Config
from kvoffload.l1.states import State
from kvoffload.messages import ReleaseHit, ReserveSlots, SegmentGrown, ToL1Manager
from kvoffload.testing.sim.connector import SimConnector, SimSchedulerHalf, SimWorkerHalf
from kvoffload.testing.sim.copies import SimCopies
from kvoffload.testing.sim.engine import make_scheduler
from kvoffload.testing.sim.hub import SimHub
from kvoffload.testing.sim.memory import SimClock, SimLedger, SimMemory
from kvoffload.testing.sim.oracle import SLACK_S, HookOracle
from kvoffload.testing.sim.settings import BLOCK_SIZE, SimSettings
from kvoffload.testing.sim.trace import InjectedError, OracleError, Trace
from kvoffload.testing.sim.worker import SimWorker

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

MakeSchedulerSide = Callable[[HubPort, LedgerPort, SchedulerSettings, Callable[["Request"], Extras], Callable[[], float]], SchedulerSide]
MakeWorkerSide = Callable[[CopyPort, WorkerSettings, Callable[[], float]], WorkerSide]

NAMESPACE = b"simulation".ljust(KEY_BYTES, b".")


class _WatchedHub(SimHub):
    """Shows the oracle what is posted."""

    oracle: HookOracle | None = None

    def offer(self, message: ToL1Manager) -> bool:
        if self.oracle is not None and isinstance(message, ReserveSlots):
            self.oracle.posted(message)
        return super().offer(message)

    def owe(self, message: ToL1Manager) -> None:
        if self.oracle is not None and isinstance(message, ReleaseHit):
            self.oracle.released(message)
        super().owe(message)


class Simulation:
    """One engine. Callers add, abort and step, then `finish`; whatever must not happen raises `OracleError`.

    The halves are made by ``scheduler_side`` and ``worker_side``, and the engine blocks' epochs kept by ``ledger``: a negative control
    gives broken ones.
    """

    def __init__(
        self,
        settings: SimSettings,
        scheduler_side: MakeSchedulerSide = SchedulerSide,
        worker_side: MakeWorkerSide = WorkerSide,
    ) -> None:
        self.settings = settings
        self.rng = random.Random(f"run {settings.seed}")
        self.clock = SimClock()
        self.trace = Trace()
        self.steps = 0
        self._idle_steps = 0
        self.salts: dict[str, str | None] = {}
        self.memory = SimMemory(settings.blocks, settings.slots)
        self.ledger = SimLedger(settings.blocks)
        policy = "lru" if settings.policy == "lru" else "s3fifo"
        self.core = L1Core(L1Config(policy=policy, hit_lifetime_s=settings.hit_lifetime_s), settings.slots)  # type: ignore[arg-type]
        self.hub = _WatchedHub(self.core, settings, self.clock, self.rng, self.trace, self.progress, self._perhaps_fail)
        self.copies = SimCopies(
            self.hub, self.memory, self.ledger, settings, self.clock, self.rng, self.trace, self.progress, self._owns, self._perhaps_fail
        )
        self.hub.copies = self.copies
        self.scheduler = make_scheduler(settings)
        self.side = scheduler_side(
            self.hub,
            self.ledger,
            SchedulerSettings(block_size=BLOCK_SIZE, namespace=NAMESPACE, match=settings.match()),
            identify,
            self.clock,
        )
        self.oracle = HookOracle(
            self.scheduler,
            self.side,
            self.ledger,
            settings,
            self.clock,
            self.trace,
            self.copies.announced,
            lambda: self.hub.waited_s,
        )
        self.hub.oracle = self.oracle
        self.connectors = [self.scheduler.connector, self._worker_connector(worker_side(self.copies, settings.worker(), self.clock))]
        self.scheduler.connector.scheduler_half = SimSchedulerHalf(self.side, lambda: self.ledger.bump(range(settings.blocks)))
        self.scheduler.connector.watcher = self.oracle
        self.worker = SimWorker(self.connectors[1], self.memory, self.rng, self.trace, self.progress, self.salts.get)
        self.ended: list[list[int]] = []
        """The tokens of the last requests that ran to their end."""
        self._in_flight: deque[SchedulerOutput] = deque()
        # L1 grows as its segment is populated.
        first = settings.slots if self.rng.random() < 0.7 else max(1, settings.slots // 3)
        self.hub.report(SegmentGrown(0, first))
        self.hub.report(SegmentGrown(0, settings.slots))

    def _worker_connector(self, side: WorkerSide) -> SimConnector:
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

        self.worker_side = side
        connector = SimConnector(self.scheduler.vllm_config, KVConnectorRole.WORKER, self.scheduler.kv_cache_config)
        connector.worker_half = SimWorkerHalf(side, lambda reason: self.crash_copies())  # type: ignore[assignment]
        return connector

    # ------------------------------------------------------------ what a caller does

    def add(self, request: Request) -> None:
        """A new request, or a session's next input."""
        self.trace.note(
            f"{request.request_id} comes: {request.num_tokens} tokens, up to {request.max_tokens} more", f"request {request.request_id}"
        )
        self.salts[request.request_id] = request.cache_salt
        self.scheduler.add_request(request)

    def abort(self, request_id: str) -> None:
        from vllm.v1.request import RequestStatus

        self.trace.note(f"{request_id} is aborted", f"request {request_id}")
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def step(self) -> None:
        """One step of the engine core: with asynchronous scheduling, two are in flight."""
        self.steps += 1
        self.trace.step += 1
        depth = 2 if self.settings.async_scheduling else 1
        if len(self._in_flight) < depth:
            self._schedule()
            if len(self._in_flight) < depth and self._in_flight[-1].total_num_scheduled_tokens:
                return
        self._execute()

    def drain_pipeline(self) -> None:
        """Execute what was scheduled."""
        while self._in_flight:
            self._execute()

    def reset(self, *, running: bool, connector: bool) -> bool:
        """`reset_prefix_cache`; whether it succeeded. With it the weights change, as far as they then may."""
        self.trace.note(f"reset_prefix_cache: running {running}, connector {connector}")
        try:
            done: bool = self.scheduler.reset_prefix_cache(running, connector)
        except RuntimeError:
            # vLLM's own answer where a load is pending: everybody is preempted, and our caches are not asked.
            self.trace.note("vLLM could not reset")
            return False
        if done and connector and not self._in_flight:
            self.worker.version += 1
        return done

    def crash_copies(self) -> None:
        self.hub.live = False
        if not self.copies.crashed:
            self.copies.crash()

    def kill_hub(self) -> None:
        self.hub.die("the simulation killed it")
        self.crash_copies()

    def progress(self) -> None:
        """Some small events of the hub and of the copies; all there are, where the settings say so."""
        hub, copies = self.hub, self.copies
        if self.settings.prompt:
            while any([hub.tick(), copies.tick_load(), copies.tick_save()]):
                pass
            return
        ticks = [hub.tick] * self._draw(self.settings.hub_ticks)
        ticks += [copies.tick_load] * self._draw(self.settings.load_ticks)
        ticks += [copies.tick_save] * self._draw(self.settings.save_ticks)
        self.rng.shuffle(ticks)
        for tick in ticks:
            tick()

    # ------------------------------------------------------------ the end

    def finish(self, most_steps: int = 3000) -> None:
        """Let everything come to its end, and check that nothing is left."""
        self.settings = self.settings.with_(hook_fail_share=0.0)
        self.copies.hold_at = None
        self.copies.hold_loads = self.copies.hold_saves = self.hub.frozen = False
        self.hub.live = not self.copies.crashed
        for _ in range(most_steps):
            if not self.scheduler.has_requests():
                self.drain_pipeline()
                if not self.scheduler.has_requests():
                    break
            self.step()
            if self.steps % 50 == 0:
                self.clock.advance(1.0)
            self._end_stuck_session()
        else:
            left = {name: request.status.name for name, request in self.scheduler.requests.items()}
            raise OracleError(f"requests never end: {left}", [f"request {name}" for name in left])
        self._settle()
        self._check_failures()
        self._check_engine()
        self._check_facade()
        if not self.hub.dead:
            self._check_l1()

    def _end_stuck_session(self) -> None:
        """vLLM's own deadlock, with or without a connector: sessions between two inputs hold all blocks, and are not preempted."""
        if self._idle_steps < 200 or self.scheduler.running or self.oracle.loading:
            return
        stuck = [request.request_id for request in self.scheduler.kv_holding_waiting if request.resumable]
        if stuck:
            self._idle_steps = 0
            self.abort(stuck[0])

    def _settle(self) -> None:
        self.clock.advance(self.settings.pair_timeout_s + 1)
        while True:
            self.copies.expire()
            if not any([self.hub.tick(), self.copies.tick_load(), self.copies.tick_save()]) and self.copies.is_idle:
                return

    def _check_engine(self) -> None:
        scheduler = self.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        leaked = [block.block_id for block in pool.blocks if block.ref_cnt and not block.is_null]
        if leaked or pool.get_num_free_blocks() != self.settings.blocks - 1:
            raise OracleError(f"engine blocks {leaked} are still held", [f"block {block}" for block in leaked])
        left = [*scheduler.requests, *scheduler.running, *scheduler.waiting, *scheduler.kv_holding_waiting]
        left += [*scheduler.finished_recving_kv_req_ids, *scheduler.failed_recving_kv_req_ids, *scheduler._inflight_prefills]
        if left:
            raise OracleError(f"the scheduler still knows {left}")

    def _check_facade(self) -> None:
        side, worker = self.side, self.worker_side
        if self.has_failed_hooks:  # then only what vLLM was promised must have been kept
            if self.oracle.loading or worker.has_news:
                raise OracleError(f"loads of {sorted(self.oracle.loading)} were not reported")
            return
        side.matcher._pump()
        found = [f"{name} has a record" for name in side.records]
        found += [f"a load of {name} was not reported" for name in self.oracle.loading]
        if side.matcher.credits != self.settings.max_loads:
            found.append(f"{self.settings.max_loads - side.matcher.credits} load credits are missing")
        if side.has_pending_loads or side._live:
            found.append(f"SchedulerSide thinks that {sorted(side._live)} live, and that loads are pending: {side.has_pending_loads}")
        if worker.has_news:
            found.append("WorkerSide waits for loads")
        if found:
            raise OracleError("; ".join(found), [f"request {name}" for name in (*side.records, *self.oracle.loading)])

    def _check_l1(self) -> None:
        self.core.check()
        if self.has_failed_hooks:
            return
        statistics = self.core.statistics()
        found = self.copies.leaks()
        found += [
            f"L1 has {count} {what}"
            for what, count in (("leases", statistics.leases), ("open saves", statistics.saves), ("open loads", statistics.loads))
            if count
        ]
        busy = {state.name: count for state, count in statistics.slots.items() if count and state not in (State.FREE, State.READY)}
        if busy or statistics.protected:
            # (A READY parent counts as protected by nobody: only pins count.)
            found.append(f"L1's slots: {busy}, {statistics.protected} protected")
        if found:
            raise OracleError("; ".join(found))

    # ------------------------------------------------------------ steps

    def _schedule(self) -> None:
        self._in_flight.append(self.scheduler.schedule())
        self._check_step()
        self.progress()

    def _execute(self) -> None:
        output = self._in_flight.popleft()
        self._idle_steps = 0 if output.total_num_scheduled_tokens else self._idle_steps + 1
        waited = self.copies.waited_s
        result = self.worker.execute(output)
        late = self.copies.late_loads(self.settings.start_deadline_s)
        waited = self.copies.waited_s - waited
        if late:
            raise OracleError(f"load {late[0].message.job} did not start in time and is still waited for", [f"job {late[0].message.job}"])
        if waited > self.settings.worker().wait_idle_s + SLACK_S:
            raise OracleError(f"get_finished waited {waited * 1e3:.2f} ms")
        self.progress()
        tokens = {name: self.scheduler.requests[name] for name in output.num_scheduled_tokens if name in self.scheduler.requests}
        self.scheduler.update_from_output(output, result)
        for name, request in tokens.items():
            if name not in self.scheduler.requests:
                self.ended.append(list(request.all_token_ids))
        del self.ended[:-6]
        self.progress()
        self.copies.expire()
        self.clock.advance(self.rng.choice([0.0002, 0.002, 0.01, 0.02]))

    @property
    def has_failed_hooks(self) -> bool:
        """A hook raised, and the connector is off."""
        return any(connector.failures for connector in self.connectors)

    def _check_failures(self) -> None:
        for connector in self.connectors:
            for failure in connector.failures:
                if not isinstance(failure, InjectedError):
                    raise failure

    def _check_step(self) -> None:
        """Right after the plan: who is live, who has a credit, who holds a lease."""
        self._check_failures()
        if self.has_failed_hooks:
            return
        side, matcher = self.side, self.side.matcher
        manager = self.scheduler.kv_cache_manager
        holding = {name for name in side.records if any(manager.get_block_ids(name)[0])}
        # A load that failed at its first block has given up its blocks, and is admitted again next.
        idle = {name for name in side._live - holding if not side.records[name].load_failed}
        if holding - side._live or idle:
            raise OracleError(f"{sorted(holding)} hold blocks, SchedulerSide thinks that {sorted(side._live)} are live")
        ended = [name for name in self.oracle.loading if name not in side.records]
        credits = matcher.credits + sum(record.has_credit for record in side.records.values()) + len(ended)
        if credits != self.settings.max_loads:
            raise OracleError(f"there are {credits} load credits, not {self.settings.max_loads}", [f"request {name}" for name in ended])
        if self.hub.is_quiet and not self.hub.dead:
            held = sum(record.hit is not None for record in side.records.values())
            leases = self.core.statistics().leases
            if held != leases:
                raise OracleError(f"L1 has {leases} leases, SchedulerSide {held} hits")

    def _perhaps_fail(self) -> None:
        """Called in the ports that hooks use: a bug of ours, anywhere in a hook."""
        if self.settings.hook_fail_share and self.rng.random() < self.settings.hook_fail_share:
            self.trace.note("a hook fails")
            raise InjectedError

    def _draw(self, mean: float) -> int:
        return int(self.rng.expovariate(1 / mean) + self.rng.random())

    def _owns(self, name: str, blocks: Sequence[int]) -> bool:
        """vLLM promises to keep the blocks of a load until it is reported, whatever becomes of the request."""
        if name not in self.scheduler.requests or name not in self.oracle.loading:
            return False
        return set(blocks) <= set(self.scheduler.kv_cache_manager.get_block_ids(name)[0])


def identify(request: Request) -> Extras:
    """The salt; one that begins with ``?`` cannot be told, one that begins with ``?2`` not from the third block on."""
    salt = request.cache_salt
    if salt is None:
        return b""
    if salt.startswith("?2"):
        return lambda start, end: salt.encode() if start < 2 * BLOCK_SIZE else None
    return None if salt.startswith("?") else salt.encode()
