"""Times every hook that vLLM calls on a connector, in the engine's own process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

from kvoffload.bench.insides import Insides

SCHEDULER_HOOKS = (
    "on_new_request",
    "has_pending_block_frees",
    "get_num_new_matched_tokens",
    "get_loaded_kv_cache_group_ids",
    "update_state_after_alloc",
    "get_external_cache_hit_sources",
    "build_connector_meta",
    "update_connector_output",
    "request_finished",
    "request_finished_all_groups",
    "update_state_after_free",
    "get_kv_connector_stats",
    "take_events",
)
WORKER_HOOKS = (
    "handle_preemptions",
    "bind_connector_metadata",
    "start_load_kv",
    "wait_for_layer_load",
    "save_kv_layer",
    "finish_forward",
    "wait_for_save",
    "get_transfer_results",
    "get_finished",
    "get_block_ids_with_load_errors",
    "get_kv_connector_stats",
    "get_kv_connector_kv_cache_events",
    "build_connector_worker_meta",
    "clear_connector_metadata",
)


@dataclass(slots=True)
class Step:
    """From one `build_connector_meta` to the next. ``kind``: decode (one token for each request, none new), prefill, or empty."""

    kind: str = "empty"
    us: float = 0.0
    waited_us: float = 0.0


@dataclass(slots=True)
class Recorded:
    """``calls``: by hook, (µs without the named waits, µs in the named waits, blocks whose key was made or posted)."""

    calls: dict[str, list[tuple[float, float, int]]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    pending_load_us: float = 0.0
    """Between handing a load over and reporting it, outside of hooks."""


class HookTimers:
    """Wraps the hooks of two instances; all calls are on vLLM's one thread. Only a call from vLLM counts, not one hook calling another.

    What timing a hook that does nothing takes is taken off every call: dozens of calls make up a step.
    """

    def __init__(self, insides: Insides) -> None:
        self._insides = insides
        self._recorded = Recorded()
        self._step = Step()
        self._is_inside = False
        self._waited = 0.0
        self._in_hooks = 0.0
        self._load_begun: tuple[float, float] | None = None
        self._own_s = 0.0
        self._own_s = self._calibrate()

    def _calibrate(self) -> float:
        timed = self.timed("nothing", lambda *_: None)
        for _ in range(1000):
            timed(None)
        own = statistics.median(us for us, _, _ in self._recorded.calls["nothing"]) / 1e6
        self._recorded, self._step, self._in_hooks = Recorded(), Step(), 0.0
        return own

    @classmethod
    def install(cls, scheduler_connector: Any, worker_connector: Any, insides: Insides) -> Self:
        """Replace the hooks of both instances by timed ones, and the named waits as well."""
        timers = cls(insides)
        for connector, hooks in ((scheduler_connector, SCHEDULER_HOOKS), (worker_connector, WORKER_HOOKS)):
            for name in hooks:
                hook = getattr(connector, name, None)
                if hook is not None:
                    setattr(connector, name, timers.timed(name, hook))
        for port in insides.ports:
            port.wait = timers.timed_wait(port.wait)
        return timers

    def take(self) -> dict[str, Any]:
        """Everything since the last time, as JSON can hold it; the step that is under way belongs to the next."""
        taken, self._recorded = self._recorded, Recorded()
        return {
            "calls": taken.calls,
            "steps": [[step.kind, step.us, step.waited_us] for step in taken.steps],
            "pending_load_us": taken.pending_load_us,
            "hooks_us": sum(us + waited for calls in taken.calls.values() for us, waited, _ in calls),
        }

    def timed_wait(self, wait: Callable[[float], bool]) -> Callable[[float], bool]:
        def timed(timeout_s: float) -> bool:
            begun = time.perf_counter()
            try:
                return wait(timeout_s)
            finally:
                self._waited += time.perf_counter() - begun

        return timed

    def timed(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        clock = time.perf_counter
        counts_blocks = name in ("get_num_new_matched_tokens", "build_connector_meta")

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside:
                return hook(*args, **kwargs)
            self._is_inside = True
            if name == "build_connector_meta":
                self._next_step(args[0])
            before = self._blocks(args) if counts_blocks else 0
            waited_before = self._waited
            begun = clock()
            try:
                result = hook(*args, **kwargs)
            finally:
                seconds = clock() - begun
                self._is_inside = False
            blocks = self._blocks(args) - before if counts_blocks else 0
            waited = self._waited - waited_before
            self._record(name, max(0.0, seconds - self._own_s), waited, blocks)
            if name == "start_load_kv" or name == "get_transfer_results":
                self._follow_load(name, args, begun, result)
            return result

        return timed

    def _blocks(self, args: tuple[Any, ...]) -> int:
        return self._insides.posted_blocks(getattr(args[0], "request_id", None) if args else None)

    def _next_step(self, output: Any) -> None:
        self._recorded.steps.append(self._step)
        scheduled = output.num_scheduled_tokens
        if not scheduled:
            kind = "empty"
        elif not output.scheduled_new_reqs and all(tokens == 1 for tokens in scheduled.values()):
            kind = "decode"
        else:
            kind = "prefill"
        self._step = Step(kind)

    def _record(self, name: str, seconds: float, waited: float, blocks: int) -> None:
        self._recorded.calls.setdefault(name, []).append(((seconds - waited) * 1e6, waited * 1e6, blocks))
        self._step.us += (seconds - waited) * 1e6
        self._step.waited_us += waited * 1e6
        self._in_hooks += seconds

    def _follow_load(self, name: str, args: tuple[Any, ...], begun: float, result: Any) -> None:
        now = time.perf_counter()
        if name == "get_transfer_results":
            if self._load_begun is not None and result.finished_recving:
                started, in_hooks = self._load_begun
                self._recorded.pending_load_us += ((now - started) - (self._in_hooks - in_hooks)) * 1e6
                self._load_begun = None
        elif self._load_begun is None and self._insides.has_pending_loads:
            # Its own time was counted as a hook's: from its end on.
            self._load_begun = (now, self._in_hooks)
