"""The envelope: 64 bytes at the head of a slot that say what it holds, and prove that it holds nothing else.

Sealed when a block leaves the process, verified whenever one comes in. What is verified against is what the reader expects, so that
a value that is genuine but somebody else's is as wrong as one that is not::

    offset  bytes
         0      4  magic            "KVOB"
         4      1  version          1
         5      1  flags            bit 0: the tag is keyed
         6      2  rank             whose part of the block it is
         8      4  payload length   bytes behind the header
        12     12  namespace        the first 12 of the digest's 24 bytes
        24     24  key              of the block, whole
        48     16  tag              over the 48 bytes before it and the payload

Numbers are little-endian. The rank is in it because a block has as many parts as there are ranks, all of one key and of one length.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from enum import Enum
from hmac import compare_digest
from typing import NamedTuple, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvoffload.errors import MisuseError
from kvoffload.keys import KEY_BYTES
from kvoffload.layout import HEADER_BYTES
from kvoffload.messages import BlockKey

MAGIC = b"KVOB"
VERSION = 1
KEYED = 1
"""The flag of a keyed tag."""
TAG_BYTES = 16
NAMESPACE_BYTES = 12
MOST_RANKS = 1 << 16

_HEAD = struct.Struct(f"<4sBBHI{NAMESPACE_BYTES}s{KEY_BYTES}s")
_TAG_AT = _HEAD.size
assert _TAG_AT + TAG_BYTES == HEADER_BYTES

_PERSON = b"kvoffload.tag.1"


class Fault(Enum):
    """What is wrong with a value that came in; the value is the name in statistics. The first that applies, in this order."""

    MAGIC = "magic"
    VERSION = "version"
    FLAGS = "flags"
    """The tag is of the other kind: keyed where no secret is set, not keyed where one is, or of a kind not known."""
    NAMESPACE = "namespace"
    KEY = "key"
    RANK = "rank"
    LENGTH = "length"
    TAG = "tag"
    """Header and payload are not those that were sealed, or were sealed with another secret."""


class Part(NamedTuple):
    """One rank's part of a block: its slot, header first, uint8, at least header and payload long."""

    slot: NDArray[np.uint8]
    key: BlockKey
    rank: int = 0


class _Hash(Protocol):
    def update(self, data: memoryview | bytes, /) -> object: ...
    def digest(self) -> bytes: ...


