"""What vLLM's line says of the second tier: nothing of nodes that are well, and which kind of trouble there is where there is some."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, cast

from tests.connector.ports import BLOCK_SIZE, NAMESPACE, Clock, FakeHub, FakeLedger

from kvoffload.actors.membership import MembershipStatistics
from kvoffload.connector.matcher import MatchSettings
from kvoffload.connector.scheduler_side import SchedulerSettings, SchedulerSide
from kvoffload.connector.statistics import SchedulerStatistics
from kvoffload.connector.stats import KVOffloadStats
from kvoffload.envelope import Fault
from kvoffload.l1.core import L1Core
from kvoffload.l1.parts import L1Config
from kvoffload.l1.statistics import L1Statistics
from kvoffload.runtime.nodes_health import NodesHealth

WELL = NodesHealth(0, 0, 0, {}, MembershipStatistics(nodes=3, version=7, age_s=12.0, looks=2))


class Hub(FakeHub):
    """Knows of nodes what the test says."""

    def __init__(self) -> None:
        super().__init__(Clock())
        self.health: NodesHealth | None = WELL
        self._core = L1Core(L1Config(ranks=1), 8)

    def statistics(self) -> L1Statistics:
        return self._core.statistics()

    def nodes_health(self) -> NodesHealth | None:
        return self.health


class Rig:
    def __init__(self) -> None:
        self.hub = Hub()
        self.unidentified: Counter[str] = Counter()
        settings = SchedulerSettings(BLOCK_SIZE, NAMESPACE, MatchSettings())
        self.side = SchedulerSide(self.hub, FakeLedger(), settings, lambda request: b"", Clock())
        self.statistics = SchedulerStatistics(self.side, cast(Any, self.hub), self.unidentified)

    def take(self, health: NodesHealth | None) -> dict[str, Any]:
        self.hub.health = health
        self.side.has_statistics = True
        taken = self.statistics.take()
        assert taken is not None
        return taken

    def line(self, health: NodesHealth | None) -> dict[str, int | float]:
        """Of an interval; without what it says of L1."""
        return {name: value for name, value in KVOffloadStats(self.take(health)).reduce().items() if name.startswith("l2_")}


def test_of_nodes_that_are_well_the_line_says_nothing() -> None:
    rig = Rig()
    assert rig.line(WELL) == {}
    assert rig.line(None) == {}


def test_trouble_is_there_for_as_long_as_it_lasts() -> None:
    rig = Rig()
    assert rig.line(replace(WELL, left_alone=2, unwritten=1, out=1)) == {
        "l2_nodes_left_alone": 2,
        "l2_nodes_not_written": 1,
        "l2_nodes_out": 1,
    }
    assert rig.line(WELL) == {}


def test_within_an_interval_the_newest_counts_and_faults_add_up() -> None:
    rig = Rig()
    takes = [
        replace(WELL, left_alone=2, faults={Fault.TAG: 3}),
        replace(WELL, left_alone=1, faults={Fault.TAG: 5, Fault.NAMESPACE: 1}),
        replace(WELL, faults={Fault.TAG: 5, Fault.NAMESPACE: 1}),
    ]
    interval = KVOffloadStats({})
    for health in takes:
        interval = interval.aggregate(KVOffloadStats(rig.take(health)))
    line = interval.reduce()
    assert "l2_nodes_left_alone" not in line
    assert line["l2_wrong_tag_values"] == 5
    assert line["l2_wrong_namespace_values"] == 1
    assert not interval.is_empty()


def test_faults_go_with_their_node_and_nothing_is_negative() -> None:
    rig = Rig()
    rig.take(replace(WELL, faults={Fault.TAG: 3}))
    assert rig.line(WELL) == {}
    assert rig.line(replace(WELL, faults={Fault.TAG: 2})) == {"l2_wrong_tag_values": 2}


def test_the_table_is_told_of_while_it_cannot_be_read() -> None:
    rig = Rig()
    bad = replace(WELL.membership, age_s=95.4, last_error="Redis: it hangs", failures=2)
    assert rig.line(replace(WELL, membership=bad)) == {"l2_membership_failures": 2, "l2_membership_age_s": 95}
    assert rig.line(replace(WELL, membership=replace(bad, age_s=None, failures=3))) == {"l2_membership_failures": 1}
    assert rig.line(WELL) == {}


def test_requests_without_keys_are_counted() -> None:
    rig = Rig()
    assert "unidentified_requests" not in rig.take(None)
    rig.unidentified.update({"one reason": 2, "another": 1})
    assert rig.take(None)["unidentified_requests"] == 3
    assert "unidentified_requests" not in rig.take(None)
