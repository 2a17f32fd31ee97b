"""The timers around vLLM's hooks, on stand-ins for the two connectors."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from kvoffload.bench.hook_timing import HookTimers
from kvoffload.bench.insides import Insides, KVOffloadInsides


class Port:
    def wait(self, timeout_s: float) -> bool:
        until = time.perf_counter() + timeout_s
        while time.perf_counter() < until:
            pass
        return True


class SchedulerConnector:
    def __init__(self) -> None:
        saver = SimpleNamespace(offered_blocks=0)
        self.side = SimpleNamespace(saver=saver, records={}, has_pending_loads=False)
        self.hub = Port()
        self.scheduler_half = SimpleNamespace(side=self.side, host=SimpleNamespace(hub=self.hub))

    def get_num_new_matched_tokens(self, request: Any, computed: int) -> tuple[int, bool]:
        record = self.side.records[request.request_id]
        if not record.sequence:
            record.sequence = 1
            record.chain.keys.extend([b""] * 5)
            self.hub.wait(0.005)
        return 5, True

    def build_connector_meta(self, output: Any) -> str:
        self.side.saver.offered_blocks += 3
        return "metadata"


class WorkerConnector:
    def __init__(self) -> None:
        self.runtime = Port()
        self.worker_half = SimpleNamespace(host=SimpleNamespace(runtime=self.runtime))

    def start_load_kv(self, context: Any) -> None:
        pass

    def get_finished(self, finished: set[str]) -> tuple[None, set[str]]:
        return None, {"r"}

    def get_transfer_results(self, finished: set[str]) -> Any:
        return SimpleNamespace(finished_recving=self.get_finished(finished)[1])


def step(*tokens: int, new: int = 0) -> SimpleNamespace:
    return SimpleNamespace(num_scheduled_tokens={f"r{index}": count for index, count in enumerate(tokens)}, scheduled_new_reqs=[0] * new)


@pytest.fixture
def engine() -> tuple[HookTimers, Any, Any]:
    scheduler, worker = SchedulerConnector(), WorkerConnector()
    return HookTimers.install(scheduler, worker, KVOffloadInsides(scheduler, worker)), scheduler, worker


def test_waits_are_told_apart_and_blocks_are_counted_once(engine: tuple[HookTimers, Any, Any]) -> None:
    timers, scheduler, _ = engine
    request = SimpleNamespace(request_id="r")
    scheduler.side.records["r"] = SimpleNamespace(sequence=0, chain=SimpleNamespace(keys=[]))
    assert scheduler.get_num_new_matched_tokens(request, 0) == (5, True)
    assert scheduler.get_num_new_matched_tokens(request, 0) == (5, True)
    first, second = timers.take()["calls"]["get_num_new_matched_tokens"]
    assert first[1] >= 5000
    assert first[2] == 5
    assert second[1:] == (0, 0)
    assert timers.take()["calls"] == {}


def test_a_hook_that_calls_a_hook_counts_once(engine: tuple[HookTimers, Any, Any]) -> None:
    timers, _, worker = engine
    assert worker.get_transfer_results(set()).finished_recving == {"r"}
    assert list(timers.take()["calls"]) == ["get_transfer_results"]


def test_steps_are_sorted_by_what_they_compute(engine: tuple[HookTimers, Any, Any]) -> None:
    timers, scheduler, worker = engine
    for output in (step(1, 1), step(1, 7), step(1, new=1), step(), step(1)):
        scheduler.build_connector_meta(output)
        worker.start_load_kv(None)
    scheduler.build_connector_meta(step())
    taken = timers.take()
    assert [kind for kind, _, _ in taken["steps"][1:]] == ["decode", "prefill", "prefill", "empty", "decode"]
    assert all(us > 0 for _, us, _ in taken["steps"][1:])
    assert {blocks for _, _, blocks in taken["calls"]["build_connector_meta"]} == {3}


def test_time_outside_hooks_counts_while_a_load_is_pending(engine: tuple[HookTimers, Any, Any]) -> None:
    timers, scheduler, worker = engine
    scheduler.side.has_pending_loads = True
    worker.start_load_kv(None)
    Port().wait(0.005)  # vLLM's own code: no hook
    worker.get_transfer_results(set())
    Port().wait(0.005)
    worker.get_transfer_results(set())
    pending = timers.take()["pending_load_us"]
    assert pending >= 5000
    worker.get_transfer_results(set())
    assert timers.take()["pending_load_us"] == 0


def test_a_connector_that_nothing_is_known_of_is_timed_too() -> None:
    scheduler, worker = SimpleNamespace(build_connector_meta=lambda output: "metadata"), WorkerConnector()
    timers = HookTimers.install(scheduler, worker, Insides())
    assert scheduler.build_connector_meta(step(1)) == "metadata"
    worker.start_load_kv(None)
    worker.get_transfer_results(set())
    scheduler.build_connector_meta(step())
    taken = timers.take()
    assert [kind for kind, _, _ in taken["steps"]] == ["empty", "decode"]
    assert {blocks for timed in taken["calls"].values() for _, _, blocks in timed} == {0}
    assert taken["pending_load_us"] == 0
