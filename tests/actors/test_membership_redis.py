"""Membership on a real server: absent, gone, frozen, empty, locked, and full of nonsense."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from tests.actors.test_membership import ONE, THREE, TWO
from tests.l2.test_nodes_table import MALFORMED

from kvoffload.actors.membership import Membership
from kvoffload.config import MembershipSettings
from kvoffload.l2.nodes_table import MOST_BYTES
from kvoffload.l2.table_source import RedisTable, Scrubber
from kvoffload.messages import NodesChanged
from kvoffload.testing.cancel import cancel_at_every_checkpoint
from kvoffload.testing.valkey import ValkeyServer, free_port


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    with ValkeyServer(requirepass="hunter2secret") as started:
        yield started


def quick(url: str, **other: object) -> MembershipSettings:
    return MembershipSettings.model_validate({"url": url, "poll_s": 0.02, "timeout_ms": 200, **other})


class Live:
    """A Membership that reads a real server, on the real clock."""

    def __init__(self, settings: MembershipSettings) -> None:
        self.said: list[NodesChanged] = []
        self.membership = Membership(settings, "redis", (), self.said.append, chance=lambda: 0.5)

    @property
    def names(self) -> list[str]:
        return ["".join(node.name for node in changed.ring.nodes) for changed in self.said]

    async def until(self, is_so: Callable[[], bool]) -> None:
        with anyio.fail_after(20):
            while not is_so():  # noqa: ASYNC110  # what happens elsewhere sets no event here
                await anyio.sleep(0.01)

    async def until_error(self, text: str) -> None:
        await self.until(lambda: text in (self.membership.statistics().last_error or ""))

    async def until_names(self, *names: str) -> None:
        await self.until(lambda: self.names == list(names) and self.membership.statistics().last_error is None)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.membership.run)
            yield
            tasks.cancel_scope.cancel()


def put(server: ValkeyServer, data: bytes) -> None:
    assert server.command("SET", "kvcache_nodes", data) == b"+OK"


@pytest.mark.asyncio
async def test_redis_absent_at_start_then_there_then_gone_then_empty_then_written_anew(caplog: pytest.LogCaptureFixture) -> None:
    server = ValkeyServer(port=free_port())
    live = Live(quick(server.url))
    async with live.running():
        await live.until_error("connect")
        assert live.said == []
        server.start()
        try:
            await live.until_error("no table under")
            put(server, THREE)
            await live.until_names("abc")
            server.kill()
            await live.until_error("connect")
            server.restart()
            await live.until_error("no table under")
            assert live.names == ["abc"]
            assert live.membership.statistics().version == 3
            put(server, ONE)
            await live.until_names("abc", "a")
        finally:
            server.stop()
    assert "Traceback" not in caplog.text


@pytest.mark.asyncio
async def test_a_frozen_redis_is_a_timeout_and_then_goes_on(server: ValkeyServer) -> None:
    put(server, ONE)
    live = Live(quick(server.url))
    async with live.running():
        await live.until_names("a")
        server.freeze()
        await live.until_error("imeout")
        server.thaw()
        put(server, TWO)
        await live.until_names("a", "ab")
        # frozen before the connection is made: the kernel accepts it, and nobody answers the login
        server.freeze()
        await live.until_error("imeout")
        before = live.membership.statistics().failures
        await live.until(lambda: live.membership.statistics().failures > before + 1)
        server.thaw()
        await live.until(lambda: live.membership.statistics().last_error is None)
        assert live.names == ["a", "ab"]


@pytest.mark.asyncio
async def test_a_wrong_password_is_said_and_never_shown(server: ValkeyServer, caplog: pytest.LogCaptureFixture) -> None:
    put(server, ONE)
    for url in (f"redis://:wr%40ngsecret@127.0.0.1:{server.port}", f"redis://127.0.0.1:{server.port}?password=wr%40ngsecret"):
        live = Live(quick(url))
        async with live.running():
            await live.until_error("password")
            error = live.membership.statistics().last_error or ""
            assert "ngsecret" not in error + caplog.text
    live = Live(quick(f"redis://127.0.0.1:{server.port}"))
    async with live.running():
        await live.until_error("uthentication required")


@pytest.mark.asyncio
async def test_a_key_of_another_type_and_one_that_is_huge(server: ValkeyServer) -> None:
    put(server, ONE)
    live = Live(quick(server.url))
    async with live.running():
        await live.until_names("a")
        server.command("DEL", "kvcache_nodes")
        server.command("HSET", "kvcache_nodes", "a", "b")
        await live.until_error("WRONGTYPE")
        server.command("DEL", "kvcache_nodes")
        await live.until_error("no table under")
        put(server, TWO)
        await live.until_names("a", "ab")
        put(server, b" " * (MOST_BYTES + 100))
        await live.until_error("larger than 1 MiB")
        assert live.membership.statistics().version == 2


@pytest.mark.asyncio
async def test_every_malformed_table_on_a_real_server(server: ValkeyServer) -> None:
    put(server, ONE)
    live = Live(quick(server.url))
    async with live.running():
        await live.until_names("a")
        for data, _ in MALFORMED.values():
            put(server, data)
            looks = live.membership.statistics().looks
            await live.until(lambda looks=looks: live.membership.statistics().looks > looks + 1)  # type: ignore[misc]
            assert live.membership.statistics().last_error is not None
            assert live.membership.statistics().version == 1
        put(server, TWO)
        await live.until_names("a", "ab")


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "url",
    ["redis://:sec/ret@h:1", "redis://:secret@h:port", "redis://:secret@h:1?socket_timeout=secret", "redis://:secret@[h", "unix://"],
)
async def test_a_url_that_is_none_is_said_without_its_password(url: str, caplog: pytest.LogCaptureFixture) -> None:
    live = Live(quick(url))
    async with live.running():
        await live.until(lambda: live.membership.statistics().failures > 1)
    assert live.membership.statistics().last_error
    shown = f"{live.membership.statistics().last_error}{caplog.text}"
    assert "sec" not in shown


@pytest.mark.asyncio
async def test_cancelled_anywhere_no_connection_stays(server: ValkeyServer) -> None:
    put(server, ONE)
    sources: list[RedisTable] = []
    said: list[NodesChanged] = []

    def open_source(settings: MembershipSettings) -> RedisTable:
        sources.append(RedisTable(settings))
        return sources[-1]

    async def run() -> None:
        with anyio.move_on_after(0.1):
            await Membership(quick(server.url), "redis", (), said.append, source=open_source).run()

    async def check(nth: int) -> None:
        assert sources[-1]._client is None
        until = time.monotonic() + 5
        while time.monotonic() < until:  # the server notices a moment later; the one that asks is a connection too
            listed = server.command("INFO", "clients")
            if listed.startswith(b"$") and await clients(server) == 1:
                return
            await anyio.sleep(0.01)
        raise AssertionError("a connection stayed open")

    assert await cancel_at_every_checkpoint(run, check) > 3
    assert said


async def clients(server: ValkeyServer) -> int:
    from redis.asyncio import Redis

    async with Redis.from_url(server.url, protocol=2) as asking:
        return len(await asking.client_list())


@pytest.mark.parametrize("url", ["redis://me:p%40ss%2Fw@h:1/2", "redis://h:1?password=p%40ss%2Fw", "rediss://:p%40ss%2Fw@h"])
def test_foreign_texts_lose_the_password_however_it_is_written(url: str) -> None:
    scrubbed = Scrubber(quick(url))(f"cannot reach {url} with p@ss/w or p%40ss%2Fw: refused")
    assert "p@ss" not in scrubbed
    assert "p%40ss" not in scrubbed
    assert scrubbed.startswith("cannot reach ***")
    assert scrubbed.endswith(": refused")


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for 127.0.0.1, signed by itself; its key is beside it."""
    if shutil.which("openssl") is None:
        pytest.skip("makes a certificate with openssl, which is not here")
    path = tmp_path / "certificate"
    asked = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=test"]
    files = ["-keyout", str(path.with_suffix(".key")), "-out", str(path)]
    made = ["openssl", "req", *asked, "-addext", "subjectAltName=IP:127.0.0.1", *files]
    subprocess.run(made, check=True, capture_output=True, timeout=30)
    return path


