"""Keys: golden vectors, and what must and must not change them."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvoffload.errors import MisuseError
from kvoffload.keys import KEY_BYTES, Extras, KeyChain
from kvoffload.messages import ROOT

NAMESPACE = bytes(range(24))
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)
SIZES = st.integers(1, 9)


def chain_of(tokens: list[int], size: int = 4, extras: Extras = None, namespace: bytes = NAMESPACE) -> KeyChain:
    chain = KeyChain(namespace, size)
    chain.extend(tokens, extras)
    return chain


def keys_of(tokens: list[int], size: int = 4, extras: Extras = None, namespace: bytes = NAMESPACE) -> list[bytes]:
    return chain_of(tokens, size, extras, namespace).keys


def by_position(start: int, end: int) -> bytes:
    return b"%d-%d;" % (start, end)


# Keys are stored outside the process: whoever changes these changes the format, and with it `_PERSON`.
GOLDEN = [
    (16, None, "46896d312e39e720050536f2400f4d518dc7a5ad08649c10"),
    (128, None, "f384b1834dbe40c9185d033a00ebe1727f01a2823a5b5b0e"),
    (16, b"salt", "2ebc205e7fee4144ec2db41a3b503aadf450a2179a7c6793"),
    (32, by_position, "6d629e96efd1632e3912d6c5c75af903204caf59e716632c"),
    (1000, None, "d336480124dfbbeb55023534faaf3ce6243c100b62833e8f"),
]


def test_a_key_is_what_the_docstring_says() -> None:
    keys = keys_of([1, 2, 3, 2**32 - 1], 2, by_position)
    parent = NAMESPACE
    for tokens, extra, key in [((1, 2), b"0-2;", keys[0]), ((3, 2**32 - 1), b"2-4;", keys[1])]:
        data = parent + struct.pack("<2I", *tokens) + extra
        assert key == hashlib.blake2b(data, digest_size=24, person=b"kvoffload.key.1", salt=struct.pack("<Q", 2)).digest()
        parent = key


@pytest.mark.parametrize(("size", "extras", "last"), GOLDEN)
def test_golden_vectors(size: int, extras: Extras, last: str) -> None:
    assert keys_of(list(range(1000, 3000)), size, extras)[-1].hex() == last


PROGRAM = """
from kvoffload.keys import KeyChain
chain = KeyChain(bytes(range(24)), 4)
chain.extend(list(range(64)), b"salt")
print(chain.keys[-1].hex())
"""


@pytest.mark.parametrize("seed", ["1", "2"])
def test_another_process_with_another_hash_seed_derives_the_same(seed: str) -> None:
    env = {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, check=True, text=True)
    assert run.stdout.strip() == keys_of(list(range(64)), 4, b"salt")[-1].hex()


@given(TOKENS, SIZES, st.lists(st.integers(0, 40), max_size=6), st.sampled_from([None, b"", b"salt", by_position]))
def test_extended_step_by_step_equals_at_once(tokens: list[int], size: int, cuts: list[int], extras: Extras) -> None:
    chain = KeyChain(NAMESPACE, size)
    for cut in sorted(cuts):
        chain.extend(tokens[:cut], extras)
        assert len(chain.keys) == min(cut, len(tokens)) // size
    chain.extend(tokens, extras)
    assert chain.keys == keys_of(tokens, size, extras)
    assert len(chain.keys) == len(tokens) // size
    assert all(len(key) == KEY_BYTES for key in chain.keys)


@given(TOKENS, TOKENS, SIZES, st.integers(-2, 45))
def test_recut_then_extend_equals_fresh(old: list[int], new: list[int], size: int, kept: int) -> None:
    chain = chain_of(old, size)
    chain.recut(kept)
    kept = max(0, min(kept, len(old)))
    assert chain.keys == keys_of(old[:kept], size)
    changed = old[:kept] + new
    chain.extend(changed)
    assert chain.keys == keys_of(changed, size)


@given(TOKENS, TOKENS, SIZES)
def test_a_common_prefix_has_common_keys_and_nothing_else_has(left: list[int], right: list[int], size: int) -> None:
    same = next((index for index, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), min(len(left), len(right)))
    a, b = keys_of(left, size), keys_of(right, size)
    assert a[: same // size] == b[: same // size]
    assert not set(a[same // size :]) & set(b[same // size :])


@given(st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=40), st.data())
def test_a_changed_token_changes_its_key_and_all_later_ones(tokens: list[int], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(tokens) - 1))
    other = data.draw(st.integers(0, 2**32 - 1).filter(lambda token: token != tokens[at]))
    before, after = keys_of(tokens), keys_of([*tokens[:at], other, *tokens[at + 1 :]])
    assert [i for i, (x, y) in enumerate(zip(before, after, strict=True)) if x == y] == list(range(min(at // 4, len(before))))


@given(st.integers(0, 9), st.binary(min_size=1, max_size=30))
def test_a_changed_extra_changes_its_key_and_all_later_ones(block: int, extra: bytes) -> None:
    tokens = list(range(40))
    before = keys_of(tokens)
    after = keys_of(tokens, 4, lambda start, end: extra if start <= block * 4 < end else b"")
    assert [i for i, (x, y) in enumerate(zip(before, after, strict=True)) if x == y] == list(range(block))


def test_namespace_and_block_size_change_every_key() -> None:
    tokens = list(range(64))
    chains = [keys_of(tokens, size, extra, name) for size in (4, 8) for name in (NAMESPACE, bytes(24)) for extra in (None, b"x")]
    assert len({key for keys in chains for key in keys}) == sum(len(keys) for keys in chains)


def test_tokens_and_extras_do_not_run_together() -> None:
    tokens = [1, 2, 3, 4]
    rest = struct.pack("<2I", 3, 4)
    assert keys_of(tokens, 4) != keys_of(tokens[:2], 2, rest)
    assert not set(keys_of([1, 2], 2, b"ab")) & set(keys_of([1, 2], 2, b"a"))


def test_no_extras_and_empty_extras_are_the_same() -> None:
    assert keys_of(list(range(40))) == keys_of(list(range(40)), 4, b"") == keys_of(list(range(40)), 4, lambda start, end: b"")


def test_extras_are_asked_for_new_full_blocks_only() -> None:
    asked: list[tuple[int, int]] = []

    def extras(start: int, end: int) -> bytes:
        asked.append((start, end))
        return b""

    chain = chain_of([0] * 9, 4, extras)
    assert asked == [(0, 4), (4, 8)]
    chain.extend([0] * 13, extras)
    assert asked == [(0, 4), (4, 8), (8, 12)]


@pytest.mark.parametrize("size", [255, 256, 257, 512, 1500])
def test_blocks_too_wide_for_one_update_hash_the_same(size: int) -> None:
    data = NAMESPACE + struct.pack(f"<{size}I", *range(size))
    expected = hashlib.blake2b(data, digest_size=24, person=b"kvoffload.key.1", salt=struct.pack("<Q", size)).digest()
    assert keys_of(list(range(size)), size) == [expected]


def test_long_prompts_are_packed_in_portions_and_equal_step_by_step() -> None:
    tokens = [index * 7919 % 2**32 for index in range(20_011)]
    chain = KeyChain(NAMESPACE, 16)
    for end in range(0, len(tokens) + 777, 777):
        chain.extend(tokens[:end], by_position)
    chain.extend(tokens, by_position)
    assert chain.keys == keys_of(tokens, 16, by_position)
    assert len(chain.keys) == 1250


@pytest.mark.parametrize("bad", [-1, 2**32, 2**70])
@pytest.mark.parametrize("at", [0, 5, 8, 4999])
def test_a_token_outside_uint32_ends_the_chain_before_its_block(bad: int, at: int) -> None:
    tokens = list(range(5000))
    good = keys_of(tokens)
    tokens[at] = bad
    chain = chain_of(tokens)
    assert chain.is_stopped
    assert chain.keys == good[: at // 4]
    chain.extend([*tokens, 1, 2, 3, 4])
    assert chain.keys == good[: at // 4]
    chain.recut(at)
    assert not chain.is_stopped
    chain.extend(list(range(5000)))
    assert chain.keys == good


def test_extras_of_none_end_the_chain_until_it_is_recut() -> None:
    tokens = list(range(16))
    chain = chain_of(tokens, 4, lambda start, end: b"" if start < 8 else None)
    assert chain.is_stopped
    assert chain.keys == keys_of(tokens[:8])
    chain.recut(12)  # the block that stopped it is still whole
    chain.extend(tokens)
    assert chain.keys == keys_of(tokens[:8])
    chain.recut(11)
    chain.extend(tokens)
    assert chain.keys == keys_of(tokens)


def test_fewer_tokens_cut_the_chain() -> None:
    chain = chain_of(list(range(16)))
    chain.extend(list(range(7)))
    assert chain.keys == keys_of([0, 1, 2, 3])


@given(TOKENS, SIZES, st.lists(st.integers(-1, 50), max_size=5))
def test_only_the_first_tokens_are_keyed_where_a_number_is_given(tokens: list[int], size: int, numbers: list[int]) -> None:
    chain = KeyChain(NAMESPACE, size)
    for index, number in enumerate(numbers):
        chain.extend(tokens, None, number)
        covered = max(0, min(len(tokens), max(numbers[: index + 1])))
        assert chain.keys == keys_of(tokens[:covered], size)


def test_a_stopped_chain_goes_on_once_the_tokens_that_stopped_it_are_gone() -> None:
    chain = chain_of([0, 1, 2, 3, -1, -1, -1, -1])
    chain.extend([0, 1, 2, 3, 4])
    chain.extend(list(range(8)))
    assert chain.keys == keys_of(list(range(8)))


def test_tokens_that_are_no_integers_are_misuse() -> None:
    with pytest.raises(MisuseError, match=r"token ids are integers, not 1.5 \(at 2"):
        keys_of([0, 1, 1.5, 3])  # type: ignore[list-item]


def test_a_namespace_of_another_length_and_a_block_of_nothing_are_misuse() -> None:
    with pytest.raises(MisuseError, match="24 bytes, not 5"):
        KeyChain(b"short", 4)
    with pytest.raises(MisuseError, match="at least 1 token"):
        KeyChain(NAMESPACE, 0)


def test_parents_are_as_messages_carry_them() -> None:
    chain = chain_of(list(range(12)))
    assert [chain.parent_of(index) for index in range(3)] == [ROOT, chain.keys[0], chain.keys[1]]
