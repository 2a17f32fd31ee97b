"""AIBrix's table: as it should be, as its watcher really writes it, and broken in every way."""

from __future__ import annotations

import json
from collections import Counter
from hashlib import blake2b
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvoffload.errors import MisuseError
from kvoffload.l2.nodes_table import (
    MOST_BYTES,
    MOST_NODES,
    SLOTS,
    NodesTable,
    TableError,
    TableNode,
    make_table,
    parse_table,
    render_table,
    version_of,
)
from kvoffload.l2.ring import NodeAddress
from kvoffload.l2.slot_ring import SlotRing

KEYS = [blake2b(b"%d" % index, digest_size=24).digest() for index in range(20_000)]
Span = tuple[int, int]


def node(name: str, *spans: Span, addr: str | None = None, port: object = 12345, **other: object) -> dict[str, Any]:
    host = addr if addr is not None else f"10.0.0.{1 + ord(name[-1]) % 200}"
    return {"name": name, "addr": host, "port": port, "slots": [{"start": start, "end": end} for start, end in spans], **other}


def table(*nodes: dict[str, Any], version: object = 7, **other: object) -> bytes:
    return json.dumps({"nodes": list(nodes), "version": version, **other}).encode()


def key_of(slot: int) -> bytes:
    return (slot + 5 * SLOTS).to_bytes(8) + b"rest of the key!"


def runs(slots: list[int]) -> list[Span]:
    spans: list[Span] = []
    for slot in sorted(slots):
        if spans and spans[-1][1] == slot - 1:
            spans[-1] = (spans[-1][0], slot)
        else:
            spans.append((slot, slot))
    return spans


def as_the_watcher_writes(slots: list[int]) -> list[Span]:
    """Its flaw included: a node with the first slot and the last gets one range, from its last run's start to its first run's end."""
    spans = runs(slots)
    return [(spans[-1][0], spans[0][1])] if spans and spans[0][0] == 0 and spans[-1][1] == SLOTS - 1 else spans


def aibrix_slots(data: bytes) -> list[tuple[int, str]]:
    """What AIBrix's own reader makes of a table: inclusive ranges, sorted by slot, and a key's place is a position in this list."""
    return sorted(
        (slot, member["name"])
        for member in json.loads(data)["nodes"]
        for part in member["slots"]
        for slot in range(part["start"], part["end"] + 1)
    )


GOOD = table(node("kv-1", (2048, 4095)), node("kv-0", (0, 2047)))

# ---------------------------------------------------------------- good tables


def test_a_table_as_it_should_be() -> None:
    parsed, problems = parse_table(GOOD)
    assert problems == ()
    assert parsed.version == 7
    assert parsed.nodes == (TableNode("kv-0", "10.0.0.49", 12345), TableNode("kv-1", "10.0.0.50", 12345))
    assert parsed.slots == ("kv-0",) * 2048 + ("kv-1",) * 2048


def test_a_key_belongs_to_the_owner_of_its_slot_number() -> None:
    ring = SlotRing(parse_table(table(node("b", (0, 0), (5, 4095)), node("a", (1, 4))))[0], "infinistore")
    assert [ring.node_of(key_of(slot)) for slot in (0, 1, 4, 5, 4095)] == ["b", "a", "a", "b", "b"]
    assert ring.nodes_of([key_of(0), key_of(4)]) == ["b", "a"]
    assert ring.version == 7


def test_unknown_fields_are_ignored_and_no_slots_are_fine() -> None:
    idle = node("kv-2", zone="a") | {"slots": None}
    parsed, problems = parse_table(table(node("kv-0", (0, 4095), weight=3), idle, cluster={"x": [1]}))
    assert problems == ()
    assert parsed.slots == ("kv-0",) * SLOTS
    assert [node.name for node in parsed.nodes] == ["kv-0", "kv-2"]


def test_another_address_is_another_address_and_keys_stay() -> None:
    old = SlotRing(parse_table(GOOD)[0], "infinistore")
    moved = SlotRing(parse_table(GOOD.replace(b"10.0.0.50", b"fd00::2"))[0], "infinistore")
    assert old.nodes[1] == NodeAddress("kv-1", "infinistore://10.0.0.50:12345")
    assert moved.nodes[1] == NodeAddress("kv-1", "infinistore://[fd00::2]:12345")
    assert moved.nodes_of(KEYS) == old.nodes_of(KEYS)
    assert SlotRing(parse_table(GOOD)[0], "redis").nodes[0].url == "redis://10.0.0.49:12345"


