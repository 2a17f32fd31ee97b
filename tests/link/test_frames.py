from __future__ import annotations

from contextlib import suppress
from random import Random
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvoffload.errors import MisuseError, PeerError
from kvoffload.link import ToHub, ToWorker
from kvoffload.link_frames import (
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    MAX_MESSAGE_BYTES,
    MORE,
    Beat,
    FrameDecoder,
    Goodbye,
    Hello,
    Knock,
    Welcome,
    decode,
    encode,
)
from kvoffload.messages import (
    LINK_MESSAGES,
    BlocksFilled,
    ConnectorOff,
    DropReason,
    LoadFinished,
    LoadOutcome,
    ReleaseHit,
    SegmentGrown,
    SlotGrant,
)

ids = st.lists(st.integers(0, 2**63 - 1), max_size=20).map(tuple)
epochs = st.lists(st.integers(0, 2**64 - 1), max_size=20).map(tuple)
numbers = st.integers(0, 2**63 - 1)
messages = st.one_of(
    st.builds(SlotGrant, numbers, ids, ids, epochs),
    st.builds(BlocksFilled, numbers, numbers, ids, ids, st.none() | st.sampled_from(DropReason)),
    st.builds(LoadFinished, numbers, numbers, st.sampled_from(LoadOutcome)),
    st.builds(SegmentGrown, numbers, numbers),
    st.builds(ConnectorOff, st.text()),
    st.builds(Hello, numbers, numbers, numbers, st.binary(), numbers, numbers, numbers, numbers, st.binary()),
    st.builds(Welcome, numbers),
    st.builds(Knock, numbers, st.binary()),
    st.builds(Goodbye, st.text()),
    st.just(Beat()),
)


def frame(tag: int, payload: bytes) -> bytes:
    return (1 + len(payload)).to_bytes(4, "little") + bytes([tag]) + payload


@given(st.lists(messages, max_size=8), st.randoms(use_true_random=False))
def test_round_trip_in_any_pieces(sent: list[object], random: Random) -> None:
    data = b"".join(map(encode, sent))
    decoder = FrameDecoder()
    received: list[object] = []
    at = 0
    while at < len(data):
        step = random.randint(1, 40)
        received += decoder.feed(data[at : at + step])
        at += step
    assert received == sent


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=60), max_size=5))
def test_random_bytes_are_a_peer_error_or_nothing(pieces: list[bytes]) -> None:
    decoder = FrameDecoder()
    with suppress(PeerError):
        for piece in pieces:
            decoder.feed(piece)


@settings(max_examples=500)
@given(st.integers(0, 255), st.binary(max_size=100))
def test_a_random_payload_is_a_peer_error_or_a_message_of_its_types(tag: int, payload: bytes) -> None:
    try:
        message = decode(tag, payload)
    except PeerError:
        return
    assert FrameDecoder().feed(encode(message)) == [message]


@given(messages, st.data())
def test_a_flipped_byte_never_crashes(message: object, data: st.DataObject) -> None:
    frames = bytearray(encode(message))
    at = data.draw(st.integers(0, len(frames) - 1))
    frames[at] ^= data.draw(st.integers(1, 255))
    with suppress(PeerError):
        FrameDecoder().feed(bytes(frames))


def test_every_link_message_has_the_tag_of_its_place() -> None:
    assert [encode(message)[4] for message in map(_example, LINK_MESSAGES)] == list(range(len(LINK_MESSAGES)))


def _example(kind: type) -> object:
    examples = [
        SlotGrant(1, (2,), (3,), (4,)),
        BlocksFilled(1, 0, (2,), (), None),
        LoadFinished(1, 0, LoadOutcome.LOADED),
        SegmentGrown(0, 5),
        ConnectorOff("x"),
    ]
    return next(example for example in examples if type(example) is kind)


