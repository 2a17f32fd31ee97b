"""The namespace: a digest of all that determines KV bytes beside the tokens and a request's own extras.

Two engines share blocks only where their namespaces are equal. Who collects the items is `kvoffload.connector.identity`; here is
only the canonical form they are hashed in.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping

from kvoffload.errors import MisuseError

_PERSON = b"kvoffload.ns.1"  # the format's version: another one gives other namespaces
_MAX_DEPTH = 64


def namespace_digest(items: Mapping[str, object]) -> bytes:
    """24 bytes that are equal for equal items, whatever their order, and that differ where any value or its type does.

    Values are what JSON has, and bytes. 1, 1.0, True and "1" are four values; a list and a tuple are the same, and so are all NaNs.
    `MisuseError` names the item that is none of these.
    """
    return hashlib.blake2b(canonical_bytes(items), digest_size=24, person=_PERSON).digest()


def canonical_bytes(items: Mapping[str, object]) -> bytes:
    """What is hashed: a tag per value, each of known or stated length, mappings sorted by key. No two values share these bytes."""
    out: list[bytes] = []
    _encode(items, "", 0, out)
    return b"".join(out)


def _encode(value: object, path: str, depth: int, out: list[bytes]) -> None:
    if depth > _MAX_DEPTH:
        raise MisuseError(f"namespace item {path[:80]}... is nested deeper than {_MAX_DEPTH} levels: give a flat summary of it")
    # bool before int, of which it is a kind
    if value is None:
        out.append(b"n")
    elif isinstance(value, bool):
        out.append(b"t" if value else b"f")
    elif isinstance(value, int):
        _sized(b"i", b"%d" % value, out)
    elif isinstance(value, float):
        out.append(b"d" + struct.pack(">d", math.nan if math.isnan(value) else value))
    elif isinstance(value, str):
        _sized(b"s", _utf8(value, path), out)
    elif isinstance(value, bytes | bytearray):
        _sized(b"b", bytes(value), out)
    elif isinstance(value, list | tuple):
        out.append(b"l%d:" % len(value))
        for index, item in enumerate(value):
            _encode(item, f"{path}[{index}]", depth + 1, out)
    elif isinstance(value, Mapping):
        _encode_mapping(value, path, depth, out)
    else:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise MisuseError(
            f"namespace item {path or '(root)'} is a {kind}: turn it into str, int, float, bool, bytes, None, a list or a dict"
        )


def _encode_mapping(value: Mapping[object, object], path: str, depth: int, out: list[bytes]) -> None:
    entries: list[tuple[bytes, str, object]] = []
    for name, item in value.items():
        if not isinstance(name, str):
            raise MisuseError(f"namespace item {path or '(root)'} has the key {name!r}: keys are strings")
        entries.append((_utf8(name, path), name, item))
    entries.sort(key=lambda entry: entry[0])
    out.append(b"m%d:" % len(entries))
    for encoded, name, item in entries:
        _sized(b"s", encoded, out)
        _encode(item, f"{path}.{name}" if path else name, depth + 1, out)


def _sized(tag: bytes, data: bytes, out: list[bytes]) -> None:
    out.append(b"%b%d:" % (tag, len(data)))
    out.append(data)


def _utf8(text: str, path: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise MisuseError(f"namespace item {path or '(root)'} holds {text!r}, which is no valid Unicode text: give it as bytes") from None
