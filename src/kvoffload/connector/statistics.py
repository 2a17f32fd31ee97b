"""What each half tells vLLM's log line, about once a second: counters since the last time, L1's occupancy, and nodes in trouble."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvoffload.connector.scheduler_side import SchedulerCounters, SchedulerSide
from kvoffload.connector.worker_side import WorkerCounters, WorkerSide
from kvoffload.l1.states import State

if TYPE_CHECKING:
    from kvoffload.runtime.hosts import WorkerHost
    from kvoffload.runtime.hub import HubRuntime
    from kvoffload.runtime.nodes_health import NodesHealth


class SchedulerStatistics:
    """Differences since the last time, of the facade's counters and of L1's."""

    def __init__(self, side: SchedulerSide, hub: HubRuntime, unidentified: Mapping[str, int]) -> None:
        """``unidentified``: requests without keys (from some block on) so far, by reason; a live object."""
        self._unidentified = unidentified
        self._side = side
        self._hub = hub
        self._last: dict[str, int] = {}

    def take(self) -> dict[str, Any] | None:
        side = self._side
        if not side.has_statistics:
            return None
        side.has_statistics = False
        counters, side.counters = side.counters, SchedulerCounters()
        found = {
            "queried_tokens": counters.queried_tokens,
            "hit_tokens": counters.hit_tokens,
            "loads": counters.loads,
            "failed_loads": counters.failed_loads,
            "unloaded_tokens": counters.unloaded_tokens,
        }
        totals = {"offered_blocks": side.saver.offered_blocks, "unidentified_requests": sum(self._unidentified.values())}
        totals |= {f"dropped_{reason.value}": count for reason, count in side.saver.drops.items()}
        totals |= {f"unanswered_{reason}": count for reason, count in side.matcher.zero_reasons.items()}
        gauges: dict[str, int] = {}
        l1 = self._hub.statistics()
        if l1 is not None:
            for reason, count in l1.drops.items():
                name = f"dropped_{reason.value}"
                totals[name] = totals.get(name, 0) + count
            totals["saved_blocks"] = l1.committed
            totals["evicted_blocks"] = l1.evictions
            if l1.remote is not None:
                l2 = l1.remote.totals
                totals |= {
                    "l2_asked_blocks": l2.asked,
                    "l2_found_blocks": l2.found,
                    "l2_not_worth_loading_blocks": l2.skipped,
                    "l2_fetched_blocks": l2.fetched,
                    "l2_failed_blocks": l2.absent + l2.failed,
                    "l2_late_answers": l2.late,
                    "l2_hit_tokens": l2.hit_tokens,
                    "l2_written_blocks": l2.written,
                    "l2_dropped_blocks": l2.write_failed + l2.write_dropped,
                    "l2_checked_blocks": l2.checked,
                    "l2_lacking_blocks": l2.lacking,
                }
            _tell_nodes(self._hub.nodes_health(), totals, gauges)
            gauges |= {"l1_used_blocks": l1.slots.get(State.READY, 0), "l1_capacity_blocks": l1.usable}
        for name, total in totals.items():
            found[name] = max(0, total - self._last.get(name, 0))  # those of nodes go with them
        self._last = totals
        return {name: value for name, value in found.items() if value} | gauges


def _tell_nodes(health: NodesHealth | None, totals: dict[str, int], gauges: dict[str, int]) -> None:
    """What is wrong with nodes, or with the table of them: all 0 where nothing is, which the line leaves out."""
    if health is None:
        return
    totals |= {f"l2_wrong_{fault.value}_values": count for fault, count in health.faults.items()}
    totals["l2_membership_failures"] = health.membership.failures
    is_old = health.membership.last_error is not None
    gauges |= {
        "l2_nodes_left_alone": health.left_alone,
        "l2_nodes_not_written": health.unwritten,
        "l2_nodes_out": health.out,
        "l2_membership_age_s": round(health.membership.age_s or 0) if is_old else 0,
    }


def worker_statistics(side: WorkerSide, host: WorkerHost | None) -> dict[str, Any] | None:
    """Counters since the last time, None where nothing happened: a value would keep an idle step from being idle."""
    side.has_statistics = False
    counters = side.counters
    if host is None or not (counters.loaded_blocks or counters.failed_loads or counters.withdrawn_loads or counters.refused_saves):
        return None
    side.counters = WorkerCounters()
    found = {
        "loaded_bytes": counters.loaded_blocks * host.block_bytes,
        "loaded_blocks": counters.loaded_blocks,
        "failed_copies": counters.failed_loads,
        "withdrawn_loads": counters.withdrawn_loads,
        "refused_saves": counters.refused_saves,
    }
    return {name: value for name, value in found.items() if value}
