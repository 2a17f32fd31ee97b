"""Membership: which tables it takes, when it looks, what it says; in virtual time, on a source of our own."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from tests.l2.test_nodes_table import MALFORMED

from kvoffload.actors.membership import RETRY_MOST_S, TROUBLE_S, Membership, MembershipStatistics
from kvoffload.config import MembershipSettings
from kvoffload.errors import ConfigError
from kvoffload.l2.nodes_table import TableNode, make_table, render_table
from kvoffload.l2.ring import NodeAddress
from kvoffload.l2.table_source import TableUnreadable
from kvoffload.messages import NodesChanged
from kvoffload.testing.cancel import cancel_at_every_checkpoint

SETTINGS = MembershipSettings.model_validate({"url": "redis://unused", "poll_s": 10.0})


def table(version: int, *names: str, host: str = "h") -> bytes:
    return render_table(make_table(version, [TableNode(name, f"{host}-{name}", 1) for name in names]))


ONE, TWO, THREE = table(1, "a"), table(2, "a", "b"), table(3, "a", "b", "c")


class Source:
    """A TableSource that gives what ``now`` is: a table, none, an error, or (``hang``) nothing for ever."""

    def __init__(self, now: bytes | Exception | None = None) -> None:
        self.now = now
        self.hang = False
        self.read_at: list[float] = []
        self.is_open = False

    async def read(self) -> bytes | None:
        self.read_at.append(anyio.current_time())
        self.is_open = True
        await anyio.lowlevel.checkpoint()
        if self.hang:
            await anyio.sleep_forever()
        if isinstance(self.now, Exception):
            raise self.now
        return self.now

    async def close(self) -> None:
        await anyio.lowlevel.checkpoint()
        self.is_open = False


class Bench:
    """A Membership on a source, and what it announced."""

    def __init__(self, now: bytes | Exception | None = None, settings: MembershipSettings = SETTINGS, **other: object) -> None:
        self.source = Source(now)
        self.said: list[NodesChanged] = []
        arguments = {"source": lambda _: self.source, "clock": anyio.current_time, "chance": lambda: 0.5} | other
        self.membership = Membership(settings, "redis", (), self.said.append, **arguments)  # type: ignore[arg-type]

    @property
    def gauge(self) -> MembershipStatistics:
        return self.membership.statistics()

    def names(self) -> list[str]:
        """Of each announcement."""
        return ["".join(node.name for node in changed.ring.nodes) for changed in self.said]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.membership.run)
            await anyio.wait_all_tasks_blocked()
            yield
            tasks.cancel_scope.cancel()

    async def later(self, now: bytes | Exception | None, seconds: float = 10.5) -> None:
        """Redis is like this from now on, and the next look has been taken."""
        self.source.now = now
        await anyio.sleep(seconds)


# ---------------------------------------------------------------- which tables


@pytest.mark.anyio
async def test_a_table_is_announced_once_and_again_when_it_is_another() -> None:
    bench = Bench(ONE)
    async with bench.running():
        assert bench.names() == ["a"]
        await bench.later(ONE, 100)
        assert bench.names() == ["a"]
        await bench.later(TWO)
        assert bench.names() == ["a", "ab"]
        assert [changed.ring.version for changed in bench.said] == [1, 2]
        assert bench.said[-1].ring.nodes[1] == NodeAddress("b", "redis://h-b:1")
        assert (bench.gauge.version, bench.gauge.nodes, bench.gauge.changes, bench.gauge.last_error) == (2, 2, 2, None)
    assert not bench.source.is_open


@pytest.mark.anyio
async def test_another_version_of_the_same_nodes_is_not_announced() -> None:
    bench = Bench(ONE)
    async with bench.running():
        await bench.later(table(5, "a"))
        assert bench.names() == ["a"]
        assert bench.gauge.version == 5


@pytest.mark.anyio
async def test_another_address_is_announced_and_so_are_other_nodes_under_the_same_version() -> None:
    bench = Bench(ONE)
    async with bench.running():
        await bench.later(table(1, "a", host="elsewhere"))
        await bench.later(table(1, "a", "b"))
        assert [changed.ring.nodes[0].url for changed in bench.said] == ["redis://h-a:1", "redis://elsewhere-a:1", "redis://h-a:1"]
        versions = [changed.ring.version for changed in bench.said]
        assert versions == sorted(set(versions)), "a ring's version grows, whatever the table's does"


@pytest.mark.anyio
@pytest.mark.parametrize("what", MALFORMED)
async def test_a_malformed_table_leaves_the_last_good_one(what: str) -> None:
    bench = Bench(TWO)
    async with bench.running():
        await bench.later(MALFORMED[what][0])
        assert bench.names() == ["ab"]
        assert bench.gauge.last_error is not None
        assert bench.gauge.version == 2
        assert bench.gauge.age_s == pytest.approx(10.5, abs=2.0)
        await bench.later(THREE)
        assert bench.names() == ["ab", "abc"]
        assert bench.gauge.last_error is None
        assert bench.gauge.age_s == pytest.approx(0.0, abs=2.0)


@pytest.mark.anyio
async def test_repairs_are_in_the_gauge_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    written = json.loads(TWO)
    del written["nodes"][0]["slots"][3:]
    bench = Bench(json.dumps(written).encode())
    with caplog.at_level(logging.WARNING, "kvoffload"):
        async with bench.running():
            await anyio.sleep(60)
            (problem,) = bench.gauge.problems
            assert "claimed by no node" in problem
            assert problem in caplog.text
            await bench.later(THREE)
            assert bench.gauge.problems == ()
    assert caplog.text.count("table_repaired") == 1


@pytest.mark.anyio
async def test_an_older_version_is_taken_when_it_stays() -> None:
    bench = Bench(THREE)
    async with bench.running():
        await bench.later(ONE)
        assert bench.names() == ["abc"]
        assert bench.gauge.last_error == "the table's version is 1, and 3 is in force: taken if it stays for 20 s"
        await bench.later(ONE, 10)
        assert bench.names() == ["abc"]
        await bench.later(ONE, 10)
        assert bench.names() == ["abc", "a"]
        assert [changed.ring.version for changed in bench.said] == [3, 4]
        gauge = bench.gauge
        assert (gauge.version, gauge.last_error) == (1, None)


@pytest.mark.anyio
async def test_an_older_version_that_goes_away_was_never_in_force() -> None:
    bench = Bench(THREE)
    async with bench.running():
        for _ in range(10):
            await bench.later(ONE, 10)
            await bench.later(THREE, 10)
        assert bench.names() == ["abc"]


@pytest.mark.anyio
async def test_looks_in_trouble_do_not_make_an_older_version_stay_longer() -> None:
    bench = Bench(THREE)
    async with bench.running():
        bench.source.now = ONE
        for _ in range(8):
            bench.membership.trouble()
            await anyio.sleep(2)
        assert len(bench.source.read_at) > 5
        assert bench.names() == ["abc"]


@pytest.mark.anyio
async def test_where_redis_was_without_a_table_numbers_begin_anew() -> None:
    bench = Bench(THREE)
    async with bench.running():
        await bench.later(None)
        assert "no table under 'kvcache_nodes'" in (bench.gauge.last_error or "")
        assert bench.names() == ["abc"]
        await bench.later(ONE)
        assert bench.names() == ["abc", "a"]


# ---------------------------------------------------------------- when it looks


def gaps(times: list[float]) -> list[float]:
    return [round(later - earlier, 1) for earlier, later in pairwise(times)]


@pytest.mark.anyio
@pytest.mark.parametrize(("chance", "gap"), [(0.0, 8.0), (0.5, 10.0), (1.0, 12.0)])
async def test_polls_are_jittered(chance: float, gap: float) -> None:
    bench = Bench(ONE, chance=lambda: chance)
    async with bench.running():
        await anyio.sleep(100)
    assert set(gaps(bench.source.read_at)) == {gap}


@pytest.mark.anyio
async def test_a_redis_that_cannot_be_read_is_tried_again_for_ever_with_backoff() -> None:
    bench = Bench(TableUnreadable("refused"))
    async with bench.running():
        await anyio.sleep(10_000)
        assert gaps(bench.source.read_at)[:8] == [0.5, 1, 2, 4, 8, 16, 30, 30]
        assert max(gaps(bench.source.read_at)) == RETRY_MOST_S
        assert (bench.gauge.version, bench.gauge.age_s, bench.gauge.last_error, bench.gauge.nodes) == (None, None, "refused", 0)
        assert bench.gauge.failures == bench.gauge.looks == len(bench.source.read_at)
        await bench.later(ONE, 31)
        assert bench.names() == ["a"]
        bench.source.read_at.clear()
        await bench.later(TableUnreadable("refused"), 12)
        assert 0.5 in gaps(bench.source.read_at), "the backoff began anew"


@pytest.mark.anyio
async def test_a_look_that_hangs_ends() -> None:
    bench = Bench(ONE)
    async with bench.running():
        bench.source.hang = True
        await anyio.sleep(30)
        assert "did not answer in time" in (bench.gauge.last_error or "")
        assert not bench.source.is_open or len(bench.source.read_at) > 2
        bench.source.hang = False
        await bench.later(TWO, 60)
        assert bench.names() == ["a", "ab"]


@pytest.mark.anyio
async def test_trouble_looks_at_once_but_not_all_the_time() -> None:
    bench = Bench(ONE)
    async with bench.running():
        await anyio.sleep(5)
        bench.source.now = TWO
        bench.membership.trouble()
        await anyio.sleep(0.01)
        assert bench.names() == ["a", "ab"]
        bench.source.read_at.clear()
        for _ in range(500):
            bench.membership.trouble()
            await anyio.sleep(0.01)
        assert set(gaps(bench.source.read_at)) == {TROUBLE_S}
        await anyio.sleep(100)
        assert gaps(bench.source.read_at)[-1] == 10.0


@pytest.mark.anyio
async def test_trouble_during_a_look_is_looked_at_again() -> None:
    bench = Bench(ONE)
    bench.membership.trouble()  # nobody runs yet: no harm
    async with bench.running():
        bench.source.hang = True
        await anyio.sleep(12)
        bench.source.hang, bench.source.now = False, TWO
        bench.membership.trouble()
        await anyio.sleep(8)
        assert bench.names() == ["a", "ab"]


# ---------------------------------------------------------------- what it says


@pytest.mark.anyio
async def test_each_trouble_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(TableUnreadable("first"))
    with caplog.at_level(logging.WARNING, "kvoffload"):
        async with bench.running():
            await anyio.sleep(100)
            await bench.later(TableUnreadable("second"), 100)
            await bench.later(ONE, 100)
            await bench.later(TableUnreadable("first"), 100)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "membership_trouble reason=first in_force=none",
        "membership_trouble reason=second in_force=none",
        "membership_recovered",
        "membership_trouble reason=first in_force=1",
    ]


# ---------------------------------------------------------------- static nodes


@pytest.mark.anyio
async def test_static_nodes_are_announced_once_and_that_is_all() -> None:
    said: list[NodesChanged] = []
    membership = Membership(MembershipSettings(), "infinistore", ["10.0.0.1:12345", "[::1]:12345"], said.append)
    for _ in range(2):  # restarted, it has nothing new to say
        with anyio.move_on_after(3600):
            await membership.run()
    (changed,) = said
    assert changed.ring.nodes == (
        NodeAddress("10.0.0.1:12345", "infinistore://10.0.0.1:12345"),
        NodeAddress("[::1]:12345", "infinistore://[::1]:12345"),
    )
    assert {changed.ring.node_of(bytes([byte]) * 24) for byte in range(256)} == {"10.0.0.1:12345", "[::1]:12345"}
    membership.trouble()
    gauge = membership.statistics()
    assert (gauge.nodes, gauge.version, gauge.age_s, gauge.last_error, gauge.changes) == (2, None, None, None, 1)


def test_static_nodes_that_make_no_sense_are_a_matter_of_configuration() -> None:
    with pytest.raises(ConfigError, match=r"l2\.nodes\[0\]"):
        Membership(MembershipSettings(), "infinistore", ["redis://x"], lambda _: None)


@pytest.mark.anyio
async def test_with_a_url_static_nodes_are_not_used() -> None:
    source, said = Source(None), list[NodesChanged]()
    membership = Membership(SETTINGS, "redis", ["h:1"], said.append, source=lambda _: source)
    with anyio.move_on_after(100):
        await membership.run()
    assert said == []


# ---------------------------------------------------------------- crashes and cancellation


@pytest.mark.anyio
async def test_after_a_crash_it_goes_on_with_what_it_has() -> None:
    bench = Bench(ONE)
    async with bench.running():
        await anyio.sleep(1)
    bench.source.now = TableUnreadable("gone")
    async with bench.running():
        await anyio.sleep(100)
        assert bench.names() == ["a"]
        assert bench.gauge.version == 1
        await bench.later(TWO, 31)
        assert bench.names() == ["a", "ab"]


@pytest.mark.anyio
async def test_what_could_not_be_announced_is_announced_at_the_next_run() -> None:
    source, said = Source(ONE), list[NodesChanged]()

    def broken_once(changed: NodesChanged) -> None:
        said.append(changed)
        if len(said) == 1:
            raise RuntimeError("a bug elsewhere")

    membership = Membership(SETTINGS, "redis", (), broken_once, source=lambda _: source, clock=anyio.current_time)
    with pytest.raises(RuntimeError, match="a bug elsewhere"):
        await membership.run()
    assert not source.is_open
    with anyio.move_on_after(1):
        await membership.run()
    assert len(said) == 2


@pytest.mark.anyio
async def test_cancelled_anywhere_the_connection_is_closed_and_the_next_run_goes_on() -> None:
    bench = Bench()

    async def run() -> None:
        with anyio.move_on_after(35):
            await bench.membership.run()

    def make_run() -> Coroutine[Any, Any, None]:
        nonlocal bench
        bench = Bench(ONE)
        script: Iterator[bytes | Exception | None] = iter([ONE, TableUnreadable("x"), TWO])
        real = bench.source.read

        async def read() -> bytes | None:
            bench.source.now = next(script, TWO)
            return await real()

        bench.source.read = read  # type: ignore[method-assign]
        return run()

    async def check(nth: int) -> None:
        assert not bench.source.is_open
        names = bench.names()
        assert names in ([], ["a"], ["a", "ab"])
        assert bench.gauge.nodes == len(names[-1] if names else "")
        with anyio.move_on_after(100):
            await bench.membership.run()
        assert bench.names()[-1] == "ab"
        assert len(set(bench.names())) == len(bench.names()), "something was announced twice"

    assert await cancel_at_every_checkpoint(make_run, check) > 5
