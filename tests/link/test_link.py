from __future__ import annotations

import gc
import os
import pickle
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import anyio
import pytest
from anyio import wait_all_tasks_blocked

from kvoffload.errors import MisuseError, PeerError
from kvoffload.ledger import Ledger
from kvoffload.link import (
    BEAT_S,
    LINK_VERSION,
    Hello,
    JoinedWorker,
    Link,
    LinkAddress,
    find_half,
    join_hub,
    register_half,
    serve_worker,
    unregister_half,
)
from kvoffload.link_frames import Beat, Goodbye, Welcome, encode
from kvoffload.link_socket import RawConnection
from kvoffload.messages import BlocksFilled, ConnectorOff, LoadFinished, LoadOutcome, ReleaseHit, SegmentGrown, SlotGrant
from kvoffload.testing.cancel import cancel_at_every_checkpoint

pytestmark = pytest.mark.anyio

GRANT = SlotGrant(1, (2, 3), (4, 5), (6, 7))
FILLED = BlocksFilled(1, 0, (2, 3), ())
HELLO = Hello(LINK_VERSION, 0, os.getpid(), b"digest", 4000, 4096, 64, 32, b"namespace")


def pair() -> tuple[RawConnection, RawConnection]:
    left, right = socket.socketpair()
    return RawConnection(left), RawConnection(right)


class End:
    """One end of a link under test, and what it was told."""

    def __init__(self, connection: RawConnection, accepts: tuple[type, ...], **options: Any) -> None:
        self.connection = connection
        self.link = Link(connection, "test", accepts, **({"clock": anyio.current_time} | options))
        self.received: list[object] = []
        self.has_three = anyio.Event()
        self.lost: list[str] = []

    def deliver(self, message: object) -> None:
        self.received.append(message)
        if len(self.received) == 3:
            self.has_three.set()

    async def run(self) -> None:
        await self.link.run(self.deliver, self.lost.append)


def make_ends(**options: Any) -> tuple[End, End]:
    left, right = pair()
    return End(left, (SlotGrant, ConnectorOff), **options), End(right, (BlocksFilled, LoadFinished, SegmentGrown, ConnectorOff), **options)


@asynccontextmanager
async def running(*ends: End) -> AsyncIterator[None]:
    async with anyio.create_task_group() as tasks:
        for end in ends:
            tasks.start_soon(end.run)
        yield
        tasks.cancel_scope.cancel()
    for end in ends:
        assert end.connection.is_closed


async def settle() -> None:
    """Less than a beat of virtual time: what is under way arrives."""
    await anyio.sleep(BEAT_S / 10)
    await wait_all_tasks_blocked()


# ------------------------------------------------------------ moving messages


async def test_messages_arrive_in_order_both_ways() -> None:
    worker, hub = make_ends()
    finished = [LoadFinished(job, 0, LoadOutcome.LOADED) for job in range(1000)]
    async with running(worker, hub):
        hub.link.send(GRANT)
        worker.link.send(FILLED)
        for message in finished:
            worker.link.send(message)
        worker.link.send(SegmentGrown(0, 9))
        await settle()
        assert worker.received == [GRANT]
        assert hub.received == [FILLED, *finished, SegmentGrown(0, 9)]


@pytest.mark.real_clock
async def test_what_was_sent_before_it_ran_and_from_threads_arrives() -> None:
    worker, hub = make_ends(clock=time.monotonic)
    worker.link.send(FILLED)
    thread = threading.Thread(target=worker.link.send, args=(SegmentGrown(0, 1),))
    thread.start()
    thread.join()
    async with running(worker, hub):
        await anyio.to_thread.run_sync(worker.link.send, SegmentGrown(0, 2))
        with anyio.fail_after(30):
            await hub.has_three.wait()
        assert hub.received == [FILLED, SegmentGrown(0, 1), SegmentGrown(0, 2)]


async def test_a_message_longer_than_a_frame_arrives() -> None:
    worker, hub = make_ends()
    huge = SlotGrant(1, tuple(range(100_000)), tuple(range(100_000)), tuple(range(2**40, 2**40 + 100_000)))
    async with running(worker, hub):
        hub.link.send(huge)
        await settle()
        assert worker.received == [huge]


