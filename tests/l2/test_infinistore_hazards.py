"""What ends or freezes the real InfiniStore server, each from one plain client: why ours keeps the rules that it keeps.

Where one of these fails, the server has become better, and a rule may go.
"""

from __future__ import annotations

import threading

import pytest
from tests.infinistore import raw
from tests.infinistore.server import InfiniStoreServer

MIB = 1 << 20


def is_frozen(server: InfiniStoreServer) -> bool:
    with raw.connect(server, timeout_s=2) as connection:
        try:
            raw.exists(connection, "key")
        except TimeoutError:
            return True
    return False


def await_stored(server: InfiniStoreServer, key: str) -> None:
    """A key exists from the first byte of its value on."""
    with raw.connect(server) as connection:
        for _ in range(10_000):
            if raw.exists(connection, key):
                return
    raise AssertionError(f"{key} never came to exist")


@pytest.mark.parametrize(("operation", "writer", "size"), [("get", "alive", 100), ("delete", "alive", MIB), ("get", "gone", MIB)])
def test_a_key_that_was_put_in_part_ends_it(infinistore_server: InfiniStoreServer, operation: str, writer: str, size: int) -> None:
    """So a value is put once, under a name that nobody knows before its acknowledgement, and a pointer in one piece."""
    put = raw.put("key", bytes(size))
    with raw.connect(infinistore_server) as connection, raw.connect(infinistore_server) as other:
        connection.sendall(put[: -size // 2])
        await_stored(infinistore_server, "key")
        if writer == "gone":
            connection.close()
            assert raw.exists(other, "key")
        other.sendall(raw.get("key") if operation == "get" else raw.delete(["key"]))
        with pytest.raises((EOFError, ConnectionResetError)):
            raw.number(other)
    assert infinistore_server.expect_end() != 0


def test_a_whole_put_heals_the_key(infinistore_server: InfiniStoreServer) -> None:
    with raw.connect(infinistore_server) as connection:
        connection.sendall(raw.put("key", bytes(MIB))[:300_000])
        await_stored(infinistore_server, "key")
    with raw.connect(infinistore_server) as connection:
        assert raw.stored(connection, "key", b"whole") == raw.STORED
        assert raw.value_of(connection, "key") == b"whole"


@pytest.mark.parametrize("next_request", [raw.get("key"), b"\xef"], ids=["get", "one byte"])
def test_a_byte_behind_a_get_freezes_it(infinistore_server: InfiniStoreServer, next_request: bytes) -> None:
    """It handles the same GET again for ever, and its memory grows. So nothing is sent before all of the answer has come."""
    with raw.connect(infinistore_server) as connection:
        assert raw.stored(connection, "key", b"value") == raw.STORED
        connection.sendall(raw.get("key") + next_request)
        assert is_frozen(infinistore_server)
    infinistore_server.kill()


@pytest.mark.slow
def test_large_values_read_by_many_freeze_it(infinistore_server: InfiniStoreServer) -> None:
    """Above 2 MiB, and with one request at a time on each connection: the last of more than eight chunks of 256 KiB may be on its way
    before the server has noted that it sent it, and the next request comes as a byte behind a GET. So no value is larger than that.
    """
    size = 2 * MIB + (MIB >> 2)
    with raw.connect(infinistore_server) as connection:
        assert raw.stored(connection, "key", bytes(size)) == raw.STORED
    frozen = threading.Event()

    def read() -> None:
        with raw.connect(infinistore_server, timeout_s=3) as connection:
            try:
                while not frozen.is_set():
                    raw.value_of(connection, "key")
            except (EOFError, OSError):
                frozen.set()

    readers = [threading.Thread(target=read) for _ in range(6)]
    for reader in readers:
        reader.start()
    assert frozen.wait(40)
    for reader in readers:
        reader.join(10)
    assert is_frozen(infinistore_server) or not infinistore_server.is_alive
    infinistore_server.kill()
