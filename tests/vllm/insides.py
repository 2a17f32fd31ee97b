"""The parts of kvoffload inside a running engine of one or two processes: to break, to block, to time, and to make anew."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.vllm.harness import Engine
from tests.vllm.worker_extension import KVAccess

if TYPE_CHECKING:
    from kvoffload.bridge import LoopThread
    from kvoffload.connector.connector import KVOffloadConnector
    from kvoffload.connector.scheduler_side import SchedulerSide
    from kvoffload.connector.worker_side import WorkerSide
    from kvoffload.runtime.hosts import HubHost, WorkerHost
    from kvoffload.runtime.hub import HubRuntime

WAIT_S = 20.0
"""A bound for what takes milliseconds; only a failing test waits for it."""

MATCH_DEADLINE_S = 0.25
START_DEADLINE_S = 1.0
PAIR_TIMEOUT_S = 1.0
"""Of the engines of these tests; the first is longer than usual, so that a hit is one on a busy machine too."""

DEADLINES: dict[str, Any] = {
    "match": {"deadline_ms": MATCH_DEADLINE_S * 1e3},
    "load": {"start_deadline_ms": START_DEADLINE_S * 1e3},
    "save": {"pair_timeout_s": PAIR_TIMEOUT_S},
}

SCHEDULER_HOOKS = (
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "get_external_cache_hit_sources",
    "build_connector_meta",
    "update_connector_output",
    "request_finished",
    "reset_cache",
    "get_kv_connector_stats",
)
WORKER_HOOKS = ("start_load_kv", "wait_for_save", "get_finished", "get_block_ids_with_load_errors", "get_kv_connector_stats")


def until(condition: Callable[[], object], what: str, timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        threading.Event().wait(0.002)


class Insides:
    """Of an `Engine` in one or two processes. The worker's half is reached only where it is in this process."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def connector(self) -> KVOffloadConnector:
        """The scheduler's half."""
        found: KVOffloadConnector = self.engine.connector
        return found

    @property
    def worker_connector(self) -> KVOffloadConnector:
        return worker_connector()

    @property
    def side(self) -> SchedulerSide:
        assert self.connector.scheduler_half is not None
        return self.connector.scheduler_half.side

    @property
    def worker_side(self) -> WorkerSide:
        assert self.worker_connector.worker_half is not None
        return self.worker_connector.worker_half.side

    @property
    def hub_host(self) -> HubHost:
        assert self.connector.scheduler_half is not None
        return self.connector.scheduler_half.host

    @property
    def hub(self) -> HubRuntime:
        return self.hub_host.hub

    @property
    def worker(self) -> WorkerHost:
        return worker_host()

    @property
    def hub_loop(self) -> LoopThread:
        return self.hub_host._loop or self.worker.loop

    def wait_live(self) -> None:
        """Joined, populated, and nothing missed."""

        def live() -> bool:
            statistics = self.hub.statistics()
            return self.hub.is_live and statistics is not None and statistics.usable > 100

        until(live, "the hub is live")

    def renew(self) -> None:
        """Both halves anew, in an engine of one process that has nothing to do; what was in L1 is gone."""
        old, worker = self.connector, self.worker_connector
        vllm_config, cache_config = old._vllm_config, old._kv_cache_config
        for connector in (worker, old):
            for hook in (*SCHEDULER_HOOKS, *WORKER_HOOKS):
                connector.__dict__.pop(hook, None)
            connector.shutdown()
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

        tensors = self.engine.core.model_executor.driver_worker.worker.model_runner.kv_caches
        names = [name for group in cache_config.kv_cache_groups for name in group.layer_names]
        worker.__init__(vllm_config, KVConnectorRole.WORKER, cache_config)  # type: ignore[misc]
        worker.register_kv_caches(dict(zip(names, tensors, strict=True)))
        old.__init__(vllm_config, KVConnectorRole.SCHEDULER, cache_config)  # type: ignore[misc]
        metadata = worker.get_handshake_metadata()
        assert metadata is not None
        old.set_xfer_handshake_metadata({0: metadata})
        self.wait_live()


