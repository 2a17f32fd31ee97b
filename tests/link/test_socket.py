from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import anyio
import pytest
from anyio import wait_all_tasks_blocked

from kvoffload.errors import PeerError
from kvoffload.link_frames import Beat, Goodbye, Knock, Welcome, encode
from kvoffload.link_socket import LINK_VERSION, LinkAddress, Listener, RawConnection, check_user, connect, listen
from kvoffload.testing.cancel import cancel_at_every_checkpoint

pytestmark = pytest.mark.anyio


def pair() -> tuple[RawConnection, RawConnection]:
    left, right = socket.socketpair()
    return RawConnection(left), RawConnection(right)


def is_gone(address: LinkAddress) -> bool:
    return f" @{address.name}\n" not in Path("/proc/net/unix").read_text()


async def accept_into(listener: Listener, accepted: list[RawConnection]) -> None:
    accepted.append(await listener.accept(10))


async def test_the_name_is_in_no_file_system_and_goes_with_the_first_connection() -> None:
    listener = listen()
    assert not is_gone(listener.address)
    assert listener.address.pid == os.getpid()
    accepted: list[RawConnection] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(accept_into, listener, accepted)
        connection = await connect(listener.address, 10)
    with pytest.raises(PeerError, match="cannot be reached"):
        await connect(listener.address, 10)
    await connection.send(b"through")
    assert await accepted[0].receive(100) == b"through"
    connection.close()
    accepted[0].close()
    assert is_gone(listener.address)


async def test_addresses_differ_and_hide_their_token() -> None:
    first, second = listen(), listen()
    assert first.address.token != second.address.token
    assert len(first.address.token) >= 16
    assert first.address.name != second.address.name
    assert repr(first.address.token) not in repr(first.address)
    first.close()
    second.close()


async def test_close_removes_everything_at_once_and_twice() -> None:
    listener = listen()
    listener.close()
    listener.close()
    assert is_gone(listener.address)
    with pytest.raises(PeerError, match="closed"):
        await listener.accept(10)
    with pytest.raises(PeerError, match="cannot be reached"):
        await connect(listener.address, 10)


async def test_close_ends_a_waiting_accept() -> None:
    listener = listen()

    async def expect_closed() -> None:
        with pytest.raises(PeerError, match="closed"):
            await listener.accept(None)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(expect_closed)
        await wait_all_tasks_blocked()
        thread = threading.Thread(target=listener.close)
        thread.start()
        thread.join()
    assert listener._socket.fileno() == -1


async def test_nobody_comes() -> None:
    listener = listen()
    with pytest.raises(PeerError, match="within 3600"):
        await listener.accept(3600)
    assert is_gone(listener.address)


