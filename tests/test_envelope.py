"""The envelope: what was sealed is found again, and anything that differs in one thing is a miss with its reason."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvoffload.envelope import Envelope, Fault, Part
from kvoffload.errors import MisuseError
from kvoffload.layout import HEADER_BYTES

NAMESPACE = hashlib.blake2b(b"model", digest_size=24).digest()
KEY = hashlib.blake2b(b"block", digest_size=24).digest()
OTHER = hashlib.blake2b(b"other", digest_size=24).digest()
PAYLOAD = 5000
SECRET = b"a secret of sixteen bytes or more"

Slot = NDArray[np.uint8]
SECRETS = pytest.mark.parametrize("secret", [None, SECRET], ids=["xxh3", "keyed"])


def filled(payload_bytes: int = PAYLOAD, spare: int = 32) -> Slot:
    """A slot as L1 has it: a cleared header, the payload, and a few bytes up to its size."""
    slot = np.frombuffer(np.random.default_rng(7).bytes(HEADER_BYTES + payload_bytes + spare), np.uint8).copy()
    slot[:HEADER_BYTES] = 0
    return slot


def sealed(secret: bytes | None, key: bytes = KEY, rank: int = 0, namespace: bytes = NAMESPACE) -> Slot:
    slot = filled()
    Envelope(namespace, PAYLOAD, secret).seal(slot, key, rank)
    return slot


@SECRETS
def test_what_was_sealed_is_verified_by_another_process(secret: bytes | None) -> None:
    slot = sealed(secret)
    assert Envelope(NAMESPACE, PAYLOAD, secret).verify(slot, KEY) is None


@SECRETS
def test_sealing_touches_the_header_only_and_twice_is_as_once(secret: bytes | None) -> None:
    before, slot = filled(), sealed(secret)
    assert np.array_equal(slot[HEADER_BYTES:], before[HEADER_BYTES:])
    again = slot.copy()
    Envelope(NAMESPACE, PAYLOAD, secret).seal(again, KEY)
    assert np.array_equal(again, slot)


def test_the_format_is_what_engines_of_other_versions_wrote() -> None:
    """A change of these bytes needs another version number."""
    slot = np.zeros(HEADER_BYTES + 4, np.uint8)
    Envelope(bytes(range(24)), 4).seal(slot, bytes(range(100, 124)), 3)
    assert bytes(slot[:HEADER_BYTES]).hex() == (
        "4b564f42" "01" "00" "0300" "04000000" "000102030405060708090a0b"
        "6465666768696a6b6c6d6e6f707172737475767778797a7b" "f2fb3c0e1e37c1d6d981529a44751840"
    )  # fmt: skip
    Envelope(bytes(range(24)), 4, SECRET).seal(slot, bytes(range(100, 124)), 3)
    assert bytes(slot[4:6]) == b"\x01\x01"
    assert bytes(slot[48:HEADER_BYTES]).hex() == "91b4416c97b424a93307d6a3bf3461f9"


ALTERATIONS: dict[str, tuple[int, Fault]] = {
    "magic": (0, Fault.MAGIC),
    "version": (4, Fault.VERSION),
    "flags": (5, Fault.FLAGS),
    "rank": (6, Fault.RANK),
    "length": (8, Fault.LENGTH),
    "namespace": (12, Fault.NAMESPACE),
    "last byte of the namespace": (23, Fault.NAMESPACE),
    "key": (24, Fault.KEY),
    "last byte of the key": (47, Fault.KEY),
    "tag": (48, Fault.TAG),
    "last byte of the tag": (63, Fault.TAG),
    "payload": (64, Fault.TAG),
    "last byte of the payload": (HEADER_BYTES + PAYLOAD - 1, Fault.TAG),
}


@SECRETS
@pytest.mark.parametrize("what", ALTERATIONS)
def test_one_bit_that_differs_is_a_miss(what: str, secret: bytes | None) -> None:
    at, fault = ALTERATIONS[what]
    slot = sealed(secret)
    slot[at] ^= 0x10
    assert Envelope(NAMESPACE, PAYLOAD, secret).verify(slot, KEY) is fault
    slot[at] ^= 0x10
    assert Envelope(NAMESPACE, PAYLOAD, secret).verify(slot, KEY) is None


@SECRETS
@given(bit=st.integers(0, 8 * (HEADER_BYTES + PAYLOAD) - 1))
def test_any_bit_that_differs_is_a_miss(secret: bytes | None, bit: int) -> None:
    slot = sealed(secret)
    slot[bit // 8] ^= 1 << bit % 8
    assert Envelope(NAMESPACE, PAYLOAD, secret).verify(slot, KEY) is not None


def test_what_lies_behind_the_payload_is_no_part_of_it() -> None:
    slot = sealed(None)
    slot[HEADER_BYTES + PAYLOAD] ^= 1
    assert Envelope(NAMESPACE, PAYLOAD).verify(slot, KEY) is None


def far(namespace: bytes) -> bytes:
    """Differs where the header no longer reaches."""
    return namespace[:-1] + bytes([namespace[-1] ^ 1])


DIFFERENT: dict[str, tuple[Callable[[bytes | None], Slot], Fault]] = {
    "another key's value": (lambda secret: sealed(secret, key=OTHER), Fault.KEY),
    "another rank's part": (lambda secret: sealed(secret, rank=1), Fault.RANK),
    "another namespace's": (lambda secret: sealed(secret, namespace=OTHER), Fault.NAMESPACE),
    "another secret's": (lambda secret: sealed((secret or b"") + b"x"), Fault.TAG),
    "never sealed": (lambda secret: filled(), Fault.MAGIC),
    "nothing but zeros": (lambda secret: np.zeros(HEADER_BYTES + PAYLOAD, np.uint8), Fault.MAGIC),
    "cut short by one": (lambda secret: sealed(secret)[: HEADER_BYTES + PAYLOAD - 1], Fault.LENGTH),
    "cut short to the header": (lambda secret: sealed(secret)[:HEADER_BYTES], Fault.LENGTH),
    "cut short to nothing": (lambda secret: sealed(secret)[:0], Fault.LENGTH),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_one_thing_different_is_a_miss(what: str) -> None:
    make, fault = DIFFERENT[what]
    assert Envelope(NAMESPACE, PAYLOAD, SECRET).verify(make(SECRET), KEY) is fault
    if what != "another secret's":
        assert Envelope(NAMESPACE, PAYLOAD).verify(make(None), KEY) is fault


def test_a_keyed_reader_takes_no_plain_value_and_a_plain_reader_no_keyed_one() -> None:
    assert Envelope(NAMESPACE, PAYLOAD, SECRET).verify(sealed(None), KEY) is Fault.FLAGS
    assert Envelope(NAMESPACE, PAYLOAD).verify(sealed(SECRET), KEY) is Fault.FLAGS


def test_a_plain_tag_is_not_taken_for_a_keyed_one() -> None:
    slot = sealed(None)
    slot[5] = 1
    assert Envelope(NAMESPACE, PAYLOAD, SECRET).verify(slot, KEY) is Fault.TAG


def test_a_forger_who_can_do_all_but_the_key_gets_nowhere() -> None:
    """Genuine values under other names, their headers rewritten to fit: the tag covers the header."""
    for slot, at, right in (
        (sealed(SECRET, key=OTHER), slice(24, 48), KEY),
        (sealed(SECRET, rank=1), slice(6, 8), b"\0\0"),
        (sealed(SECRET, namespace=OTHER), slice(12, 24), NAMESPACE[:12]),
    ):
        slot[at] = np.frombuffer(right, np.uint8)
        assert Envelope(NAMESPACE, PAYLOAD, SECRET).verify(slot, KEY) is Fault.TAG


def test_the_tag_holds_the_whole_namespace_where_it_is_keyed() -> None:
    assert Envelope(NAMESPACE, PAYLOAD, SECRET).verify(sealed(SECRET, namespace=far(NAMESPACE)), KEY) is Fault.TAG


def test_another_length_is_a_miss() -> None:
    slot = sealed(None)
    assert Envelope(NAMESPACE, PAYLOAD - 1).verify(slot, KEY) is Fault.LENGTH


@SECRETS
def test_batches(secret: bytes | None) -> None:
    envelope = Envelope(NAMESPACE, PAYLOAD, secret)
    parts = [Part(filled(), os.urandom(24), rank) for rank in (0, 1, 2)]
    envelope.seal_all(parts)
    assert envelope.verify_all(parts) == [None, None, None]
    parts[1].slot[100] ^= 1
    assert envelope.verify_all(parts) == [None, Fault.TAG, None]
    assert envelope.verify_all([]) == []


def test_verifying_changes_nothing_and_needs_no_right_to() -> None:
    slot = sealed(SECRET)
    slot.flags.writeable = False
    assert Envelope(NAMESPACE, PAYLOAD, SECRET).verify(slot, KEY) is None


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Envelope(b"short", PAYLOAD), "24 bytes"),
        (lambda: Envelope(NAMESPACE, 0), "payload"),
        (lambda: Envelope(NAMESPACE, 1 << 32), "payload"),
        (lambda: Envelope(NAMESPACE, PAYLOAD, b""), "secret"),
        (lambda: Envelope(NAMESPACE, PAYLOAD).seal(filled()[:100], KEY), "100 bytes"),
        (lambda: Envelope(NAMESPACE, PAYLOAD).seal(filled(), KEY[:-1]), "key"),
        (lambda: Envelope(NAMESPACE, PAYLOAD).seal(filled(), KEY, 1 << 16), "rank 65536"),
        (lambda: Envelope(NAMESPACE, PAYLOAD).verify(filled(), KEY, -1), "rank -1"),
    ],
)
def test_misuse_says_what_is_wrong(make: Callable[[], object], says: str) -> None:
    with pytest.raises(MisuseError, match=says):
        make()


def test_keyed_says_whether_a_secret_is_set() -> None:
    assert Envelope(NAMESPACE, PAYLOAD, SECRET).is_keyed
    assert not Envelope(NAMESPACE, PAYLOAD).is_keyed