async def test_what_cannot_cross_is_the_callers_error_and_the_link_lives() -> None:
    worker, hub = make_ends()
    async with running(worker, hub):
        with pytest.raises(MisuseError, match="ReleaseHit"):
            hub.link.send(ReleaseHit("r", 1))  # type: ignore[arg-type]
        with pytest.raises(MisuseError, match="too long"):
            hub.link.send(ConnectorOff("x" * (17 << 20)))
        hub.link.send(GRANT)
        await settle()
        assert worker.received == [GRANT]


# ------------------------------------------------------------ beats


async def test_both_ends_beat_and_an_idle_link_does_little_else() -> None:
    worker, hub = make_ends()
    async with running(worker, hub):
        await anyio.sleep(60)
        for end in (worker, hub):
            assert end.link.peer_age_s() <= BEAT_S
            sent = end.link.statistics()
            assert sent.handled == pytest.approx(60 / BEAT_S, abs=2)
            assert sent.peak == 1
            assert end.received == []


async def test_a_peer_that_hangs_grows_old_and_young_again() -> None:
    worker_connection, hub_connection = pair()
    hub = End(hub_connection, (BlocksFilled,))
    async with running(hub):
        await anyio.sleep(5)
        assert hub.link.peer_age_s() >= 4.9
        await worker_connection.send(encode(Beat()))
        await settle()
        assert hub.link.peer_age_s() < BEAT_S
        assert hub.lost == []
    worker_connection.close()


async def test_beats_do_not_pile_up_for_a_peer_that_does_not_read() -> None:
    worker_connection, hub_connection = pair()
    hub_connection._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    hub = End(hub_connection, (BlocksFilled,))
    async with running(hub):
        hub.link.send(ConnectorOff("x" * 100_000))
        await anyio.sleep(3600)
        assert hub.link.statistics().depth == 1
        assert hub.lost == []
    worker_connection.close()


async def test_a_peer_that_never_reads_is_given_up_when_too_much_waits() -> None:
    worker_connection, hub_connection = pair()
    hub = End(hub_connection, (BlocksFilled,), most_queued_bytes=1 << 20)
    async with running(hub):
        for _ in range(20):
            hub.link.send(ConnectorOff("x" * 100_000))
            await settle()
        assert len(hub.lost) == 1
        assert "does not read" in hub.lost[0]
    worker_connection.close()


# ------------------------------------------------------------ ends


async def test_a_peer_that_goes_is_reported_once() -> None:
    worker_connection, hub_connection = pair()
    hub = End(hub_connection, (BlocksFilled,))
    async with running(hub):
        await settle()
        worker_connection.close()
        await settle()
        hub.link.send(GRANT)
        await settle()
        assert len(hub.lost) == 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xff" * 100, "frame of"),
        (b"\x02\0\0\0\xc8\x90", "unknown tag"),
        (b"\x02\0\0\0\x00\x90", "malformed SlotGrant"),
        (encode(FILLED), "wrong way"),
        (encode(Welcome(1)), "wrong way"),
        (encode(Goodbye("maintenance")), "closed the link: maintenance"),
    ],
)
async def test_a_peer_that_breaks_the_protocol_is_lost_with_the_reason(data: bytes, reason: str) -> None:
    hub_connection, worker_connection = pair()
    worker = End(worker_connection, (SlotGrant,))
    async with running(worker):
        await hub_connection.send(encode(GRANT) + data + encode(GRANT))
        await settle()
        [lost] = worker.lost
        assert reason in lost
        assert worker.received in ([], [GRANT])
    hub_connection.close()


async def test_last_words_are_the_reason_even_when_writing_fails_first() -> None:
    hub_connection, worker_connection = pair()
    worker = End(worker_connection, (SlotGrant,))
    await hub_connection.send(encode(Goodbye("maintenance")))
    hub_connection.close()
    worker.link.send(FILLED)
    async with running(worker):
        await anyio.sleep(5)
        assert worker.lost == ["the peer closed the link: maintenance"]


