"""The bytes on the link: typed, bounded frames; nothing here does I/O, and nothing but `PeerError` comes out of bytes from a peer.

A frame is ``length: uint32 little-endian | tag: uint8 | payload``; length counts tag and payload, at most `MAX_FRAME_BYTES`. The
payload is a msgpack array of the message's fields, in order, decoded strictly by their types. A message longer than a frame
travels as frames with the tag `MORE`, each a piece of the payload, and then one with its own; at most `MAX_MESSAGE_BYTES` in all.
A grant takes at most 19 bytes per block: 500 blocks are 10 KB, a frame holds some 55,000 and a message 16 times as many.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import GenericAlias
from typing import Any, get_type_hints

import msgspec

from kvoffload.errors import MisuseError, PeerError
from kvoffload.messages import LINK_MESSAGES

MAX_FRAME_BYTES = 1 << 20
MAX_MESSAGE_BYTES = 16 << 20
HEADER_BYTES = 5
MORE = 253


@dataclass(frozen=True, slots=True)
class Beat:
    """The sender's loop is alive."""


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The sender closes the link on purpose."""

    reason: str


@dataclass(frozen=True, slots=True)
class Knock:
    """The hub's first words: what it speaks, and that it was told the token."""

    version: int
    token: bytes


@dataclass(frozen=True, slots=True)
class Hello:
    """What the worker half of ``rank`` has; with it go the descriptors of its segment (memfd) and of its process (pidfd)."""

    version: int
    rank: int
    pid: int
    layout_digest: bytes
    payload_bytes: int
    slot_bytes: int
    capacity_slots: int
    num_blocks: int
    namespace: bytes


@dataclass(frozen=True, slots=True)
class Welcome:
    """The hub's answer; with it goes the descriptor of the block ledger (memfd)."""

    num_blocks: int


_TAGS: dict[type, int] = {kind: tag for tag, kind in enumerate(LINK_MESSAGES)}
_TAGS |= {Knock: 250, Hello: 251, Welcome: 252, Goodbye: 254, Beat: 255}


class _Codec:
    """Between one kind of message and the msgpack array of its fields."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.names = tuple(field.name for field in fields(kind))
        hints = get_type_hints(kind)
        # A tuple and not the dataclass: shorter, and msgspec would skip fields it does not know.
        shape: Any = GenericAlias(tuple, tuple(hints[name] for name in self.names))
        self.decoder: msgspec.msgpack.Decoder[tuple[Any, ...]] = msgspec.msgpack.Decoder(shape)

    def encode(self, message: object) -> bytes:
        try:
            return msgspec.msgpack.encode([getattr(message, name) for name in self.names])
        except (TypeError, OverflowError) as error:
            raise MisuseError(f"a {self.kind.__name__} holds what cannot cross the link: {error}") from error

    def decode(self, payload: bytes | bytearray | memoryview) -> object:
        try:
            return self.kind(*self.decoder.decode(payload))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise PeerError(f"a malformed {self.kind.__name__} of {len(payload)} bytes on the link: {error}") from error


_CODECS = {tag: _Codec(kind) for kind, tag in _TAGS.items()}


def encode(message: object) -> bytes:
    """The frame or frames of a message. Raises `MisuseError` for another kind or value, or one longer than `MAX_MESSAGE_BYTES`."""
    tag = _TAGS.get(type(message))
    if tag is None:
        raise MisuseError(f"a {type(message).__name__} does not cross the link: see LINK_MESSAGES")
    payload = _CODECS[tag].encode(message)
    room = MAX_FRAME_BYTES - 1
    if len(payload) <= room:
        return _frame(tag, payload)
    if len(payload) > MAX_MESSAGE_BYTES:
        name = type(message).__name__
        raise MisuseError(f"a {name} of {len(payload)} bytes is too long for the link ({MAX_MESSAGE_BYTES}): send several")
    pieces = [payload[at : at + room] for at in range(0, len(payload), room)]
    return b"".join([*(_frame(MORE, piece) for piece in pieces[:-1]), _frame(tag, pieces[-1])])


def _frame(tag: int, payload: bytes) -> bytes:
    return (1 + len(payload)).to_bytes(4, "little") + bytes([tag]) + payload


def frame_bytes(header: bytes | bytearray) -> int:
    """Bytes that follow this header of `HEADER_BYTES`. Raises `PeerError` if they are too many, or not even a tag is there."""
    length = int.from_bytes(header[:4], "little")
    if not 1 <= length <= MAX_FRAME_BYTES:
        raise PeerError(f"a frame of {length} bytes on the link: a frame has 1 to {MAX_FRAME_BYTES}")
    return length - 1


def decode(tag: int, payload: bytes | bytearray | memoryview) -> object:
    """One whole message. Raises `PeerError` for an unknown tag or a payload that does not fit it."""
    codec = _CODECS.get(tag)
    if codec is None:
        raise PeerError(f"unknown tag {tag} on the link: does the peer run another version of kvoffload?")
    return codec.decode(payload)


class FrameDecoder:
    """Bytes as they come, in any pieces, into messages. After a `PeerError` it must not be used any more."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._pieces = bytearray()

    def feed(self, data: bytes) -> list[object]:
        """The messages that ``data`` completes. Keeps at most one frame and `MAX_MESSAGE_BYTES` of pieces. Raises `PeerError`."""
        buffer = self._buffer
        buffer += data
        messages: list[object] = []
        start = 0
        while len(buffer) - start >= HEADER_BYTES:
            end = start + HEADER_BYTES + frame_bytes(buffer[start : start + HEADER_BYTES])
            if len(buffer) < end:
                break
            self._frame(buffer[start + 4], bytes(buffer[start + HEADER_BYTES : end]), messages)
            start = end
        del buffer[:start]
        return messages

    def _frame(self, tag: int, payload: bytes, messages: list[object]) -> None:
        if tag == MORE:
            if len(self._pieces) + len(payload) > MAX_MESSAGE_BYTES:
                raise PeerError(f"a message of more than {MAX_MESSAGE_BYTES} bytes on the link")
            self._pieces += payload
            return
        if self._pieces:
            self._pieces += payload
            payload = bytes(self._pieces)
            self._pieces.clear()
        messages.append(decode(tag, payload))
