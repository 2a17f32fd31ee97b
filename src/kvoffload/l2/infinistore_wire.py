"""The messages of InfiniStore's TCP protocol, and the pointer under which we publish a value. No I/O.

A request is a header of nine bytes (``u32`` magic, op, ``u32`` length of the body; little-endian), the body, and for a put the value.
A reply begins with an ``i32`` code. Source: ``src/protocol.h``, ``src/*.fbs`` and ``src/infinistore.cpp`` of bytedance/InfiniStore.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import flatbuffers

from kvoffload.errors import InternalError, MisuseError

MAGIC = 0xDEADBEEF
HEADER = struct.Struct("<IcI")
EXIST, DELETE, PAYLOAD = b"C", b"X", b"L"
PUT, GET = b"P", b"G"
MOST_VALUE_BYTES = (1 << 31) - 1  # the length is a signed 32-bit field

MOST_PART_BYTES = 2 << 20
"""The most that is ever put or got at once: of a longer answer the server may take the reader's next request for a part of the last one,
and then answers nobody ever again."""
PART_UNIT_BYTES = 64 << 10
"""What a server with default settings allocates at a time."""
PART_DIGITS = 4
MOST_PARTS = 16**PART_DIGITS

POINTER = struct.Struct("<8sQ16sQI4x")
"""What is stored under a block's name: magic and version, length of the value, nonce in hex, length of its parts but for the last, CRC-32
of these 40 bytes, padding."""
POINTER_MAGIC = b"kvoptr\x00\x02"
_CHECKED = struct.Struct("<8sQ16sQ")
POINTER_CHECKED_BYTES = _CHECKED.size
NONCE_BYTES = 16


class Code(IntEnum):
    """Codes that a server answers with, of which we expect only some."""

    FINISHED = 200
    ABSENT = 404
    FULL = 507


@dataclass(frozen=True, slots=True)
class Template:
    """A request for a key of one length and a value of one length: everything before the key, and everything behind it."""

    head: bytes
    tail: bytes

    def fill(self, key: bytes) -> bytes:
        """The whole request, header and body. ``key`` must be of the template's length."""
        return self.head + key + self.tail


@lru_cache(maxsize=1024)
def payload_template(op: bytes, key_bytes: int, value_bytes: int) -> Template:
    """`PUT` or `GET` of a key of ``key_bytes``; ``value_bytes`` is 0 for a get. Raises MisuseError for what the protocol cannot say.

    flatbuffers costs tens of microseconds a message in Python. How long a message is, and where its key stands, depends on the
    lengths alone: two messages of the library's that differ in every byte of their keys show where, and a third is the proof.
    """
    if key_bytes < 1 or not 0 <= value_bytes <= MOST_VALUE_BYTES:
        raise MisuseError(f"InfiniStore cannot hold {value_bytes} bytes under a name of {key_bytes} bytes")
    first, second = (_payload_body(op, bytes([byte]) * key_bytes, value_bytes) for byte in (0x01, 0xFE))
    place = next(index for index, (one, other) in enumerate(zip(first, second, strict=True)) if one != other)
    header = HEADER.pack(MAGIC, PAYLOAD, len(first))
    template = Template(header + first[:place], first[place + key_bytes :])
    probe = bytes(1 + index % 251 for index in range(key_bytes))
    if template.fill(probe) != header + _payload_body(op, probe, value_bytes):
        raise InternalError(
            f"a message of {key_bytes} key bytes is not laid out as expected; is flatbuffers {flatbuffers.__version__} new?"
        )
    return template


def _payload_body(op: bytes, key: bytes, value_bytes: int) -> bytes:
    """``table TCPPayloadRequest { key: string; value_length: int; op: byte; }``"""
    builder = flatbuffers.Builder(len(key) + 64)
    name = builder.CreateString(key)
    builder.StartObject(3)
    builder.PrependUOffsetTRelativeSlot(0, name, 0)
    builder.PrependInt32Slot(1, value_bytes, 0)
    builder.PrependInt8Slot(2, op[0], 0)
    builder.Finish(builder.EndObject())
    return bytes(builder.Output())


def exist_request(key: bytes) -> bytes:
    """Answered with two ``i32``: the code, and 0 where there is such a key, 1 where there is none."""
    return HEADER.pack(MAGIC, EXIST, len(key)) + key


def delete_request(keys: Sequence[bytes]) -> bytes:
    """``table DeleteKeysRequest { keys: [string]; }``, answered with two ``i32``: the code, and how many keys there were."""
    builder = flatbuffers.Builder(1024)
    names = [builder.CreateString(key) for key in keys]
    builder.StartVector(4, len(names), 4)
    for name in reversed(names):
        builder.PrependUOffsetTRelative(name)
    vector = builder.EndVector()
    builder.StartObject(1)
    builder.PrependUOffsetTRelativeSlot(0, vector, 0)
    builder.Finish(builder.EndObject())
    body = bytes(builder.Output())
    return HEADER.pack(MAGIC, DELETE, len(body)) + body


@dataclass(frozen=True, slots=True)
class Pointer:
    """Where the value of a name is: in parts under ``<name>:<nonce><part>``, ``value_bytes`` long all together."""

    nonce: bytes
    value_bytes: int
    part_bytes: int

    def keys(self, name: bytes) -> list[bytes]:
        """Of all parts."""
        return [value_key(name, self.nonce, part) for part in range(-(-self.value_bytes // self.part_bytes))]


def part_bytes_of(value_bytes: int) -> int:
    """How long the parts are that we put a value in, but for the last: few, about equal, and without waste of the server's memory."""
    count = max(1, -(-value_bytes // MOST_PART_BYTES))
    return max(1, -(-value_bytes // (count * PART_UNIT_BYTES))) * PART_UNIT_BYTES


def pack_pointer(nonce: bytes, value_bytes: int, part_bytes: int | None = None) -> bytes:
    """`POINTER.size` bytes. ``part_bytes`` is `part_bytes_of` the value unless given."""
    checked = _CHECKED.pack(POINTER_MAGIC, value_bytes, nonce, part_bytes or part_bytes_of(value_bytes))
    return checked + zlib.crc32(checked).to_bytes(8, "little")


def parse_pointer(data: bytes) -> Pointer | None:
    """None for anything that `pack_pointer` does not make, and for parts too long or too many to be read."""
    if len(data) != POINTER.size:
        return None
    _, value_bytes, nonce, part_bytes, _ = POINTER.unpack(data)
    if not 0 < part_bytes <= MOST_PART_BYTES or value_bytes > part_bytes * MOST_PARTS:
        return None
    return Pointer(nonce, value_bytes, part_bytes) if pack_pointer(nonce, value_bytes, part_bytes) == data else None


def new_nonces(count: int) -> list[bytes]:
    """Each sixteen hex digits that no put has used: a value's key is put once, ever, by anybody."""
    digits = os.urandom(NONCE_BYTES // 2 * count).hex().encode()
    return [digits[place : place + NONCE_BYTES] for place in range(0, len(digits), NONCE_BYTES)]


def value_key(name: bytes, nonce: bytes, part: int = 0) -> bytes:
    """The key of a part of a value, by its name and its pointer's nonce."""
    return b"%b:%b%0*x" % (name, nonce, PART_DIGITS, part)