async def test_close_writes_what_was_sent_says_goodbye_and_is_no_loss() -> None:
    worker, hub = make_ends()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run)
        tasks.start_soon(hub.run)
        await settle()
        for job in range(100):
            hub.link.send(replace(GRANT, job=job))
        hub.link.close()
        hub.link.close()
    assert hub.lost == []
    assert [message.job for message in worker.received if isinstance(message, SlotGrant)] == list(range(100))
    [lost] = worker.lost
    assert "closed the link" in lost
    hub.link.send(GRANT)


async def test_a_peer_that_goes_while_this_end_closes_is_no_loss() -> None:
    worker_connection, hub_connection = pair()
    hub = End(hub_connection, (BlocksFilled,))
    async with running(hub):
        await settle()
        hub.link.send(GRANT)
        hub.link.close()
        worker_connection.close()
        await anyio.sleep(5)
    assert hub.lost == []


async def test_cancelling_is_no_loss_here_and_a_goodbye_there() -> None:
    worker, hub = make_ends()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run)
        async with running(hub):
            await settle()
    assert hub.lost == []
    [lost] = worker.lost
    assert "stopped" in lost


async def test_an_error_of_deliver_is_raised_and_is_a_loss() -> None:
    worker, hub = make_ends()
    lost: list[str] = []

    def deliver(message: object) -> None:
        raise ZeroDivisionError("a bug")

    hub.link.send(GRANT)
    async with running(hub):
        with pytest.raises(ZeroDivisionError):
            await worker.link.run(deliver, lost.append)
        assert lost == ["a bug"]


async def test_a_link_runs_once() -> None:
    worker, hub = make_ends()
    async with running(worker, hub):
        await settle()
        with pytest.raises(MisuseError, match="once"):
            await worker.run()


async def test_it_may_be_cancelled_anywhere() -> None:
    ends: list[End] = []

    async def run() -> None:
        ends[:] = make_ends()
        ends[0].link.send(FILLED)
        ends[0].link.close()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ends[1].run)
            await ends[0].run()

    def check(nth: int) -> None:
        assert all(end.connection.is_closed for end in ends)
        for end in ends:
            assert len(end.lost) <= 1
        assert ends[1].received in ([], [FILLED])

    assert await cancel_at_every_checkpoint(run, check) >= 1
    assert ends[1].received == [FILLED]


# ------------------------------------------------------------ handshake


class Handshake:
    """Both ends of a handshake over a socket pair, and whatever came of each."""

    def __init__(self, hello: Hello = HELLO, num_blocks: int = 32) -> None:
        self.worker_connection, self.hub_connection = pair()
        self.hello = hello
        self.segment_fd = os.memfd_create("kvoffload-test-segment")
        os.ftruncate(self.segment_fd, 4096 * 64)
        self.ledger = Ledger(num_blocks)
        self.worker: tuple[Link, int] | PeerError | None = None
        self.hub: tuple[Link, JoinedWorker] | PeerError | None = None

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._serve)
            tasks.start_soon(self._join)

    async def _serve(self) -> None:
        try:
            self.worker = await serve_worker(self.worker_connection, self.hello, self.segment_fd)
        except PeerError as error:
            self.worker = error

    async def _join(self) -> None:
        try:
            self.hub = await join_hub(self.hub_connection, self.ledger)
        except PeerError as error:
            self.hub = error

    def close(self) -> None:
        if isinstance(self.worker, tuple):
            os.close(self.worker[1])
        if isinstance(self.hub, tuple):
            self.hub[1].close()
        self.worker = self.hub = None
        os.close(self.segment_fd)
        self.ledger.close()
        self.worker_connection.close()
        self.hub_connection.close()
        gc.collect()


async def test_the_handshake_exchanges_facts_and_memory() -> None:
    handshake = Handshake()
    await handshake.run()
    assert isinstance(handshake.worker, tuple)
    assert isinstance(handshake.hub, tuple)
    _, ledger_fd = handshake.worker
    _, joined = handshake.hub
    assert joined.hello == HELLO
    os.pwrite(handshake.segment_fd, b"kv", 100)
    assert os.pread(joined.segment_fd, 2, 100) == b"kv"
    handshake.ledger.bump([3])
    assert os.pread(ledger_fd, 8, 24) == (1).to_bytes(8, "little")
    for fd in (ledger_fd, joined.segment_fd, joined.process_fd):
        assert not os.get_inheritable(fd)
    handshake.close()