# ---------------------------------------------------------------- repairs


@settings(deadline=None, max_examples=12)
@given(st.data())
def test_what_the_watcher_loses_by_its_wrapped_range_is_found_again(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 5))
    seed = data.draw(st.integers(0, 1000))
    owners = [blake2b(b"%d %d" % (seed, slot)).digest()[0] % count for slot in range(SLOTS)]
    owners[0] = owners[SLOTS - 1]
    mine = {f"kv-{rank}": [slot for slot in range(SLOTS) if owners[slot] == rank] for rank in range(count)}
    written = table(*(node(name, *as_the_watcher_writes(slots)) for name, slots in mine.items()))
    assert len(aibrix_slots(written)) < SLOTS, "its own reader misses slots"
    parsed, problems = parse_table(written)
    assert parsed.slots == tuple(f"kv-{rank}" for rank in owners)
    assert len(problems) == 1
    assert f"kv-{owners[0]}: a range that wraps" in problems[0]
    assert "the ranges that its writer lost" in problems[0]


def test_a_wrapped_range_beside_others_takes_nothing_but_itself() -> None:
    parsed, problems = parse_table(table(node("a", (4090, 3), (10, 20)), node("b", (21, 4089))))
    assert parsed.slots == ("a",) * 4 + (None,) * 6 + ("a",) * 11 + ("b",) * 4069 + ("a",) * 6
    assert [text.split(":")[0] for text in problems] == ["node a", "6 slots (4-9) claimed by no node"]


def test_two_wrapped_ranges_are_a_broken_table_whose_holes_are_nobodys() -> None:
    parsed, problems = parse_table(table(node("a", (4095, 0)), node("b", (4094, 0))))
    assert parsed.slots == ("a",) + (None,) * 4093 + ("b", "a")
    assert len(problems) == 4


def test_duplicates_are_the_lowest_names_in_any_order() -> None:
    nodes = [node("b", (0, 100)), node("a", (50, 4095)), node("c", (0, 4095))]
    first, problems = parse_table(table(*nodes))
    second, _ = parse_table(table(*reversed(nodes)))
    assert first.is_same_as(second)
    assert first.slots == ("b",) * 50 + ("a",) * 4046
    assert problems == ("4096 slots (0-4095) claimed more than once: the node whose name sorts first has them",)


def test_holes_are_shared_out_alike_by_everybody_and_filling_them_moves_nothing_else() -> None:
    holed, problems = parse_table(table(node("b", (3000, 4095)), node("a", (0, 999)), node("c") | {"slots": None}))
    assert problems == ("2000 slots (1000-2999) claimed by no node: their blocks are spread over all nodes",)
    ring = SlotRing(holed, "redis")
    shares = Counter(ring.node_of(key_of(slot)) for slot in range(1000, 3000))
    assert all(550 < shares[name] < 800 for name in "abc"), shares
    assert {ring.node_of(key_of(slot)) for slot in range(1000)} == {"a"}
    made = make_table(8, holed.nodes)
    assert [ring.node_of(key_of(slot)) for slot in range(1000, 3000)] == list(made.slots[1000:3000])


def test_a_table_without_any_slot_is_all_holes() -> None:
    parsed, problems = parse_table(table(node("a") | {"slots": None}, node("b")))
    assert parsed.slots == (None,) * SLOTS
    assert len(problems) == 1
    assert set(SlotRing(parsed, "redis").nodes_of(KEYS)) == {"a", "b"}


def test_slots_beyond_the_last_are_ignored() -> None:
    parsed, problems = parse_table(table(node("a", (0, 4095), (4096, 6000)), node("b", (4000, 10**9))))
    assert parsed.slots == ("a",) * SLOTS
    assert problems[0].startswith("2 ranges go beyond slots 0 to 4095")
    assert "96 slots (4000-4095) claimed more than once" in problems[1]


def test_a_node_listed_twice_at_one_address_has_both_its_parts() -> None:
    parsed, problems = parse_table(table(node("a", (0, 9)), node("b", (10, 4000)), node("a", (4001, 4095))))
    assert parsed.slots == ("a",) * 10 + ("b",) * 3991 + ("a",) * 95
    assert problems == ("node a is there twice: its slots are taken together",)


def test_two_names_at_one_address_are_reported() -> None:
    parsed, problems = parse_table(table(node("a", (0, 9), addr="10.0.0.1"), node("b", (10, 4095), addr="10.0.0.1")))
    assert len(parsed.nodes) == 2
    assert problems == ("nodes a and b have the same address, 10.0.0.1:12345",)


