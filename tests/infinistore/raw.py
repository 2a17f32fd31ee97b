"""The server's TCP protocol in its barest form: requests as bytes, answers read by hand. For facts about the server, not a client."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence

import flatbuffers
from tests.infinistore.server import InfiniStoreServer

STORED, MISSING, NO_ROOM = 200, 404, 507
ETHERNET_MSS = 1448


def connect(server: InfiniStoreServer, *, mss: int | None = None, timeout_s: float = 10.0) -> socket.socket:
    """``mss`` makes loopback cut segments and size buffers as a network does."""
    connection = socket.socket()
    connection.settimeout(timeout_s)
    if mss is not None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, mss)
    connection.connect(("127.0.0.1", server.port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def request(operation: bytes, body: bytes) -> bytes:
    return struct.pack("<IcI", 0xDEADBEEF, operation, len(body)) + body


def put(key: str, value: bytes) -> bytes:
    return request(b"L", payload(key, len(value), "P")) + value


def get(key: str) -> bytes:
    return request(b"L", payload(key, 0, "G"))


def exist(key: str) -> bytes:
    return request(b"C", key.encode())


def match(keys: Sequence[str]) -> bytes:
    return request(b"M", key_list(keys))


def delete(keys: Sequence[str]) -> bytes:
    return request(b"X", key_list(keys))


def payload(key: str, length: int, operation: str) -> bytes:
    """`table {key: string; value_length: int; op: byte;}`"""
    builder = flatbuffers.Builder(128)
    name = builder.CreateString(key)
    builder.StartObject(3)
    builder.PrependUOffsetTRelativeSlot(0, name, 0)
    builder.PrependInt32Slot(1, length, 0)
    builder.PrependInt8Slot(2, ord(operation), 0)
    builder.Finish(builder.EndObject())
    return bytes(builder.Output())


def key_list(keys: Sequence[str]) -> bytes:
    """`table {keys: [string];}`"""
    builder = flatbuffers.Builder(1024)
    names = [builder.CreateString(key) for key in keys]
    builder.StartVector(4, len(names), 4)
    for name in reversed(names):
        builder.PrependUOffsetTRelative(name)
    vector = builder.EndVector()
    builder.StartObject(1)
    builder.PrependUOffsetTRelativeSlot(0, vector, 0)
    builder.Finish(builder.EndObject())
    return bytes(builder.Output())


def receive(connection: socket.socket, count: int, *, quick_acks: bool = True) -> bytes:
    """Exactly so many bytes. Raises EOFError where the server closed before."""
    got = bytearray(count)
    view, done = memoryview(got), 0
    while done < count:
        if quick_acks:  # not sticky
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        received = connection.recv_into(view[done:])
        if received == 0:
            raise EOFError(f"the server closed after {done} of {count} bytes")
        done += received
    return bytes(got)


def number(connection: socket.socket) -> int:
    return int(struct.unpack("<i", receive(connection, 4))[0])


def numbers(connection: socket.socket, count: int) -> list[int]:
    return list(struct.unpack(f"<{count}i", receive(connection, 4 * count)))


def stored(connection: socket.socket, key: str, value: bytes) -> int:
    """The code that a put was answered with."""
    connection.sendall(put(key, value))
    return number(connection)


def value_of(connection: socket.socket, key: str, *, quick_acks: bool = True) -> bytes | None:
    connection.sendall(get(key))
    if (code := number(connection)) == MISSING:
        return None
    assert code == STORED
    size = number(connection)
    return receive(connection, size, quick_acks=quick_acks)


def exists(connection: socket.socket, key: str) -> bool:
    connection.sendall(exist(key))
    code, answer = numbers(connection, 2)
    assert code == STORED
    return answer == 0