@pytest.mark.parametrize(
    "payload",
    [
        b"\x92\x01",  # too few fields
        b"\x93\x01\x00\x00\x00",  # bytes behind the end
        b"\x94\x01\x00\x00\x00",  # too many fields
        b"\x93\xc3\x00\x00",  # a bool for an int
        b"\x93\xa11\x00\x00",  # text for an int
        b"\x93\x01\x00\x09",  # no such outcome
        b"\x93\xcb?\xf0\0\0\0\0\0\0\x00\x00",  # 1.0 for an int
        b"\x83\xa3job\x01\xa4rank\x00\xa7outcome\x00",  # a map
        b"",
    ],
)
def test_decoding_is_strict(payload: bytes) -> None:
    with pytest.raises(PeerError, match="malformed LoadFinished"):
        decode(LINK_MESSAGES.index(LoadFinished), payload)
    assert decode(LINK_MESSAGES.index(LoadFinished), b"\x93\x01\x00\x00") == LoadFinished(1, 0, LoadOutcome.LOADED)


@pytest.mark.parametrize("length", [0, MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_a_length_out_of_range_is_refused_before_its_bytes_come(length: int) -> None:
    with pytest.raises(PeerError, match=str(length)):
        FrameDecoder().feed(length.to_bytes(4, "little") + b"\xff")


@pytest.mark.parametrize("tag", [len(LINK_MESSAGES), 100, 249])
def test_an_unknown_tag_is_refused(tag: int) -> None:
    with pytest.raises(PeerError, match=f"tag {tag}"):
        FrameDecoder().feed(frame(tag, b"\x90"))


def test_a_grant_of_500_blocks_is_small() -> None:
    worst = SlotGrant(2**63 - 1, (2**32 - 1,) * 500, (2**32 - 1,) * 500, (2**64 - 1,) * 500)
    assert len(encode(worst)) <= 500 * 19 + 64


@pytest.mark.parametrize("blocks", [55_000, 60_000, 200_000])
def test_a_message_longer_than_a_frame_travels_in_several(blocks: int) -> None:
    grant = SlotGrant(7, tuple(range(2**31, 2**31 + blocks)), tuple(range(2**31, 2**31 + blocks)), (2**64 - 1,) * blocks)
    frames = encode(grant) + encode(Beat())
    assert FrameDecoder().feed(frames) == [grant, Beat()]
    lengths = []
    at = 0
    while at < len(frames):
        lengths.append(int.from_bytes(frames[at : at + 4], "little"))
        at += 4 + lengths[-1]
    assert max(lengths) <= MAX_FRAME_BYTES
    assert len(lengths) == 1 + -(-(len(encode(grant)) - HEADER_BYTES) // MAX_FRAME_BYTES)


def test_a_message_too_long_for_the_link_is_refused_by_the_sender() -> None:
    with pytest.raises(MisuseError, match="too long"):
        encode(ConnectorOff("x" * MAX_MESSAGE_BYTES))


def test_pieces_without_end_are_refused_by_the_receiver() -> None:
    decoder = FrameDecoder()
    piece = frame(MORE, b"x" * (MAX_FRAME_BYTES - 1))
    for _ in range(MAX_MESSAGE_BYTES // MAX_FRAME_BYTES):
        assert decoder.feed(piece) == []
    with pytest.raises(PeerError, match="more than"):
        decoder.feed(piece)


def test_pieces_cannot_be_interrupted() -> None:
    with pytest.raises(PeerError, match="malformed Beat"):
        FrameDecoder().feed(frame(MORE, b"\x93\x01") + encode(Beat()))


def test_what_does_not_cross_is_refused() -> None:
    with pytest.raises(MisuseError, match="ReleaseHit"):
        encode(ReleaseHit("r", 1))


@pytest.mark.parametrize("value", [np.int64(1), 2**64, object()])
def test_values_that_are_not_plain_are_refused(value: int) -> None:
    with pytest.raises(MisuseError, match="SegmentGrown"):
        encode(SegmentGrown(0, value))


def test_both_directions_are_link_messages() -> None:
    assert set(get_args(ToHub)) | set(get_args(ToWorker)) == set(LINK_MESSAGES)