@pytest.mark.parametrize(
    "first_words",
    [
        encode(Knock(LINK_VERSION, b"a wrong token")),
        encode(Knock(LINK_VERSION + 1, b"")),
        encode(Beat()),
        b"\xff" * 20,
        b"GET / HTTP/1.1\r\n\r\n",
        b"",  # and nothing more, for longer than anybody waits
    ],
)
async def test_one_that_does_not_know_the_token_is_turned_away_and_the_hub_still_comes(
    first_words: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    listener = listen()
    accepted: list[RawConnection] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(accept_into, listener, accepted)
        stranger = RawConnection(socket.socket(socket.AF_UNIX))
        stranger._socket.connect("\0" + listener.address.name)
        await stranger.send(first_words)
        await wait_all_tasks_blocked()
        assert not accepted
        hub = await connect(listener.address, 10)
    with suppress(PeerError):
        while True:
            await stranger.receive(100)
    assert "link_peer_turned_away" in caplog.text
    await hub.send(b"x")
    assert await accepted[0].receive(1) == b"x"
    for connection in (hub, stranger, accepted[0]):
        connection.close()


async def test_another_version_is_told_why() -> None:
    listener = listen()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(accept_into, listener, [])
        hub = RawConnection(socket.socket(socket.AF_UNIX))
        hub._socket.connect("\0" + listener.address.name)
        await hub.send(encode(Knock(99, listener.address.token)))
        with pytest.raises(PeerError, match="refused: this worker speaks version"):
            await hub.receive_message()
        tasks.cancel_scope.cancel()
    hub.close()
    assert is_gone(listener.address)


async def test_the_hub_checks_which_process_listens() -> None:
    listener = listen()
    with pytest.raises(PeerError, match=f"process {os.getpid()} listens"):
        await connect(replace(listener.address, pid=1), 10)
    listener.close()


async def test_another_user_is_refused() -> None:
    left, right = pair()
    assert left.peer() == (os.getpid(), os.geteuid())
    check_user(left)
    with pytest.raises(PeerError, match="runs as user"):
        check_user(left, uid=os.geteuid() + 1)
    left.peer = lambda: (0, os.geteuid())  # type: ignore[method-assign]
    with pytest.raises(PeerError, match="pid namespace"):
        check_user(left)
    left.close()
    right.close()


async def test_connecting_waits_for_a_full_queue_only_so_long() -> None:
    listener = listen()
    waiting = [RawConnection(socket.socket(socket.AF_UNIX)) for _ in range(20)]
    for connection in waiting:
        try:
            connection._socket.connect("\0" + listener.address.name)
        except BlockingIOError:
            break
    with pytest.raises(PeerError, match="within 7 s"):
        await connect(listener.address, 7)
    for connection in waiting:
        connection.close()
    listener.close()


async def test_accept_and_connect_may_be_cancelled_anywhere() -> None:
    made: list[Listener] = []

    async def meet() -> None:
        listener = listen()
        made.append(listener)
        accepted: list[RawConnection] = []
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(accept_into, listener, accepted)
                (await connect(listener.address, 10)).close()
        finally:
            listener.close()
            for connection in accepted:
                connection.close()

    def check(nth: int) -> None:
        assert is_gone(made[-1].address)
        assert made[-1]._socket.fileno() == -1

    await cancel_at_every_checkpoint(meet, check)
    assert len(made) > 1


async def test_descriptors_arrive_with_their_message_and_are_closed_on_exec() -> None:
    left, right = pair()
    memory = os.memfd_create("kvoffload-test")
    os.write(memory, b"shared")
    await left.send(encode(Welcome(5)), [memory])
    await left.send(encode(Beat()))
    message, [received] = await right.receive_message(descriptors=1)
    assert message == Welcome(5)
    assert fcntl.fcntl(received, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert os.pread(received, 6, 0) == b"shared"
    os.close(memory)
    os.close(received)
    assert await right.receive(100) == encode(Beat()), "the handshake reads no byte more than its own"
    left.close()
    right.close()


@pytest.mark.parametrize(("sent", "expected"), [(0, 1), (2, 1), (1, 0), (3, 2), (5, 2), (30, 2)])
async def test_another_number_of_descriptors_is_refused_and_none_is_left_open(sent: int, expected: int) -> None:
    left, right = pair()
    memory = os.memfd_create("kvoffload-test")
    await left.send(encode(Welcome(5)), [memory] * sent)
    os.close(memory)
    with pytest.raises(PeerError, match="descriptors"):
        await right.receive_message(descriptors=expected)
    left.close()
    right.close()


@pytest.mark.parametrize("then", [b"", encode(Welcome(5))[:-1], b"\xff\xff\xff\xff\xff", b"\x02\0\0\0\xf9\x90", encode(Goodbye("no"))])
async def test_descriptors_with_a_broken_message_are_closed(then: bytes) -> None:
    left, right = pair()
    memory = os.memfd_create("kvoffload-test")
    if then:
        await left.send(then, [memory])
    os.close(memory)
    left.close()
    with pytest.raises(PeerError):
        await right.receive_message(descriptors=1)
    right.close()


async def test_descriptors_are_closed_when_the_wait_for_the_rest_is_cancelled() -> None:
    left, right = pair()
    memory = os.memfd_create("kvoffload-test")
    await left.send(encode(Welcome(5))[:-1], [memory])
    os.close(memory)
    with anyio.move_on_after(3) as scope:
        await right.receive_message(descriptors=1)
    assert scope.cancelled_caught
    left.close()
    right.close()


async def test_a_large_send_waits_for_the_reader_and_arrives_whole() -> None:
    left, right = pair()
    data = os.urandom(5 << 20)
    received = bytearray()

    async def read() -> None:
        while len(received) < len(data):
            received.extend(await right.receive(1 << 16))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(left.send, data)
        await wait_all_tasks_blocked()
        tasks.start_soon(read)
    assert received == data
    left.close()
    right.close()


async def test_a_peer_that_is_gone() -> None:
    left, right = pair()
    right.close()
    with pytest.raises(PeerError):
        await left.receive(1)
    with pytest.raises(PeerError):
        await left.send(b"x")
    assert not left.send_nowait(b"x")
    left.close()
    assert left.is_closed


LISTEN = """
from kvoffload.link_socket import listen
listener = listen()
print(listener.address.name, flush=True)
input()
"""


async def test_nothing_is_left_of_a_process_that_is_killed_before_anybody_came(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", LISTEN], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        address = LinkAddress(process.stdout.readline().strip(), process.pid, b"")
        assert not is_gone(address)
        process.kill()
    assert is_gone(address)
    assert os.listdir(tmp_path) == []