async def test_a_link_works_after_the_handshake() -> None:
    handshake = Handshake()
    await handshake.run()
    assert isinstance(handshake.worker, tuple)
    assert isinstance(handshake.hub, tuple)
    (worker, _), (hub, _) = handshake.worker, handshake.hub
    at_worker: list[object] = []
    at_hub: list[object] = []
    lost: list[str] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run, at_worker.append, lost.append)
        tasks.start_soon(hub.run, at_hub.append, lost.append)
        worker.send(FILLED)
        hub.send(GRANT)
        await settle()
        tasks.cancel_scope.cancel()
    assert (at_worker, at_hub) == ([GRANT], [FILLED])
    handshake.close()


@pytest.mark.parametrize(
    ("hello", "num_blocks", "reason"),
    [
        (replace(HELLO, version=LINK_VERSION + 1), 32, "version"),
        (HELLO, 33, "32 engine blocks, and the scheduler 33"),
        (replace(HELLO, slot_bytes=0), 32, "impossible"),
        (replace(HELLO, payload_bytes=5000), 32, "impossible"),
        (replace(HELLO, rank=-1), 32, "impossible"),
        (replace(HELLO, pid=1), 32, "pid"),
    ],
)
async def test_the_hub_refuses_and_both_ends_know_why(hello: Hello, num_blocks: int, reason: str) -> None:
    handshake = Handshake(hello, num_blocks)
    await handshake.run()
    assert isinstance(handshake.hub, PeerError)
    assert isinstance(handshake.worker, PeerError)
    assert reason in str(handshake.hub)
    assert reason in str(handshake.worker)
    assert handshake.worker_connection.is_closed
    assert handshake.hub_connection.is_closed
    handshake.close()


async def test_what_is_no_pidfd_is_refused() -> None:
    worker_connection, hub_connection = pair()
    memory = os.memfd_create("kvoffload-test")
    ledger = Ledger(32)
    await worker_connection.send(encode(HELLO), [memory, memory])
    with pytest.raises(PeerError, match="pidfd of None"):
        await join_hub(hub_connection, ledger)
    os.close(memory)
    ledger.close()
    worker_connection.close()


@pytest.mark.parametrize("words", [encode(Beat()), encode(Welcome(31)), b"\xff" * 9])
async def test_the_worker_refuses_a_wrong_answer(words: bytes) -> None:
    worker_connection, hub_connection = pair()
    memory = os.memfd_create("kvoffload-test")
    await hub_connection.send(words, [memory])
    with pytest.raises(PeerError):
        await serve_worker(worker_connection, HELLO, memory)
    os.close(memory)
    assert worker_connection.is_closed
    hub_connection.close()


@pytest.mark.parametrize("side", ["worker", "hub"])
async def test_a_handshake_with_a_silent_peer_ends(side: str) -> None:
    handshake = Handshake()
    await (handshake._serve() if side == "worker" else handshake._join())
    assert "within 10" in str(handshake.worker or handshake.hub)
    handshake.close()


async def test_the_handshake_may_be_cancelled_anywhere() -> None:
    handshakes: list[Handshake] = []

    def one_side(side: Callable[[Handshake], Any], other: Callable[[Handshake], Any]) -> Any:
        async def run() -> None:
            handshake = Handshake()
            handshakes.append(handshake)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(other, handshake)
                try:
                    await side(handshake)
                finally:
                    tasks.cancel_scope.cancel()

        return run

    def check(nth: int) -> None:
        handshakes[-1].close()

    # That no descriptor is left open is what the fixture of this directory sees to.
    assert await cancel_at_every_checkpoint(one_side(Handshake._serve, Handshake._join), check) >= 2
    assert await cancel_at_every_checkpoint(one_side(Handshake._join, Handshake._serve), check) >= 2


async def test_an_address_goes_through_vllms_pickle() -> None:
    address = LinkAddress("kvoffload-x", 5, b"token")
    assert pickle.loads(pickle.dumps(address)) == address


async def test_halves_of_one_process_meet_by_token() -> None:
    half = object()
    assert find_half(b"t") is None
    register_half(b"t", half)
    assert find_half(b"t") is half
    unregister_half(b"t")
    unregister_half(b"t")
    assert find_half(b"t") is None
