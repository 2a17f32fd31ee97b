"""What our client of the InfiniStore protocol rests on, shown on the real server: raw sockets, nothing of ours in between.

What ends or freezes that server is in `test_infinistore_hazards.py`.
"""

from __future__ import annotations

import socket
import statistics
import struct
import threading
import time

import pytest
from tests.infinistore import raw
from tests.infinistore.server import InfiniStoreServer

TWO_MIB = 2 << 20


def test_put_get_exist_match_delete(infinistore_shared: InfiniStoreServer) -> None:
    with raw.connect(infinistore_shared) as connection:
        assert raw.stored(connection, "a", b"value") == raw.STORED
        assert raw.value_of(connection, "a") == b"value"
        assert raw.exists(connection, "a")
        assert not raw.exists(connection, "b")
        connection.sendall(raw.match(["a", "b"]))
        assert raw.numbers(connection, 2) == [raw.STORED, 0]
        connection.sendall(raw.delete(["a", "b"]))
        assert raw.numbers(connection, 2) == [raw.STORED, 1]
        assert not raw.exists(connection, "a")


def test_a_miss_is_four_bytes_and_nothing_more(infinistore_shared: InfiniStoreServer) -> None:
    with raw.connect(infinistore_shared) as connection:
        connection.sendall(raw.get("nobody put this"))
        assert raw.number(connection) == raw.MISSING
        connection.settimeout(0.05)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(10)
        assert not raw.exists(connection, "nobody put this")


