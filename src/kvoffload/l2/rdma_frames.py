"""What a node and its child process say to each other: typed, bounded, one message a packet; nothing here does I/O.

A packet (SOCK_SEQPACKET) is a msgpack array, the kind of the message and its fields in order, decoded strictly by their types.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from kvoffload.errors import MisuseError, PeerError

PROTOCOL_VERSION = 1
MAX_PACKET_BYTES = 96 << 10
"""Less than half of a unix socket's default buffer, so that a packet always fits."""
MOST_VALUES = 256
"""In a `Move`; and names in a `Find` are as many as fit."""
MOST_NAME_BYTES = 64 << 10
"""Of all names in one message."""

Natural = Annotated[int, Meta(ge=0)]


class Setup(Struct, frozen=True, array_like=True, tag="setup", forbid_unknown_fields=True):
    """To the child, first; with it go the descriptors of the segments (memfds). ``regions``: of each segment, bytes, and bytes per region.

    ``device`` may be empty: the native client takes the first there is. ``gid_index`` -1: it finds one.
    """

    version: int
    host: str
    port: int
    device: str
    gid_index: int
    link_type: str
    ib_port: int
    connect_timeout_s: float
    regions: list[tuple[Natural, Natural]]
    sysfs: str


class Connect(Struct, frozen=True, array_like=True, tag="connect", forbid_unknown_fields=True):
    """To the child, after `NotConnected`: try again."""


class Find(Struct, frozen=True, array_like=True, tag="find", forbid_unknown_fields=True):
    """To the child: which of these does the server have? Answered by `Answer`, a 1 or a 0 for each."""

    call: Natural
    names: list[str]


class Move(Struct, frozen=True, array_like=True, tag="move", forbid_unknown_fields=True):
    """To the child: read into, or write from, the places in the segments: (segment, offset) for each name, of ``value_bytes`` all.

    Answered by `Answer`, an `Outcome` for each; nothing touches those places after it.
    """

    call: Natural
    is_write: bool
    value_bytes: Natural
    names: list[str]
    places: list[tuple[Natural, Natural]]


class Withdraw(Struct, frozen=True, array_like=True, tag="withdraw", forbid_unknown_fields=True):
    """To the child: begin nothing more for this call. It is answered all the same, soon."""

    call: Natural


class Connected(Struct, frozen=True, array_like=True, tag="connected", forbid_unknown_fields=True):
    """From the child; ``note`` is for the log, empty where all is as it was wished."""

    note: str


class NotConnected(Struct, frozen=True, array_like=True, tag="not connected", forbid_unknown_fields=True):
    """From the child: the server's port cannot be reached. It waits for `Connect`."""

    reason: str


class Answer(Struct, frozen=True, array_like=True, tag="answer", forbid_unknown_fields=True):
    """From the child, once for each `Find` and `Move`: a byte for each name. ``trouble`` is for the log."""

    call: Natural
    codes: bytes
    trouble: str


class Broken(Struct, frozen=True, array_like=True, tag="broken", forbid_unknown_fields=True):
    """The child's last words before it ends: what runs is not answered, it is over when the process is gone."""

    reason: str


ToChild = Setup | Connect | Find | Move | Withdraw
FromChild = Connected | NotConnected | Answer | Broken

_T = TypeVar("_T")
_to_child: msgspec.msgpack.Decoder[ToChild] = msgspec.msgpack.Decoder(ToChild)
_from_child: msgspec.msgpack.Decoder[FromChild] = msgspec.msgpack.Decoder(FromChild)


def encode(message: ToChild | FromChild) -> bytes:
    """One packet. Raises MisuseError for a message longer than `MAX_PACKET_BYTES`, or a value of the wrong type."""
    try:
        packet = msgspec.msgpack.encode(message)
    except (TypeError, ValueError, OverflowError) as error:  # a name may hold what UTF-8 cannot
        raise MisuseError(f"a {type(message).__name__} holds what cannot be sent to a child process: {error}") from error
    if len(packet) > MAX_PACKET_BYTES:
        raise MisuseError(f"a {type(message).__name__} of {len(packet)} bytes: a packet has at most {MAX_PACKET_BYTES}")
    return packet


def decode_to_child(packet: bytes) -> ToChild:
    """Raises PeerError for anything that is not one whole message to a child."""
    return _decode(_to_child, packet)


def decode_from_child(packet: bytes) -> FromChild:
    """Raises PeerError for anything that is not one whole message from a child."""
    return _decode(_from_child, packet)


def _decode(decoder: msgspec.msgpack.Decoder[_T], packet: bytes) -> _T:
    if len(packet) > MAX_PACKET_BYTES:
        raise PeerError(f"a packet of {len(packet)} bytes or more: {MAX_PACKET_BYTES} are the most")
    try:
        return decoder.decode(packet)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PeerError(f"a malformed packet of {len(packet)} bytes: {error}") from error
