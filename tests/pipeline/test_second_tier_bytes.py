"""Values that are not what they should be are misses, counted, through whole engines: damaged, mixed up, half written, forged."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import xxhash
from tests.infinistore import raw
from tests.pipeline.engines import COUNT, Engine, engine
from tests.pipeline.sites import KINDS, FakeSite, InfiniStoreSite, RedisSite, Site, open_site

from kvoffload.envelope import Fault
from kvoffload.l2.infinistore_wire import pack_pointer, value_key
from kvoffload.l2.node import Outcome
from kvoffload.layout import HEADER_BYTES
from kvoffload.testing.fake_node import NodeFault

pytestmark = pytest.mark.asyncio

OLD, NEW, BAD = 1, 2, 5
"""Two prompts, and the place of the block that is not right."""
SECRET: dict[str, Any] = {"secret": "of these engines, and of no other"}
TAG_AT = HEADER_BYTES - 16


@pytest.fixture(params=KINDS)
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """One that other tests use too."""
    yield from open_site(request, is_mortal=False)


async def serves(writer: Engine, reader: Engine) -> None:
    assert await writer.write(1000) == COUNT
    await reader.load_all(1000)


def flipped(value: bytes, byte: int) -> bytes:
    return value[:byte] + bytes([value[byte] ^ 0x10]) + value[byte + 1 :]


def resealed(value: bytes) -> bytes:
    """Altered, by somebody who knows the format and has no secret."""
    altered = flipped(value, HEADER_BYTES + 999)
    return altered[:TAG_AT] + xxhash.xxh3_128_digest(altered[:TAG_AT] + altered[HEADER_BYTES:]) + altered[HEADER_BYTES:]


DAMAGES: dict[str, tuple[Callable[[bytes, bytes], bytes], Fault | Outcome]] = {
    "truncated": (lambda value, other: value[: len(value) // 2], Outcome.MALFORMED),
    "too long": (lambda value, other: value + b"x", Outcome.MALFORMED),
    "a bit of the payload": (lambda value, other: flipped(value, 40_000), Fault.TAG),
    "a bit of the tag": (lambda value, other: flipped(value, TAG_AT), Fault.TAG),
    "the first bit": (lambda value, other: flipped(value, 0), Fault.MAGIC),
    "second half zeros": (lambda value, other: value[: len(value) // 2].ljust(len(value), b"\0"), Fault.TAG),
    "another key's": (lambda value, other: other, Fault.KEY),
    "another key's payload": (lambda value, other: value[:HEADER_BYTES] + other[HEADER_BYTES:], Fault.TAG),
    "nonsense": (lambda value, other: b"nonsense".ljust(len(value), b"!"), Fault.MAGIC),
}


def seen(reader: Engine, what: Fault | Outcome) -> int:
    reads = reader.node.reads
    return reads.faults[what] if isinstance(what, Fault) else reads.outcomes[what]


def damage(site: Site, names: list[str], how: Callable[[bytes, bytes], bytes], place: int = BAD) -> None:
    value, other = site.get(names[place]), site.get(names[place + 1])
    assert value is not None
    assert other is not None
    site.put(names[place], how(value, other))


@pytest.mark.parametrize("secret", [{}, SECRET], ids=["sums", "secret"])
async def test_damaged_on_the_node(site: Site, secret: dict[str, Any]) -> None:
    """And written again by whoever computed it then: nobody would, if it stayed there."""
    async with engine(site, **secret) as writer, engine(site, **secret) as reader, engine(site, **secret) as third:
        for prompt, (how, what) in enumerate(DAMAGES.values()):
            assert await writer.write(prompt) == COUNT
            damage(site, writer.names(prompt), how)
            assert await reader.load(prompt) == BAD, how
            assert seen(reader, what), f"{what} was not counted; {reader.node.reads}"
            assert await reader.write(prompt) >= COUNT - BAD
            await third.load_all(prompt)
        await serves(writer, reader)
        for each in (writer, reader, third):
            await each.check()


@pytest.mark.parametrize("fault", [NodeFault.TRUNCATED, NodeFault.FLIPPED, NodeFault.OTHER_KEY, NodeFault.MALFORMED, NodeFault.ABSENT])
async def test_a_client_that_lies_about_reads(fault: NodeFault) -> None:
    site = FakeSite()
    async with engine(site) as writer, engine(site) as reader:
        assert await writer.write(OLD) == COUNT
        site.fail("read", fault)
        site.fail("discard", NodeFault.ERROR)  # what is right there would go: to be lied to is no proof, but a miss is no harm
        assert await reader.load(OLD) == 0
        site.fail("read", NodeFault.NONE)
        await reader.load_all(OLD)
        for each in (writer, reader):
            await each.check()


@pytest.mark.parametrize("fault", [NodeFault.HALF_WRITTEN, NodeFault.LOST, NodeFault.ERROR])
async def test_writes_that_went_wrong(fault: NodeFault) -> None:
    site = FakeSite()
    async with engine(site) as writer, engine(site) as reader:
        site.fail("write", fault)
        await writer.write(OLD)
        site.fail("write", NodeFault.NONE)
        assert await reader.load(OLD) == 0
        if fault is NodeFault.HALF_WRITTEN:
            assert seen(reader, Fault.TAG) == COUNT
        await serves(writer, reader)
        for each in (writer, reader):
            await each.check()


# ---------------------------------------------------------------- somebody dies in the middle of a put


NONCE = b"0123456789abcdef"


def die_in_a_command(site: RedisSite, name: str) -> None:
    """A client that goes away when half of a value is sent."""
    with socket.create_connection(("127.0.0.1", site.server.port)) as connection:
        connection.sendall(b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$65600\r\n" % (len(name), name.encode()) + bytes(30_000))


def die_in_a_value(site: InfiniStoreSite, name: str) -> None:
    with raw.connect(site.server) as connection:
        connection.sendall(raw.put(value_key(name.encode(), NONCE).decode(), bytes(65_600))[:-30_000])


def die_before_the_pointer(site: InfiniStoreSite, name: str) -> None:
    with raw.connect(site.server) as connection:
        assert raw.stored(connection, value_key(name.encode(), NONCE).decode(), bytes(65_600)) == raw.STORED


@pytest.mark.parametrize(
    ("site", "die"),
    [("redis", die_in_a_command), ("infinistore", die_in_a_value), ("infinistore", die_before_the_pointer)],
    indirect=["site"],
)
async def test_half_written(site: Site, die: Callable[[Site, str], None]) -> None:
    """What is half there is not there, and is written by whoever computes it next."""
    async with engine(site) as writer, engine(site) as reader:
        for name in writer.names(OLD):
            die(site, name)
        assert await reader.load(OLD) == 0
        assert await writer.write(OLD) == COUNT
        await reader.load_all(OLD)
        for each in (writer, reader):
            await each.check()


@pytest.mark.parametrize("site", ["infinistore"], indirect=True)
async def test_pointers_without_a_value(site: InfiniStoreSite) -> None:
    """As after an eviction of the value alone: whoever wants to read it takes the pointer away, so that it can be written again."""
    async with engine(site) as writer, engine(site) as reader:
        with raw.connect(site.server) as connection:
            for name in writer.names(OLD):
                assert raw.stored(connection, name, pack_pointer(NONCE, 65_600)) == raw.STORED
            assert await reader.load(OLD) == 0
            await reader.until(lambda: not any(raw.exists(connection, name) for name in writer.names(OLD)), "the pointers are gone")
        assert await writer.write(OLD) == COUNT
        await reader.load_all(OLD)
        for each in (writer, reader):
            await each.check()


# ---------------------------------------------------------------- with a secret


@pytest.mark.parametrize("theirs", [{}, {"secret": "of somebody who has another"}], ids=["no secret", "another secret"])
async def test_forged(site: Site, theirs: dict[str, Any]) -> None:
    """Somebody without the secret writes blocks of his own under the names of ours."""
    async with engine(site, **theirs) as forger, engine(site, **SECRET) as reader:
        forger.lie = 1_000_000
        assert await forger.write(OLD) == COUNT
        for his, ours in zip(forger.names(OLD), reader.names(OLD), strict=True):
            value = site.get(his)
            assert value is not None
            site.put(ours, value)
        assert await reader.load(OLD) == 0
        assert seen(reader, Fault.TAG if theirs else Fault.FLAGS)
        async with engine(site, **SECRET) as writer:
            await serves(writer, reader)
        await reader.check()


async def test_without_the_secret_it_would_work(site: Site) -> None:
    """So the test above can fail: sums are no protection against somebody who means it."""
    async with engine(site) as forger, engine(site) as reader:
        forger.lie = 1_000_000
        assert await forger.write(OLD) == COUNT
        with pytest.raises(AssertionError, match="block 0 of prompt 1 is wrong"):
            await reader.load(OLD)


@pytest.mark.parametrize(
    ("how", "fault"),
    [(lambda value, other: resealed(value), Fault.TAG), (lambda value, other: other, Fault.KEY)],
    ids=["altered and summed anew", "replayed under another key"],
)
async def test_altered_by_somebody_who_means_it(site: Site, how: Callable[[bytes, bytes], bytes], fault: Fault) -> None:
    async with engine(site, **SECRET) as writer, engine(site, **SECRET) as reader:
        assert await writer.write(OLD) == COUNT
        damage(site, writer.names(OLD), how)
        assert await reader.load(OLD) == BAD
        assert seen(reader, fault)
        await serves(writer, reader)


async def test_replayed_with_the_header_rewritten(site: Site) -> None:
    """The key in the header is the wanted one; the tag was made over another."""
    async with engine(site, **SECRET) as writer, engine(site, **SECRET) as reader:
        assert await writer.write(OLD) == COUNT
        damage(site, writer.names(OLD), lambda value, other: value[:TAG_AT] + other[TAG_AT:])
        assert await reader.load(OLD) == BAD
        assert seen(reader, Fault.TAG)
