"""What vLLM's log line says of us: plain counters, the same class from both halves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

GAUGES = frozenset(
    {
        "l1_used_blocks",
        "l1_capacity_blocks",
        "l2_nodes_left_alone",
        "l2_nodes_not_written",
        "l2_nodes_out",
        "l2_membership_age_s",
    }
)
"""Names whose newest value counts; all others add up."""


@dataclass
class KVOffloadStats(KVConnectorStats):
    """``data`` maps a name to a number; reasons of drops are names of their own (``dropped_no_slot``)."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        merged: dict[str, Any] = dict(self.data)
        for name, value in other.data.items():
            merged[name] = value if name in GAUGES else merged.get(name, 0) + value
        return KVOffloadStats(merged)

    def reduce(self) -> dict[str, int | float]:
        """The line for one interval: counts that are 0 are left out, and the hit rate of the tokens asked for is put in."""
        data: dict[str, Any] = self.data
        line: dict[str, int | float] = {name: value for name, value in data.items() if value}
        if data.get("queried_tokens"):
            line["hit_rate"] = round(data.get("hit_tokens", 0) / data["queried_tokens"], 4)
        return line

    def is_empty(self) -> bool:
        return not any(value for name, value in self.data.items() if name not in GAUGES)