class Envelope:
    """Seals and verifies the blocks of one namespace, all of ``payload_bytes``. Thread-safe.

    Without a ``secret`` the tag is XXH3-128: it finds accidents (truncated, mixed up, flipped bits), and nothing that somebody
    intends. With one it is BLAKE2b-128, keyed by the secret and the namespace. A value sealed the other way is a miss.

    A secret protects against whoever can write to the nodes but does not have it: values that were forged, altered, cut short or
    mixed, and genuine values offered as another key's, rank's, namespace's or length's, are all misses. It does not protect

    - against anybody who has it: all engines that share blocks do;
    - against reading: nothing is encrypted, and names on the nodes are keys;
    - against deletion, or a node that answers nothing: that is a miss, as ever;
    - against an old genuine value of the same key, rank and namespace being put back. That is harmless as long as a key determines its
      bytes, which is what keys are for.

    The bytes of a slot are checked where they lie: who may write into the memory of this process is trusted.
    """

    def __init__(self, namespace: bytes, payload_bytes: int, secret: bytes | None = None) -> None:
        """``namespace``: 24 bytes, of `namespace_digest`. ``secret``: any bytes, not empty; None for none. Raises MisuseError."""
        if len(namespace) != KEY_BYTES:
            raise MisuseError(f"a namespace digest has {KEY_BYTES} bytes, not {len(namespace)}: make it with namespace_digest()")
        if not 0 < payload_bytes < 1 << 32:
            raise MisuseError(f"a payload has 1 to {(1 << 32) - 1} bytes, not {payload_bytes}")
        if secret is not None and not secret:
            raise MisuseError("an empty secret protects nothing: give None for no secret")
        self.payload_bytes = payload_bytes
        self.value_bytes = HEADER_BYTES + payload_bytes
        """Bytes of a value: what goes over the wire."""
        self._namespace = namespace[:NAMESPACE_BYTES]
        self._flags = 0 if secret is None else KEYED
        self._before_key: dict[int, bytes] = {}
        """By rank, what a header has before its key."""
        self._new_hash: Callable[[], _Hash] = _keyed(secret, namespace).copy if secret is not None else xxhash.xxh3_128

    @property
    def is_keyed(self) -> bool:
        return bool(self._flags & KEYED)

    def seal(self, slot: NDArray[np.uint8], key: BlockKey, rank: int = 0) -> None:
        """Write the header of what lies in ``slot``; the payload is only read. The same block gives the same header, so that
        sealing it again while somebody reads it changes no byte. Raises MisuseError."""
        if len(slot) < self.value_bytes:
            raise MisuseError(f"a slot of {len(slot)} bytes holds no value of {self.value_bytes}: header and payload")
        head = self._head(key, rank)
        slot[:HEADER_BYTES] = np.frombuffer(head + self._tag(head, slot.data), np.uint8)

    def verify(self, slot: NDArray[np.uint8] | memoryview, key: BlockKey, rank: int = 0) -> Fault | None:
        """What is wrong with ``slot`` as the block ``key``, part ``rank``; None: it is that one. Changes nothing."""
        if len(slot) < self.value_bytes:
            return Fault.LENGTH
        value = slot.data if isinstance(slot, np.ndarray) else slot
        header = bytes(value[:HEADER_BYTES])
        head = self._head(key, rank)
        if compare_digest(header, head + self._tag(head, value)):
            return None
        return Fault.TAG if header[:_TAG_AT] == head else self._difference(header[:_TAG_AT], key, rank)

    def seal_all(self, parts: Sequence[Part]) -> None:
        """`seal` each. For a worker thread: the interpreter lock is free while a payload of more than 64 KiB is hashed."""
        for slot, key, rank in parts:
            self.seal(slot, key, rank)

    def verify_all(self, parts: Sequence[Part]) -> list[Fault | None]:
        """`verify` each. For a worker thread, as `seal_all`."""
        return [self.verify(slot, key, rank) for slot, key, rank in parts]

    def _head(self, key: BlockKey, rank: int) -> bytes:
        """The header before its tag."""
        before = self._before_key.get(rank)
        if before is None or len(key) != KEY_BYTES:
            if len(key) != KEY_BYTES or not 0 <= rank < MOST_RANKS:
                raise MisuseError(f"key {key.hex()} must have {KEY_BYTES} bytes, and rank {rank} be from 0 to {MOST_RANKS - 1}")
            before = _HEAD.pack(MAGIC, VERSION, self._flags, rank, self.payload_bytes, self._namespace, key)[:-KEY_BYTES]
            self._before_key[rank] = before
        return before + key

    def _tag(self, head: bytes, value: memoryview) -> bytes:
        tag = self._new_hash()
        tag.update(head)
        # update, not a function of one call: xxhash before 4.1 holds the interpreter lock in those.
        tag.update(value[HEADER_BYTES : self.value_bytes])
        return tag.digest()

    def _difference(self, head: bytes, key: BlockKey, rank: int) -> Fault:
        """Of a header that is not the expected one."""
        magic, version, flags, its_rank, length, namespace, its_key = _HEAD.unpack(head)
        checks = (
            (Fault.MAGIC, magic == MAGIC),
            (Fault.VERSION, version == VERSION),
            (Fault.FLAGS, flags == self._flags),
            (Fault.NAMESPACE, namespace == self._namespace),
            (Fault.KEY, its_key == key),
            (Fault.RANK, its_rank == rank),
            (Fault.LENGTH, length == self.payload_bytes),
        )
        return next(fault for fault, is_right in checks if not is_right)


def _keyed(secret: bytes, namespace: bytes) -> hashlib.blake2b:
    """A keyed hash before any input. Its key comes of the whole namespace, of which the header has only a part."""
    of_secret = hashlib.blake2b(secret, digest_size=64, person=_PERSON).digest()
    key = hashlib.blake2b(namespace, digest_size=64, key=of_secret, person=_PERSON).digest()
    return hashlib.blake2b(digest_size=TAG_BYTES, key=key, person=_PERSON)
