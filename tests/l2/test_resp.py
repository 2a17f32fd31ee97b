"""Answers of a Redis server over a socket: cut anywhere, with anything between the values, lost at any byte."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import pytest

from kvoffload.l2.lanes import Call
from kvoffload.l2.node import Item, Outcome
from kvoffload.l2.redis_pieces import Find, Read
from kvoffload.l2.resp import ProtocolError, RespSocket, command, commands

LENGTHS = (1, 2, 60, 4095, 4096, 5000, 20_000)
"""Below, at and above what is received together with an answer's first line."""


class Compiled(RespSocket):
    """What is asked is not looked at."""

    def send(self, parts: Sequence[bytes | memoryview]) -> None: ...


class Interpreted(Compiled):
    """As over TLS: one value after another, in Python."""

    def read_values(self, buffers: Sequence[memoryview]) -> int:
        return 0


KINDS = pytest.mark.parametrize("kind", [Compiled, Interpreted])


def value_of(index: int, length: int) -> bytes:
    # Full of what ends lines and begins answers.
    return bytes(random.Random(index).choices(b"\r\n$-:+0123456789x", k=length))


def bulk(value: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(value), value)


@contextmanager
def answering(kind: type[RespSocket], data: bytes, cuts: Sequence[int] = ()) -> Iterator[RespSocket]:
    """A connection on which ``data`` comes, one piece after another, and which is closed then."""
    ours, theirs = socket.socketpair()

    def feed() -> None:
        start = 0
        with closing(theirs):
            for cut in (*cuts, len(data)):
                theirs.sendall(data[start:cut])
                start = cut
                while unread(ours) and not is_over.is_set():
                    os.sched_yield()

    is_over = threading.Event()
    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    connection = kind(ours, ours.close)
    try:
        yield connection
    finally:
        is_over.set()
        connection.close()
        feeder.join(10)
    assert not feeder.is_alive()


def unread(sock: socket.socket) -> int:
    try:
        return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4)))[0])
    except (OSError, ValueError):  # closed
        return 0


def reading(lengths: Sequence[int]) -> tuple[Read, list[bytearray], list[Outcome | None]]:
    memory = [bytearray(length) for length in lengths]
    outcomes: list[Outcome | None] = [None] * len(lengths)
    call = Call()
    call.expect(1)
    return (
        Read(call, [Item(f"n{index}", memoryview(buffer)) for index, buffer in enumerate(memory)], range(len(lengths)), outcomes),
        memory,
        outcomes,
    )


ODD = {
    b"$-1\r\n": Outcome.ABSENT,
    b"-WRONGTYPE no string\r\n": Outcome.MALFORMED,
    b"-LOADING\r\n": Outcome.FAILED,
    b"$0\r\n\r\n": Outcome.MALFORMED,
    bulk(b"another length" * 400): Outcome.MALFORMED,
}


@pytest.mark.asyncio
@KINDS
@pytest.mark.parametrize("seed", range(12))
async def test_answers_cut_anywhere(kind: type[RespSocket], seed: int) -> None:
    chance = random.Random(seed)
    lengths = [chance.choice(LENGTHS) for _ in range(12)]
    answers, expected = [], []
    for index, length in enumerate(lengths):
        odd = chance.choice(list(ODD)) if chance.random() < 0.3 else None
        answers.append(odd or bulk(value_of(index, length)))
        expected.append(ODD[odd] if odd else Outcome.DONE)
    data = b"".join(answers)
    cuts = sorted(chance.sample(range(len(data)), 0 if seed == 0 else 25))
    piece, memory, outcomes = reading(lengths)
    with answering(kind, data, cuts) as connection:
        piece.run(connection)
        assert connection.is_clean
    assert outcomes == expected
    assert piece.answered == len(lengths)
    for index, (buffer, outcome) in enumerate(zip(memory, expected, strict=True)):
        assert outcome is not Outcome.DONE or buffer == value_of(index, lengths[index])


@pytest.mark.asyncio
@KINDS
async def test_a_connection_lost_at_any_byte_keeps_what_came_before(kind: type[RespSocket]) -> None:
    lengths = (3, 40, 2)
    answers = [bulk(value_of(index, length)) for index, length in enumerate(lengths)]
    data = b"".join(answers)
    ends = [sum(map(len, answers[: index + 1])) for index in range(len(answers))]
    for end in range(len(data)):
        piece, memory, outcomes = reading(lengths)
        with answering(kind, data[:end]) as connection, pytest.raises(ConnectionResetError):
            piece.run(connection)
        came = sum(last <= end for last in ends)
        assert piece.answered == came
        assert outcomes == [Outcome.DONE] * came + [None] * (3 - came)
        assert [bytes(buffer) for buffer in memory[:came]] == [value_of(index, lengths[index]) for index in range(came)]


@pytest.mark.asyncio
@KINDS
@pytest.mark.parametrize(
    "answer",
    [
        b"$3\r\nabcde\r\n",
        b"$3\r\nabc\n\r",
        b"$x\r\nabc\r\n",
        b"$3 \r\nabc\r\n",
        b"*1\r\n$3\r\nabc\r\n",
        b"$\r\nabc\r\n",
        b"$" + b"1" * 5000,
    ],
)
async def test_nonsense_ends_the_connection(kind: type[RespSocket], answer: bytes) -> None:
    piece, _, outcomes = reading((2, 3, 2))
    with answering(kind, bulk(b"ab") + answer + bulk(b"cd")) as connection, pytest.raises(ProtocolError):
        piece.run(connection)
    assert outcomes == [Outcome.DONE, None, None]


@pytest.mark.asyncio
@KINDS
async def test_a_length_of_more_digits_than_it_has_is_no_shorter_one(kind: type[RespSocket]) -> None:
    """Eleven digits, the first ten of which say what is expected."""
    piece, _, outcomes = reading((3,))
    with answering(kind, b"$00000000031\r\nabc\r\n") as connection, pytest.raises(ConnectionResetError):
        piece.run(connection)
    assert outcomes == [None]


@pytest.mark.asyncio
@pytest.mark.parametrize("seed", range(4))
async def test_finds_cut_anywhere(seed: int) -> None:
    chance = random.Random(seed)
    expected = [chance.random() < 0.5 for _ in range(2000)]  # longer than what is received at once
    data = b"".join(b":%d\r\n" % there for there in expected)
    found: list[bool | None] = [None] * len(expected)
    call = Call()
    call.expect(1)
    piece = Find(call, [f"n{index}" for index in range(len(expected))], range(len(expected)), found)
    with answering(Compiled, data + b":1\r\n", sorted(chance.sample(range(len(data)), 20))) as connection:
        piece.run(connection)
        assert found == expected
        assert connection.read_line() == b":1", "what was not asked for is left"


def test_commands_are_as_one_after_another() -> None:
    for names in ([], [b"a"], [b"name-1", b"name-2"], [b"a", b"bc", b""]):
        assert commands(b"GET", names) == b"".join(command(b"GET", name) for name in names)


def test_without_a_compiler_values_are_read_all_the_same() -> None:
    script = """
import socket
from kvoffload.l2.resp import RespSocket
ours, theirs = socket.socketpair()
theirs.sendall(b"$3\\r\\nabc\\r\\n")
connection = RespSocket(ours, ours.close)
buffer = bytearray(3)
assert connection.read_values([memoryview(buffer)]) == 0
assert connection.read_line() == b"$3"
connection.read_value(memoryview(buffer))
print(bytes(buffer))
"""
    told = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, capture_output=True, text=True, check=True
    )
    assert told.stdout == "b'abc'\n"
    assert "NUMBA_DISABLE_JIT" in told.stderr
