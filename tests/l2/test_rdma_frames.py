"""Packets between a node and its child: what goes in comes out, and nothing else does."""

from __future__ import annotations

from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvoffload.errors import MisuseError, PeerError
from kvoffload.l2 import rdma_frames as frames
from kvoffload.l2.infinistore_rdma import _cut

SETUP = frames.Setup(frames.PROTOCOL_VERSION, "host", 1, "mlx5_0", -1, "IB", 1, 0.5, [(1 << 40, 1 << 30)], "/sys")
TO_CHILD = [SETUP, frames.Connect(), frames.Find(1, ["a", "ü"]), frames.Move(2, True, 4096, ["a"], [(0, 8192)]), frames.Withdraw(2)]
FROM_CHILD = [frames.Connected("note"), frames.NotConnected("why"), frames.Answer(3, b"\x00\x05", ""), frames.Broken("why")]


@pytest.mark.parametrize("message", TO_CHILD)
def test_to_the_child(message: frames.ToChild) -> None:
    assert frames.decode_to_child(frames.encode(message)) == message
    with pytest.raises(PeerError, match="malformed"):
        frames.decode_from_child(frames.encode(message))


@pytest.mark.parametrize("message", FROM_CHILD)
def test_from_the_child(message: frames.FromChild) -> None:
    assert frames.decode_from_child(frames.encode(message)) == message
    with pytest.raises(PeerError, match="malformed"):
        frames.decode_to_child(frames.encode(message))


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode(["answer", 3, b"", "", "more"]),
        msgspec.msgpack.encode(["answer", -3, b"", ""]),
        msgspec.msgpack.encode(["answer", "3", b"", ""]),
        msgspec.msgpack.encode(["answer", 3, b""]),
        msgspec.msgpack.encode(["unheard of"]),
        msgspec.msgpack.encode({"call": 3}),
        frames.encode(frames.Answer(3, b"", "")) + b"x",
        b"\x91" * 5000,
        b"x" * (frames.MAX_PACKET_BYTES + 1),
    ],
)
def test_nonsense(packet: bytes) -> None:
    with pytest.raises(PeerError):
        frames.decode_from_child(packet)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_peer_error(packet: bytes) -> None:
    for decode in (frames.decode_from_child, frames.decode_to_child):
        with suppress(PeerError):
            decode(packet)


def test_what_cannot_be_sent() -> None:
    with pytest.raises(MisuseError, match="at most"):
        frames.encode(frames.Find(1, ["a" * frames.MAX_PACKET_BYTES]))
    with pytest.raises(MisuseError, match="cannot be sent"):
        frames.encode(frames.Find(1, ["\ud800"]))


@given(st.lists(st.integers(1, 3000), max_size=600), st.integers(1, 300))
def test_however_long_names_are_a_message_fits_into_a_packet(sizes: list[int], most: int) -> None:
    runs = _cut(sizes, most)
    assert [place for run in runs for place in run] == list(range(len(sizes)))
    for run in runs:
        assert 0 < len(run) <= most
        names = ["x" * sizes[place] for place in run]
        frames.encode(frames.Move(1 << 62, True, 1 << 31, names, [(1 << 20, 1 << 50)] * len(names)))
        frames.encode(frames.Find(1 << 62, names))
