"""Engines, one after another and side by side, share blocks through nodes; and their answers are plain vLLM's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.infinistore.environment import Environment, NotRun
from tests.vllm.harness import engine
from tests.vllm.outputs import assert_same
from tests.vllm.plain import Plain
from tests.vllm.prompts import prompt, prompts
from tests.vllm.second_tier import Node, StartNodes, found_by, real_nodes, share, sharing_config

from kvoffload.l1.states import State
from kvoffload.testing.valkey import ValkeyServer


def on(*kinds: str) -> pytest.MarkDecorator:
    """On these kinds of nodes; on the others too where there are minutes for it."""
    every = ("redis", "infinistore")
    params = [kind if kind in kinds else pytest.param(kind, marks=pytest.mark.long) for kind in every]
    return pytest.mark.parametrize("nodes", params, indirect=True)


@pytest.fixture
def nodes(request: pytest.FixtureRequest, infinistore_prepared: Environment | NotRun) -> Iterator[StartNodes]:
    if request.param == "infinistore" and isinstance(infinistore_prepared, NotRun):
        pytest.skip(f"InfiniStore server not run: {infinistore_prepared}")
    with real_nodes(request.param, infinistore_prepared) as start:
        yield start


@on("redis", "infinistore")
def test_a_later_engine_has_what_an_earlier_one_computed(plain: Plain, nodes: StartNodes) -> None:
    asked = prompts([31, 33, 64, 97, 200, 330], "later")
    [node] = nodes(1)
    config = sharing_config([node])
    with engine(transfer=config) as first:
        assert_same(plain.generate(asked), first.generate(asked))
        first.flush()
        kv = [first.kv_of(one) for one in asked]
    with engine(transfer=config) as second:
        found_by(second, plain, asked, kv)
        # Its own L1 has them now, whatever becomes of the node.
        node.kill()
        second.forget()
        found_by(second, plain, asked, kv)


@on("redis")
def test_without_l1_blocks_come_from_nodes_each_time(plain: Plain, nodes: StartNodes) -> None:
    asked = prompts([33, 97, 200, 330], "no L1")
    config = sharing_config(nodes(1))
    config["kv_connector_extra_config"]["l1"] = {"enabled": False, "capacity_gb": 0.25}
    with engine(transfer=config) as served:
        assert_same(plain.generate(asked), served.generate(asked))
        kv = [served.kv_of(one) for one in asked]
        for _ in range(2):
            served.forget()
            found_by(served, plain, asked, kv)
        served.flush()
        assert served.l1().slots[State.FREE] == served.l1().usable
        served.assert_nothing_leaked()


@on("infinistore")
def test_engines_side_by_side_share_both_ways(plain: Plain, nodes: StartNodes) -> None:
    [node] = nodes(1)
    config = sharing_config([node])
    with engine(processes=3, transfer=config) as there, engine(transfer=config) as here:
        share(there, here, plain, prompts([130, 70, 250], "from there"))
        share(here, there, plain, prompts([140, 65, 260], "from here"))


@on("redis")
def test_what_differs_in_one_thing_is_not_shared(plain: Plain, nodes: StartNodes) -> None:
    asked = [prompt(200, "differs")]
    there = nodes(2)
    with engine(transfer=sharing_config(there)) as first:
        first.generate(asked)
        first.flush()
    others = [{"namespace": "another"}, {"secret": "a secret of sixteen and more"}]
    for other in others:
        with engine(transfer=sharing_config(there, **other)) as second:
            found = second.generate(asked)
            assert_same(plain.generate(asked), found)
            assert [output.cached for output in found] == [0]


def test_altered_values_are_misses(plain: Plain) -> None:
    """A node that lies: a flipped bit in every other value, and two values under each other's names."""
    import redis

    asked = prompts([200, 170], "altered")
    with ValkeyServer() as server:
        config = sharing_config([Node("redis", server)])
        with engine(transfer=config) as first:
            first.generate(asked)
            first.flush()
        client: Any = redis.Redis.from_url(server.url)
        names = sorted(client.keys("kvo1:*"))
        assert len(names) == 6 + 5
        for name in names[::2]:
            value = bytearray(client.get(name))
            value[-1] ^= 1
            client.set(name, bytes(value))
        one, other = names[1], names[3]
        mine, theirs = client.get(one), client.get(other)
        client.set(one, theirs)
        client.set(other, mine)
        client.close()
        with engine(transfer=config) as second:
            assert_same(plain.generate(asked), second.generate(asked))
            assert second.l1().remote.totals.failed > 0
            second.forget()
            found_by(second, plain, asked)  # from its own L1: what it computed instead


@on("infinistore")
def test_nodes_come_and_go_under_load(plain: Plain, nodes: StartNodes) -> None:
    """Three nodes of which one at a time is killed, restarted empty, or frozen, while an engine whose L1 churns serves."""
    asked = prompts([200, 150, 330, 97, 260, 180, 220, 140], "load")
    expected = plain.generate(asked, 4)
    one, two, three = there = nodes(3)
    config = sharing_config(there, deadline_base_ms=200, deadline_most_ms=200, connect_timeout_ms=200, write_timeout_ms=500)
    config["kv_connector_extra_config"]["l1"] = {"capacity_bytes": 40 << 20}
    with engine(transfer=config, num_gpu_blocks_override=64) as served:
        happenings = [
            one.kill,
            two.freeze,
            one.restart,
            three.kill,
            two.thaw,
            three.restart,
            one.freeze,
            two.kill,
            one.thaw,
            two.restart,
        ]
        for turn, happens in enumerate(happenings):
            happens()
            for again in range(2):
                assert_same(expected, served.generate(asked, 4))
                served.drop_engine_cache()
                served.noise(turn * 2 + again)
        served.flush()
        before = served.l1().remote.totals.written
        fresh = prompts([200, 150], "after all that")
        assert_same(plain.generate(fresh, 4), served.generate(fresh, 4))
        served.flush()
        assert served.l1().remote.totals.written > before  # service resumed by itself
        assert served.connector.off_reason is None
        served.assert_nothing_leaked()
