"""The namespace digest: golden vectors, order-free, typed, and never two values with the same bytes."""

from __future__ import annotations

import enum
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvoffload.errors import MisuseError
from kvoffload.namespace import canonical_bytes, namespace_digest

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.binary(max_size=5)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=8
)
ITEMS = st.dictionaries(st.text(max_size=4), VALUES, max_size=4)


def typed(value: Any) -> Any:
    """A form in which Python's == distinguishes what the digest must: types, and the sign of zero."""
    if isinstance(value, dict):
        return "dict", sorted((name, typed(item)) for name, item in value.items()).__repr__()
    if isinstance(value, list):
        return "list", [typed(item) for item in value]
    return type(value).__name__, repr(value)


GOLDEN: list[tuple[dict[str, object], str]] = [
    ({}, "d33056c97c66095075053c1a94f45689fe528d8308ef46ff"),
    (
        {"format": 1, "dtype": "bfloat16", "layers": 32, "scales": [0.5, 1.0], "weights": b"\x00\xff", "draft": None},
        "599673e7f50088ef940828fcaec094078d9bff9329a8bfb2",
    ),
    ({"parallel": {"tp": 2, "pp": 1}, "eager": True}, "4a478e4414bbe5d35a35f12abe74a865353f70e31820343e"),
]


@pytest.mark.parametrize(("items", "digest"), GOLDEN)
def test_golden_vectors(items: dict[str, object], digest: str) -> None:
    assert namespace_digest(items).hex() == digest
    assert len(namespace_digest(items)) == 24


def test_the_canonical_form_is_as_documented() -> None:
    assert canonical_bytes({"b": [1, "x"], "a": {"y": None, "x": True}}) == b"m2:s1:am2:s1:xts1:yns1:bl2:i1:1s1:x"


@given(ITEMS, st.randoms())
def test_order_does_not_matter_at_any_depth(items: dict[str, Any], random: Any) -> None:
    def shuffled(value: Any) -> Any:
        if isinstance(value, dict):
            entries = [(name, shuffled(item)) for name, item in value.items()]
            random.shuffle(entries)
            return dict(entries)
        return tuple(map(shuffled, value)) if isinstance(value, list) else value

    assert namespace_digest(shuffled(items)) == namespace_digest(items)


@given(ITEMS, ITEMS)
def test_different_items_have_different_bytes(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert (canonical_bytes(left) == canonical_bytes(right)) == (typed(left) == typed(right))


LOOKALIKES: list[object] = [
    *(1, 1.0, True, "1", b"1", [1], ["1"], {"1": None}, 0, -0.0, 0.0, False, None, "", b"", [], {}, "None", [[]], [None]),
    *(
        ["ab"],
        ["a", "b"],
        ["a", ["b"]],
        [["a"], "b"],
        {"a": {}},
        {"a": []},
        2**64,
        float(2**64),
        math.inf,
        -math.inf,
        math.nan,
        "nan",
    ),
    *(0.1, 0.1 + 2**-56, "i1:1", "é", "e\u0301"),
]


def test_values_that_look_alike_do_not_collide() -> None:
    assert len({namespace_digest({"v": value}) for value in LOOKALIKES}) == len(LOOKALIKES)


def test_subclasses_count_as_their_plain_type() -> None:
    class Kind(enum.StrEnum):
        AUTO = "auto"

    class Level(enum.IntEnum):
        ONE = 1

    assert namespace_digest({"v": [Kind.AUTO, Level.ONE]}) == namespace_digest({"v": ("auto", 1)})
    assert namespace_digest({"v": bytearray(b"x")}) == namespace_digest({"v": b"x"})


def test_all_nans_are_one() -> None:
    assert namespace_digest({"v": -math.nan}) == namespace_digest({"v": math.nan})


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({"model": {"dtype": object()}}, r"namespace item model\.dtype is a builtins\.object"),
        ({"layers": ["a", {1, 2}]}, r"namespace item layers\[1\] is a builtins\.set"),
        ({"model": {7: "x"}}, r"namespace item model has the key 7: keys are strings"),
        ({"name": "\ud800"}, r"namespace item name holds .* no valid Unicode"),
    ],
)
def test_what_has_no_canonical_form_is_named(items: dict[str, object], message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        namespace_digest(items)


def test_a_value_inside_itself_is_an_error_and_not_a_crash() -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(MisuseError, match="nested deeper than 64 levels"):
        namespace_digest({"v": loop})