@pytest.mark.parametrize("crumbs", [None, 7, 1460], ids=["at once", "7 bytes each", "segments"])
def test_existence_of_many_is_one_round_trip(infinistore_shared: InfiniStoreServer, crumbs: int | None) -> None:
    """All of them in one send: answered in order, however the bytes arrive."""
    names = [f"block-{index}" for index in range(1000 if crumbs is None else 100)]
    with raw.connect(infinistore_shared) as connection:
        for name in names[::2]:
            assert raw.stored(connection, name, b"v") == raw.STORED
        asked = b"".join(raw.exist(name) for name in names)
        for start in range(0, len(asked), crumbs or len(asked)):
            connection.sendall(asked[start : start + (crumbs or len(asked))])
        assert raw.numbers(connection, 2 * len(names)) == [raw.STORED, 0, raw.STORED, 1] * (len(names) // 2)


def test_answers_that_nobody_reads_yet_are_kept(infinistore_shared: InfiniStoreServer) -> None:
    """20,000 at once, 160 kB of answers, and not one is read before the last was asked."""
    with raw.connect(infinistore_shared) as connection:
        assert raw.stored(connection, "there", b"v") == raw.STORED
        connection.sendall((raw.exist("there") + raw.exist("gone")) * 10_000)
        assert raw.numbers(connection, 40_000) == [raw.STORED, 0, raw.STORED, 1] * 10_000


def test_match_is_a_binary_search(infinistore_shared: InfiniStoreServer) -> None:
    """Right only where what is there is a prefix: it claims what is behind a hole."""
    with raw.connect(infinistore_shared) as connection:
        for name in ("p0", "p2", "p3", "p4"):
            assert raw.stored(connection, name, b"v") == raw.STORED
        connection.sendall(raw.match(["p0", "p1", "p2", "p3", "p4"]))
        assert raw.numbers(connection, 2) == [raw.STORED, 4]
        connection.sendall(raw.match(["q0", "q1"]))
        assert raw.numbers(connection, 2) == [raw.STORED, -1]


def test_an_empty_value_is_stored_with_the_next_byte_only(infinistore_shared: InfiniStoreServer) -> None:
    with raw.connect(infinistore_shared, timeout_s=0.2) as connection:
        connection.sendall(raw.put("empty", b""))
        with pytest.raises(TimeoutError):
            raw.number(connection)
        connection.sendall(raw.exist("empty"))
        assert raw.numbers(connection, 3) == [raw.STORED, raw.STORED, 0]


def test_a_pointer_leaves_in_one_segment(infinistore_shared: InfiniStoreServer) -> None:
    """A small put, sent alone on a connection with nothing unanswered, cannot be split: it is one segment also where they are small."""
    with raw.connect(infinistore_shared, mss=raw.ETHERNET_MSS) as connection:
        for index in range(200):
            before = segments_sent(connection)
            assert raw.stored(connection, f"pointer-{index}", bytes(600)) == raw.STORED
            assert segments_sent(connection) == before + 1
        before = segments_sent(connection)
        connection.sendall(b"".join(raw.put(f"many-{index}", bytes(600)) for index in range(200)))
        assert raw.numbers(connection, 200) == [raw.STORED] * 200
        assert segments_sent(connection) > before + 10, "the count counts"


def test_a_pointer_may_be_read_while_it_is_put(infinistore_shared: InfiniStoreServer) -> None:
    """Two readers ask for each of thousands of pointers as it is put for the first time: missing or whole, and the server lives."""
    count, begun, seen = 3000, [0], [0, 0]
    value = bytes(range(200))

    def read() -> None:
        with raw.connect(infinistore_shared) as connection:
            while (index := begun[0]) < count:
                answer = raw.value_of(connection, f"pointer-{index}")
                assert answer in (None, value)
                seen[answer is not None] += 1
                raw.exists(connection, f"pointer-{index}")

    readers = [Catching(target=read) for _ in range(2)]
    with raw.connect(infinistore_shared, mss=raw.ETHERNET_MSS) as connection:
        for reader in readers:
            reader.start()
        for index in range(count):
            begun[0] = index
            assert raw.stored(connection, f"pointer-{index}", value) == raw.STORED
        begun[0] = count
        for reader in readers:
            reader.finish()
    assert min(seen) > 0, f"the readers met pointers on one side of their put only: {seen}"


def test_small_answers_need_quick_acks(infinistore_shared: InfiniStoreServer) -> None:
    """It writes code and value apart, with Nagle's algorithm on: the second waits for our delayed acknowledgement, 40 ms."""
    with raw.connect(infinistore_shared) as connection:
        assert raw.stored(connection, "small", bytes(1000)) == raw.STORED
        assert statistics.median(seconds_of_gets(connection, quick_acks=True)) < 0.02
    with raw.connect(infinistore_shared) as connection:
        assert statistics.median(seconds_of_gets(connection, quick_acks=False)) > 0.02


@pytest.mark.slow
def test_values_of_two_mebibytes_are_read_by_many_at_once(infinistore_shared: InfiniStoreServer) -> None:
    """The largest value whose connection may be used again at once: eight chunks of 256 KiB, one round of the server's loop."""
    with raw.connect(infinistore_shared) as connection:
        assert raw.stored(connection, "large", bytes(TWO_MIB)) == raw.STORED
    ends = time.monotonic() + 3

    def read() -> None:
        with raw.connect(infinistore_shared) as connection:
            while time.monotonic() < ends:
                assert len(raw.value_of(connection, "large") or b"") == TWO_MIB

    readers = [Catching(target=read) for _ in range(6)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.finish()


@pytest.mark.slow
def test_a_full_pool(infinistore_server: InfiniStoreServer) -> None:
    """Old values make room. One that was put twice goes when its first copy does, and one larger than the pool costs the connection."""
    value = bytes(4 << 20)
    with raw.connect(infinistore_server) as connection:
        assert raw.stored(connection, "put twice", value) == raw.STORED
        for index in range(300):
            if index == 200:
                assert raw.stored(connection, "put twice", value) == raw.STORED
            assert raw.stored(connection, f"filler-{index}", value) == raw.STORED
        assert not raw.exists(connection, "filler-0")
        assert raw.exists(connection, "filler-199")
        assert not raw.exists(connection, "put twice"), "though it was put after filler-199"
        connection.sendall(raw.request(b"L", raw.payload("too large", (1 << 30) + 1, "P")))
        assert raw.number(connection) == raw.NO_ROOM
        connection.sendall(b"the value's first bytes")
        with pytest.raises((EOFError, ConnectionResetError)):
            raw.number(connection)


class Catching(threading.Thread):
    """Its trouble is raised where it is waited for."""

    trouble: BaseException | None = None

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:
            self.trouble = error

    def finish(self) -> None:
        self.join(30)
        assert not self.is_alive()
        if self.trouble is not None:
            raise self.trouble


def segments_sent(connection: socket.socket) -> int:
    """`tcpi_data_segs_out` of Linux' `struct tcp_info`."""
    return int(struct.unpack_from("<I", connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160), 156)[0])


def seconds_of_gets(connection: socket.socket, *, quick_acks: bool) -> list[float]:
    took = []
    for _ in range(7):
        connection.sendall(raw.get("small"))
        began = time.perf_counter()
        raw.receive(connection, 8 + 1000, quick_acks=quick_acks)
        took.append(time.perf_counter() - began)
    return took