def test_without_a_version_it_is_0() -> None:
    parsed, problems = parse_table(GOOD.replace(b'"version"', b'"versoin"'))
    assert parsed.version == 0
    assert problems == ("the table has no version",)


# ---------------------------------------------------------------- refusals


def without(field: str) -> bytes:
    broken = node("kv-0", (0, 4095))
    del broken[field]
    return table(broken)


MALFORMED = {
    "nothing": (b"", "truncated"),
    "a list": (b"[]", "Expected `object`, got `array`"),
    "null": (b"null", "got `null`"),
    "not JSON": (b"hello", "malformed"),
    "half of it": (GOOD[:-30], "truncated|malformed"),
    "bytes after it": (GOOD + b"}", "trailing"),
    "wrong UTF-8": (GOOD.replace(b"kv-1", b"kv-\xff"), "utf-8"),
    "half a surrogate": (GOOD.replace(b"kv-1", b"kv-\\ud800"), "surrogate"),
    "deeply nested": (b'{"x":' * 100_000, "recursion"),
    "huge": (GOOD + b" " * MOST_BYTES, "larger than 1 MiB"),
    "no nodes": (table(), "length >= 1"),
    "no list of nodes": (b'{"version": 1}', "required field `nodes`"),
    "nodes null": (b'{"nodes": null, "version": 1}', "got `null`"),
    "a node that is a string": (b'{"nodes": ["kv-0"], "version": 1}', r"got `str` - at `\$\.nodes\[0\]`"),
    "too many nodes": (table(*(node(f"n{i}", addr="h") for i in range(MOST_NODES + 1))), "length <= 1024"),
    "no name": (without("name"), "required field `name`"),
    "no addr": (without("addr"), "required field `addr`"),
    "no port": (without("port"), "required field `port`"),
    "no slots": (without("slots"), "required field `slots`"),
    "slots are numbers": (table(node("a") | {"slots": [1, 2]}), r"got `int` - at `\$\.nodes\[0\]\.slots\[0\]`"),
    "a slot without end": (table(node("a") | {"slots": [{"start": 1}]}), "required field `end`"),
    "a slot as a string": (table(node("a") | {"slots": [{"start": "1", "end": 2}]}), "Expected `int`, got `str`"),
    "a slot below 0": (table(node("a", (-1, 5))), ">= 0"),
    "a slot beyond all numbers": (table(node("a", (0, 10**40))), "int"),
    "ranges without end": (table(node("a", *[(0, 4095)] * 5000)), "5000 times over"),
    "port as a string": (table(node("a", (0, 4095), port="12345")), "Expected `int`, got `str`"),
    "port 0": (table(node("a", (0, 4095), port=0)), ">= 1"),
    "port too large": (table(node("a", (0, 4095), port=65536)), "<= 65535"),
    "port true": (table(node("a", (0, 4095), port=True)), "got `bool`"),
    "version as a string": (table(node("a", (0, 4095)), version="7"), "version"),
    "version below 0": (table(node("a", (0, 4095)), version=-1), ">= 0"),
    "version null": (table(node("a", (0, 4095)), version=None), "got `null`"),
    "a name with a newline": (table(node("a\nb", (0, 4095))), "no name of a node"),
    "an empty name": (table(node("a", (0, 4095)) | {"name": ""}), "length >= 1"),
    "a long name": (table(node("a" * 254, (0, 4095))), "length <= 253"),
    "an empty addr": (table(node("a", (0, 4095), addr="")), "neither a host name nor"),
    "an addr that is a URL": (table(node("a", (0, 4095), addr="redis://x")), "neither a host name nor"),
    "an addr with a user": (table(node("a", (0, 4095), addr="me@10.0.0.1")), "neither a host name nor"),
    "an addr without end": (table(node("a", (0, 4095), addr="x" * 10_000)), "neither a host name nor"),
    "an addr with a port": (table(node("a", (0, 4095), addr="10.0.0.1:1")), "neither a host name nor"),
    "an addr out of range": (table(node("a", (0, 4095), addr="10.0.0.300")), "neither a host name nor"),
    "one name, two addresses": (table(node("a", (0, 9)), node("a", (10, 4095), addr="10.9.9.9")), "two nodes named a"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_what_cannot_be_a_table_is_refused_clearly(what: str) -> None:
    data, text = MALFORMED[what]
    with pytest.raises(TableError, match=text) as refused:
        parse_table(data)
    assert len(str(refused.value)) < 300


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda it: json.dumps(it).encode()))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    with pytest.raises(TableError):
        parse_table(data)
    version_of(data)