def worker_connector() -> KVOffloadConnector:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    found: KVOffloadConnector = get_kv_transfer_group()
    return found


def worker_host() -> WorkerHost:
    half = worker_connector().worker_half
    assert half is not None
    assert half.host is not None
    return half.host


# ---------------------------------------------------------------- hanging


class Hang:
    """A loop that hangs until `end`."""

    def __init__(self, loop: LoopThread) -> None:
        self._go_on = threading.Event()
        hangs = threading.Event()

        def hang() -> None:
            hangs.set()
            self._go_on.wait()

        loop.call_soon(hang)
        assert hangs.wait(WAIT_S)

    def end(self) -> None:
        self._go_on.set()


@contextmanager
def hanging(*loops: LoopThread) -> Iterator[None]:
    hangs = [Hang(loop) for loop in loops]
    try:
        yield
    finally:
        for hang in hangs:
            hang.end()


class FaultAccess(KVAccess):
    """Mixed into vLLM's worker, for a worker in another process."""

    hang: Hang | None = None

    def fault(self, what: str) -> str | None:
        host = worker_host()
        copies: Any = host.runtime.rank.engine
        match what:
            case "hang":
                self.hang = Hang(host.loop)
            case "go on":
                assert self.hang is not None
                self.hang.end()
            case "hold loads":
                copies.hold_loads()
            case "hold saves":
                copies.hold_saves()
            case "release":
                copies.release()
            case "held load" | "held save":
                return "yes" if copies.wait_held(what.split()[1], 0.0) else None
            case "off":
                return host.runtime.off_reason
            case "crash":
                nonsense: Any = object()
                host.loop.call_soon(lambda: host.runtime._grants.owe(nonsense))
            case _:
                raise AssertionError(what)
        return None


# ---------------------------------------------------------------- timing


@dataclass
class HookTimes:
    """Of every hook call on vLLM's thread since `start`, in seconds."""

    spent: dict[str, list[float]] = field(default_factory=dict)
    asked: dict[str, float] = field(default_factory=dict)
    matching: dict[str, float] = field(default_factory=dict)
    """How long vLLM was told, for a request, to ask again."""

    @classmethod
    def start(cls, insides: Insides) -> HookTimes:
        times = cls()
        connectors: list[tuple[KVOffloadConnector, tuple[str, ...]]] = [(insides.connector, SCHEDULER_HOOKS)]
        if insides.engine.processes == 1:
            connectors.append((insides.worker_connector, WORKER_HOOKS))
        for connector, hooks in connectors:
            for hook in hooks:
                setattr(connector, hook, times._timed(hook, getattr(connector, hook)))
        return times

    def _timed(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        spent = self.spent.setdefault(name, [])

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.monotonic()
            result = hook(*args, **kwargs)
            ended = time.monotonic()
            spent.append(ended - begun)
            if name == "get_num_new_matched_tokens":
                request = args[0].request_id
                first = self.asked.setdefault(request, begun)
                self.matching[request] = max(self.matching.get(request, 0.0), 0.0 if result[0] is not None else ended - first)
            return result

        return timed

    def check(self) -> None:
        """Nobody waited, but for the named waits of 2 ms; one in twenty calls may have lost the processor to others for a while."""
        for name, times in self.spent.items():
            ordered = sorted(times)
            if ordered:
                assert ordered[int(0.95 * (len(ordered) - 1))] < 0.012, f"{name}: {ordered[-10:]}"
                assert ordered[-1] < 0.25, f"{name}: {ordered[-10:]}"
        slow = {request: spent for request, spent in self.matching.items() if spent > MATCH_DEADLINE_S + 0.002}
        assert not slow, f"requests waited for an answer: {slow}"
