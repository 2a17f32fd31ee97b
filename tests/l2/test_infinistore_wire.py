"""Messages of the InfiniStore protocol against the flatbuffers library's own reader, and the pointer against damage."""

from __future__ import annotations

import string
import struct
import zlib

import flatbuffers
import numpy as np
import pytest
from flatbuffers import number_types
from hypothesis import given
from hypothesis import strategies as st

from kvoffload.errors import MisuseError
from kvoffload.l2 import infinistore_native as native
from kvoffload.l2 import infinistore_wire as wire


def table_of(request: bytes, op: bytes) -> flatbuffers.table.Table:
    """The body's root, once the header has been checked."""
    magic, said, length = wire.HEADER.unpack_from(request)
    assert (magic, said, length) == (wire.MAGIC, op, len(request) - wire.HEADER.size)
    body = bytearray(request[wire.HEADER.size :])
    return flatbuffers.table.Table(body, flatbuffers.encode.Get(number_types.UOffsetTFlags.packer_type, body, 0))


@given(
    st.sampled_from([wire.PUT, wire.GET]),
    st.text(string.printable, min_size=1, max_size=300),
    st.integers(0, wire.MOST_VALUE_BYTES),
)
def test_a_filled_template_says_what_it_should(op: bytes, key: str, value_bytes: int) -> None:
    name = key.encode()
    table = table_of(wire.payload_template(op, len(name), value_bytes).fill(name), wire.PAYLOAD)
    assert table.String(table.Offset(4) + table.Pos) == name
    length = table.Offset(6)
    assert (table.Get(number_types.Int32Flags, length + table.Pos) if length else 0) == value_bytes
    assert table.Get(number_types.Int8Flags, table.Offset(8) + table.Pos) == op[0]


@pytest.mark.parametrize(("key_bytes", "value_bytes"), [(0, 1), (5, -1), (5, 1 << 31)])
def test_what_the_protocol_cannot_say(key_bytes: int, value_bytes: int) -> None:
    with pytest.raises(MisuseError):
        wire.payload_template(wire.PUT, key_bytes, value_bytes)


def test_exist_has_the_bare_key() -> None:
    assert wire.exist_request(b"abc") == bytes.fromhex("efbeadde") + b"C" + bytes([3, 0, 0, 0]) + b"abc"


@given(st.lists(st.binary(min_size=1, max_size=100), max_size=20))
def test_delete_lists_the_keys(keys: list[bytes]) -> None:
    table = table_of(wire.delete_request(keys), wire.DELETE)
    vector = table.Offset(4)
    assert table.VectorLen(vector) == len(keys)
    assert [table.String(table.Vector(vector) + 4 * index) for index in range(len(keys))] == keys


def is_pointer_to_the_loops(data: bytes) -> bool:
    """The same check as the compiled loops make."""
    return bool(native._check_pointer(np.frombuffer(data, np.int64).reshape(1, -1), 0))


@given(st.integers(0, wire.MOST_VALUE_BYTES), st.integers(0, wire.POINTER.size - 1), st.integers(1, 255))
def test_a_pointer_and_every_byte_of_it_changed(value_bytes: int, place: int, change: int) -> None:
    (nonce,) = wire.new_nonces(1)
    data = bytearray(wire.pack_pointer(nonce, value_bytes))
    assert wire.parse_pointer(bytes(data)) == wire.Pointer(nonce, value_bytes, wire.part_bytes_of(value_bytes))
    assert is_pointer_to_the_loops(bytes(data))
    data[place] ^= change
    assert wire.parse_pointer(bytes(data)) is None
    assert not is_pointer_to_the_loops(bytes(data))


@pytest.mark.parametrize(
    "data", [b"", b"x", bytes(wire.POINTER.size), wire.pack_pointer(b"0" * 16, 5) + b"\0", b"\xff" * wire.POINTER.size]
)
def test_no_pointer(data: bytes) -> None:
    assert wire.parse_pointer(data) is None


@pytest.mark.parametrize(
    ("value_bytes", "part_bytes"), [(5, 0), (5, wire.MOST_PART_BYTES + 1), (5, 1 << 63), (wire.MOST_PARTS + 1, 1), (1 << 62, 1 << 20)]
)
def test_a_pointer_to_parts_that_cannot_be_read(value_bytes: int, part_bytes: int) -> None:
    checked = struct.pack("<8sQ16sQ", wire.POINTER_MAGIC, value_bytes, b"0" * wire.NONCE_BYTES, part_bytes)
    data = checked + zlib.crc32(checked).to_bytes(8, "little")
    assert wire.parse_pointer(data) is None
    cells = np.frombuffer(data, np.int64).reshape(1, -1)
    assert native._check_pointer(cells, 0)
    assert not native._may_follow(cells, 0)


@given(st.integers(1, wire.MOST_VALUE_BYTES))
def test_parts_are_few_and_waste_no_memory(value_bytes: int) -> None:
    part_bytes = wire.part_bytes_of(value_bytes)
    assert 0 < part_bytes <= wire.MOST_PART_BYTES
    assert part_bytes % wire.PART_UNIT_BYTES == 0
    count = -(-value_bytes // part_bytes)
    assert count == -(-value_bytes // wire.MOST_PART_BYTES) <= wire.MOST_PARTS
    assert len(wire.Pointer(b"0" * 16, value_bytes, part_bytes).keys(b"name")) == count


@given(st.binary(min_size=1, max_size=20), st.integers(0, wire.MOST_PARTS - 1))
def test_the_loops_name_parts_as_we_do(name: bytes, part: int) -> None:
    (nonce,) = wire.new_nonces(1)
    arena = np.frombuffer(bytearray(name + b":" + bytes(wire.NONCE_BYTES + wire.PART_DIGITS)), np.uint8)
    cells = np.frombuffer(wire.pack_pointer(nonce, 5), np.int64).reshape(1, -1)
    native._name_part(arena, len(name) + 1, cells, 0, part)
    assert arena.tobytes() == wire.value_key(name, nonce, part)


def test_nonces_differ() -> None:
    nonces = wire.new_nonces(1000)
    assert len(set(nonces)) == 1000
    assert all(len(nonce) == wire.NONCE_BYTES and int(nonce, 16) >= 0 for nonce in nonces)
    assert not set(nonces) & set(wire.new_nonces(1000))
    assert wire.new_nonces(0) == []