_RANGE = st.fixed_dictionaries({"start": st.integers(-2, 5000), "end": st.integers(-2, 5000)})
_NODE = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["a", "b", "c", ""]),
        "addr": st.sampled_from(["10.0.0.1", "h", "::1", "?"]),
        "port": st.sampled_from([1, 12345, 0, "1"]),
        "slots": st.none() | st.lists(_RANGE, max_size=5),
    }
)


@settings(deadline=None, max_examples=50)
@given(st.lists(_NODE, max_size=4), st.integers(-1, 5))
def test_whatever_is_accepted_gives_every_key_a_node(nodes: list[dict[str, Any]], version: int) -> None:
    try:
        parsed, problems = parse_table(table(*nodes, version=version))
    except TableError:
        return
    claims = Counter(
        slot % SLOTS
        for given in nodes
        for part in given["slots"] or ()
        if part["start"] < SLOTS
        for end in [min(part["end"], SLOTS - 1)]
        for slot in range(part["start"], end + 1 + SLOTS * (part["start"] > end))
    )
    is_wrapped = any(part["end"] < part["start"] < SLOTS for given in nodes for part in given["slots"] or ())
    for slot in range(0, SLOTS, 7):
        assert (parsed.slots[slot] is None) <= (claims[slot] == 0)
        assert is_wrapped or (parsed.slots[slot] is None) == (claims[slot] == 0)
    assert (set(claims.values()) != {1} or len(claims) < SLOTS) <= bool(problems)
    assert set(SlotRing(parsed, "redis").nodes_of(KEYS[:500])) <= {"a", "b", "c"}


@pytest.mark.parametrize(("data", "version"), [(GOOD, 7), (b'{"nodes": 3, "version": 12}', 12), (b"[]", None), (b"{}", None), (b"", None)])
def test_the_version_of_a_broken_table(data: bytes, version: int | None) -> None:
    assert version_of(data) == version


# ---------------------------------------------------------------- writing


def members(count: int) -> list[TableNode]:
    return [TableNode(f"kv-{index}", f"10.0.{index // 256}.{index % 256}", 12345) for index in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 16, 700])
def test_what_is_written_is_read_back_by_us_and_by_aibrix(count: int) -> None:
    made = make_table(3, members(count)[::-1])
    data = render_table(made)
    assert parse_table(data) == (made, ())
    # All slots are there, so position and number are the same, for readers that go by position.
    theirs = aibrix_slots(data)
    assert [slot for slot, _ in theirs] == list(range(SLOTS))
    assert [name for _, name in theirs] == list(made.slots)
    assert set(json.loads(data)) == {"nodes", "version"}
    assert {frozenset(written) for written in json.loads(data)["nodes"]} == {frozenset({"name", "addr", "port", "slots"})}
    assert None not in [written["slots"] for written in json.loads(data)["nodes"]]


@pytest.mark.parametrize("count", range(2, 9))
def test_slots_that_move_go_to_the_new_node(count: int) -> None:
    before, after = make_table(1, members(count - 1)).slots, make_table(2, members(count)).slots
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {f"kv-{count - 1}"}
    assert abs(len(moved) - SLOTS / count) < 5 * (SLOTS / count) ** 0.5


def test_ipv6_is_written_plainly() -> None:
    made = make_table(1, [TableNode("a", "fd00::2", 1)])
    assert json.loads(render_table(made)) == {
        "nodes": [{"name": "a", "addr": "fd00::2", "port": 1, "slots": [{"start": 0, "end": 4095}]}],
        "version": 1,
    }


@pytest.mark.parametrize("nodes", [[], members(2) + members(1), members(MOST_NODES + 1)])
def test_no_table_of_nonsense_is_made(nodes: list[TableNode]) -> None:
    with pytest.raises(MisuseError, match="a table has 1 to 1024 nodes"):
        make_table(1, nodes)


def test_tables_are_compared_without_their_versions() -> None:
    made = make_table(1, members(2))
    assert made.is_same_as(make_table(2, members(2)))
    assert not made.is_same_as(make_table(1, members(3)))
    assert not made.is_same_as(NodesTable(1, (made.nodes[0], TableNode("kv-1", "elsewhere", 1)), made.slots))
