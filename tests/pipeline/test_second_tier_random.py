"""Three fake nodes, faults by chance, and two engines whose L1 is far too small: every block that is loaded is compared."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import pytest
from tests.pipeline.engines import COUNT, Engine, engine
from tests.pipeline.sites import FakeSite

from kvoffload.config import L2Settings
from kvoffload.l2.ring import NodeAddress
from kvoffload.testing.fake_node import FakeNode, Kind, NodeFault

pytestmark = pytest.mark.asyncio

SEEDS = range(20)
STEPS = 40
SLOTS = 40
PROMPTS = 8
PORTS = (7001, 7002, 7003)

FAULTS: dict[Kind, tuple[NodeFault, ...]] = {
    "find": (NodeFault.ERROR, NodeFault.NEVER, NodeFault.ABSENT, NodeFault.REFUSE),
    "read": (
        NodeFault.ERROR,
        NodeFault.NEVER,
        NodeFault.ABSENT,
        NodeFault.MALFORMED,
        NodeFault.OTHER_KEY,
        NodeFault.TRUNCATED,
        NodeFault.FLIPPED,
        NodeFault.UNSETTLED,
        NodeFault.UNSETTLED,
        NodeFault.RAISE,
    ),
    "write": (
        NodeFault.ERROR,
        NodeFault.NEVER,
        NodeFault.FULL,
        NodeFault.HALF_WRITTEN,
        NodeFault.LOST,
        NodeFault.UNSETTLED,
        NodeFault.UNSETTLED,
        NodeFault.RAISE,
    ),
}


class ThreeSites:
    backend = "redis"

    def __init__(self) -> None:
        self.port = PORTS[0]
        self.sites = [FakeSite(port) for port in PORTS]
        for site in self.sites:
            site.settle_s = 0.2  # who flushes waits for it

    def make(self, address: NodeAddress, settings: L2Settings, value_bytes: int) -> FakeNode:
        [site] = [site for site in self.sites if address.url.endswith(str(site.port))]
        return site.make(address, settings, value_bytes)


class Chaos:
    """One run."""

    def __init__(self, seed: int, sites: list[FakeSite], engines: list[Engine]) -> None:
        self.random = random.Random(seed)
        self.sites = sites
        self.engines = engines
        self.done: Counter[str] = Counter()

    async def step(self) -> None:
        """A fault or none, and some work at the same time."""
        if self.random.random() < 0.3:
            self.break_something()
        async with anyio.create_task_group() as tasks:
            for _ in range(self.random.randint(1, 4)):
                tasks.start_soon(self.work(), self.random.randrange(PROMPTS), self.random.choice([COUNT, self.random.randint(1, COUNT)]))
        if self.random.random() < 0.4:
            self.heal(self.random.choice(self.sites))

    def work(self) -> Callable[[int, int], Coroutine[Any, Any, object]]:
        mine = self.random.choice(self.engines)
        return self.random.choice([mine.save, mine.load, mine.load, mine.write])

    def break_something(self) -> None:
        site = self.random.choice(self.sites)
        what = self.random.choice(["fault"] * 6 + ["rot", "rot", "always", "kill", "freeze", "scribble", "slow"])
        self.done[what] += 1
        if what in ("fault", "always"):
            kind = self.random.choice(list(FAULTS))
            fault = self.random.choice(FAULTS[kind])
            self.done[f"{kind} {fault.value}"] += 1
            if what == "always" and fault is not NodeFault.RAISE:
                site.fail(kind, fault)
            else:
                site.each(lambda node: node.fail_next(kind, fault))
        elif what == "kill":
            site.kill()
            if self.random.random() < 0.7:
                site.restart()
        elif what == "freeze":
            site.freeze()
        elif what == "slow":
            site.slow(10e6)
        elif what == "scribble":
            site.each(lambda node: node.scribble())
        else:
            for name in self.random.sample(sorted(site.values), min(5, len(site.values))):
                value = bytearray(site.values[name])
                value[self.random.randrange(len(value))] ^= 1 << self.random.randrange(8)
                site.values[name] = bytes(value)

    def heal(self, site: FakeSite) -> None:
        for kind in FAULTS:
            site.fail(kind, NodeFault.NONE)
        site.slow(None)
        site.revive()
        site.each(lambda node: node.settle_now())
        for each in self.engines:
            each.probe_now()


@pytest.mark.parametrize("seed", SEEDS)
async def test_nothing_wrong_and_nothing_lost(seed: int) -> None:
    three = ThreeSites()
    options = {"nodes": [f"127.0.0.1:{port}" for port in PORTS], "write_timeout_ms": 100}
    async with engine(three, slots=SLOTS, deadline_s=0.08, **options) as one, engine(three, slots=SLOTS, deadline_s=0.08, **options) as two:
        chaos = Chaos(seed, three.sites, [one, two])
        for _ in range(STEPS):
            await chaos.step()
        for site in three.sites:
            chaos.heal(site)
        for each in (one, two):
            await each.check()
            assert each.loaded, chaos.done
            assert each.statistics.evictions, chaos.done
        assert one.remote.totals.fetched + two.remote.totals.fetched > COUNT // 4, chaos.done  # how much depends on the machine