@pytest.mark.asyncio
async def test_tls_and_password_come_from_the_url(server: ValkeyServer, certificate: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    put(server, ONE)
    async with await asyncio.start_server(lambda *ends: forward(server.port, *ends), "127.0.0.1", 0, ssl=context) as front:
        port = front.sockets[0].getsockname()[1]
        trusting = Live(quick(f"rediss://:hunter2secret@127.0.0.1:{port}?ssl_ca_certs={certificate}", timeout_ms=2000))
        async with trusting.running():
            await trusting.until_names("a")
        doubting = Live(quick(f"rediss://:hunter2secret@127.0.0.1:{port}", timeout_ms=2000))
        async with doubting.running():
            await doubting.until_error("CERTIFICATE_VERIFY_FAILED")
    plain = Live(quick(f"rediss://:hunter2secret@127.0.0.1:{server.port}"))
    async with plain.running():
        await plain.until(lambda: plain.membership.statistics().failures > 1)


async def forward(port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """TLS in front, the server behind: the bundled one has none."""
    behind_reader, behind_writer = await asyncio.open_connection("127.0.0.1", port)

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(1 << 16):
                sink.write(data)
                await sink.drain()
        except OSError:
            pass  # the other end went away, as it does in the end
        finally:
            sink.close()

    await asyncio.gather(pump(reader, behind_writer), pump(behind_reader, writer))
