"""Rendezvous: everybody agrees, shares are even, and nothing moves that need not."""

from __future__ import annotations

import time
from collections import Counter
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvoffload.errors import ConfigError, MisuseError
from kvoffload.l2.addresses import DEFAULT_PORTS, host_port, node_url, static_nodes
from kvoffload.l2.nodes import INFINISTORE_PORT
from kvoffload.l2.ring import FEW, NodeAddress, RendezvousRing

KEYS = [blake2b(b"%d" % index, digest_size=24).digest() for index in range(20_000)]


def ring(*names: str) -> RendezvousRing:
    return RendezvousRing(1, [NodeAddress(name, f"redis://{name}:6379") for name in names])


def named(count: int) -> list[str]:
    return [f"kv-{index}" for index in range(count)]


def test_the_owner_of_a_key_is_for_ever() -> None:
    """Written down: engines of different releases share nodes, so these must not change."""
    three = ring("kv-0", "kv-1", "kv-2")
    keys = [bytes(24), b"\xff" * 24, bytes(range(24)), *KEYS[:9]]
    assert [three.node_of(key)[-1] for key in keys] == list("220000120122")  # type: ignore[index]


@pytest.mark.parametrize("count", [2, 3, 5, 16])
def test_shares_are_even(count: int) -> None:
    shares = Counter(ring(*named(count)).nodes_of(KEYS))
    fair = len(KEYS) / count
    # A share is binomial: five standard deviations.
    assert all(abs(shares[name] - fair) < 5 * fair**0.5 for name in named(count)), shares


@pytest.mark.parametrize("count", range(2, 9))
def test_a_node_that_joins_takes_its_share_and_nothing_else_moves(count: int) -> None:
    before, after = ring(*named(count - 1)).nodes_of(KEYS), ring(*named(count)).nodes_of(KEYS)
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {f"kv-{count - 1}"}
    fair = len(KEYS) / count
    assert abs(len(moved) - fair) < 5 * fair**0.5


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(min_size=1, max_size=20).filter(str.isprintable), min_size=2, max_size=8, unique=True), st.data())
def test_a_node_that_leaves_moves_its_own_keys_alone(names: list[str], data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(names))
    keys = KEYS[:200]
    before, after = ring(*names).nodes_of(keys), ring(*(name for name in names if name != gone)).nodes_of(keys)
    assert all(old in (gone, new) for old, new in zip(before, after, strict=True))
    assert gone not in after


@settings(deadline=None, max_examples=50)
@given(st.permutations(named(6)), st.integers(0, 3 * FEW))
def test_one_by_one_or_in_batches_and_in_any_order_of_nodes_the_answer_is_the_same(names: list[str], count: int) -> None:
    shuffled = ring(*names)
    assert shuffled.nodes_of(KEYS[:count]) == [ring(*named(6)).node_of(key) for key in KEYS[:count]]
    assert shuffled.nodes == ring(*named(6)).nodes


def test_no_nodes_and_one_node() -> None:
    assert ring().node_of(KEYS[0]) is None
    assert ring().nodes_of(KEYS[:100]) == [None] * 100
    assert ring("a").nodes_of(KEYS[:100]) == [ring("a").node_of(KEYS[0])] * 100 == ["a"] * 100
    assert ring("a").nodes_of([]) == []


def test_another_address_moves_nothing() -> None:
    moved = RendezvousRing(2, [NodeAddress(name, "redis://elsewhere:1") for name in named(3)])
    assert moved.nodes_of(KEYS) == ring(*named(3)).nodes_of(KEYS)
    assert moved.nodes != ring(*named(3)).nodes


def test_names_are_unique() -> None:
    with pytest.raises(MisuseError, match="names of their own"):
        ring("a", "b", "a")


def test_a_key_takes_microseconds() -> None:
    """Some 0.4 us per key and node, 0.1 in batches, on an idle machine; the bounds only hold against something quadratic."""
    three = ring(*named(3))
    begun = time.process_time()
    for key in KEYS[:2000]:
        three.node_of(key)
    assert time.process_time() - begun < 2000 * 3 * 10e-6
    begun = time.process_time()
    three.nodes_of(KEYS)
    assert time.process_time() - begun < len(KEYS) * 3 * 5e-6


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("backend", "entry", "name", "url"),
    [
        ("infinistore", "10.0.0.1:12346", "10.0.0.1:12346", "infinistore://10.0.0.1:12346"),
        ("infinistore", "10.0.0.1", "10.0.0.1:12345", "infinistore://10.0.0.1:12345"),
        ("infinistore", "infinistore://KV-0.local:1", "kv-0.local:1", "infinistore://kv-0.local:1"),
        ("infinistore", "[::1]:12345", "[::1]:12345", "infinistore://[::1]:12345"),
        ("infinistore", "[0:0:0:0::1]:12345", "[::1]:12345", "infinistore://[::1]:12345"),
        ("redis", "10.0.0.1:7000", "10.0.0.1:7000", "redis://10.0.0.1:7000"),
        ("redis", "redis://10.0.0.1", "10.0.0.1:6379", "redis://10.0.0.1"),
        ("redis", "rediss://me:secret@h:7/0", "h:7", "rediss://me:secret@h:7/0"),
        ("redis", "redis://:secret@h:7/3", "h:7/3", "redis://:secret@h:7/3"),
        ("redis", "redis+cluster://h:7", "h:7", "redis+cluster://h:7"),
        ("redis", "unix:///run/valkey.sock", "/run/valkey.sock", "unix:///run/valkey.sock"),
    ],
)
def test_static_nodes_are_named_by_their_place(backend: str, entry: str, name: str, url: str) -> None:
    assert static_nodes(backend, [entry]) == (NodeAddress(name, url),)


@pytest.mark.parametrize(
    ("backend", "entry"),
    [
        ("infinistore", "redis://h:1"),
        ("infinistore", "h:1/path"),
        ("infinistore", "infinistore://me:secret@h:1"),
        ("infinistore", "h:http"),
        ("infinistore", "h:70000"),
        ("infinistore", "h:0"),
        ("infinistore", "10.0.0.256:1"),
        ("infinistore", "::1"),
        ("infinistore", "two words:1"),
        ("infinistore", ""),
        ("redis", "infinistore://h:1"),
        ("redis", "http://h:1"),
        ("redis", "redis://"),
        ("redis", "unix://"),
        ("redis", "redis://:sec/ret@h:1"),
        ("redis", "redis://:sec#ret@h:1"),
    ],
)
def test_what_names_no_node_is_refused_without_its_password(backend: str, entry: str) -> None:
    with pytest.raises(ConfigError, match=r"l2\.nodes\[1\]") as refused:
        static_nodes(backend, ["good:1", entry])
    assert "sec" not in str(refused.value).replace("section", "")


def test_the_same_node_twice() -> None:
    assert len(static_nodes("infinistore", ["h:1", "H:1", "infinistore://h:1"])) == 1
    with pytest.raises(ConfigError, match=r"l2\.nodes\[1\]: h:1 is there already"):
        static_nodes("redis", ["redis://:one@h:1", "redis://:two@h:1"])


def test_urls() -> None:
    assert node_url("redis", "10.0.0.1", 6379) == "redis://10.0.0.1:6379"
    assert node_url("infinistore", "fd00::2", 12345) == "infinistore://[fd00::2]:12345"
    assert host_port("fe80::1%eth0", 1) == "[fe80::1%eth0]:1"
    assert DEFAULT_PORTS["infinistore"] == INFINISTORE_PORT
