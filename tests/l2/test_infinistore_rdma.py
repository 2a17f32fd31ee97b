"""InfiniStore over RDMA: the real child process, with stand-ins for the native client and the server. What goes wrong, does so there."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from tests.infinistore import environment
from tests.infinistore.server import InfiniStoreServer

import kvoffload
from kvoffload.config import L2Settings
from kvoffload.errors import MisuseError, PeerError, UnsupportedError
from kvoffload.l2.infinistore_rdma import InfiniStoreRdmaNode, RdmaSettings
from kvoffload.l2.node import Item, NodeUnreachable, Outcome
from kvoffload.l2.nodes import make_node
from kvoffload.l2.rdma_devices import Device, devices_here
from kvoffload.l2.rdma_memory import Memory
from kvoffload.l2.rdma_process import Launch
from kvoffload.l2.rdma_tether import MOST_ASKED, Tether
from kvoffload.l2.ring import NodeAddress
from kvoffload.runtime.shared import SegmentView
from kvoffload.segment import Segment
from kvoffload.testing.rdma_server import NATIVE, RdmaServer, stand_in
from kvoffload.testing.valkey import free_port

pytestmark = pytest.mark.asyncio

SLOT = 4096
SLACK_S = 3.0
PAINT = 0xA7


@pytest.fixture(scope="module")
def running() -> Iterator[RdmaServer]:
    with RdmaServer() as server:
        yield server


@pytest.fixture
def server(running: RdmaServer) -> RdmaServer:
    running.reset()
    return running


@pytest.fixture(scope="module")
def segment() -> Iterator[Segment]:
    made = Segment.create(16 << 20, SLOT)
    yield made
    made.close()


class Rig:
    """Nodes of one server and one segment, in short."""

    def __init__(self, server: RdmaServer, segment: Segment) -> None:
        self.server = server
        self.segment = segment
        self._next = 0

    @asynccontextmanager
    async def node(self, spawn: Launch | None = None, port: int | None = None, **settings: Any) -> AsyncIterator[InfiniStoreRdmaNode]:
        given = RdmaSettings(**({"patience_s": 0.3, "silence_s": 0.5, "start_timeout_s": 10.0} | settings))
        node = InfiniStoreRdmaNode(
            "n",
            "127.0.0.1",
            port or self.server.port,
            value_bytes=SLOT,
            segments=[self.segment],
            settings=given,
            spawn=spawn or stand_in(),
        )
        try:
            yield node
        finally:
            await node.close()

    def empty(self, names: Sequence[str]) -> list[Item]:
        """Slots that no other items of this test have."""
        first, self._next = self._next, self._next + len(names)
        items = [Item(name, self.segment.slot(first + index).data) for index, name in enumerate(names)]
        for item in items:
            item.buffer[:] = bytes(SLOT)
        return items

    def full(self, names: Sequence[str]) -> list[Item]:
        items = self.empty(names)
        for item in items:
            item.buffer[:] = value_of(item.name)
        return items

    async def stored(self, node: InfiniStoreRdmaNode, names: Sequence[str]) -> None:
        assert await node.write(self.full(names), soon()) == [Outcome.DONE] * len(names)

    async def serves(self, node: InfiniStoreRdmaNode, name: str = "served") -> None:
        """Some time soon a value can be written and read again."""
        with anyio.fail_after(15):
            while True:
                wrote = await node.write(self.full([name]), soon())
                items = self.empty([name])
                if wrote == await node.read(items, soon()) == [Outcome.DONE]:
                    break
                await anyio.sleep(0.02)
        assert bytes(items[0].buffer) == value_of(name)


@pytest.fixture
def rig(server: RdmaServer, segment: Segment) -> Rig:
    return Rig(server, segment)


def value_of(name: str) -> bytes:
    return (name.encode() + b".").ljust(64, b"-") * (SLOT // 64)


def names(count: int, prefix: str = "key") -> list[str]:
    return [f"{prefix}{index}" for index in range(count)]


def soon(seconds: float = 15.0) -> float:
    return time.monotonic() + seconds


def paint(items: Sequence[Item]) -> None:
    for item in items:
        item.buffer[:] = bytes([PAINT]) * SLOT


def is_painted(items: Sequence[Item]) -> bool:
    return all(bytes(item.buffer) == bytes([PAINT]) * SLOT for item in items)


def are_right(items: Sequence[Item], outcomes: Sequence[Outcome]) -> bool:
    return all(bytes(item.buffer) == value_of(item.name) for item, outcome in zip(items, outcomes, strict=True) if outcome is Outcome.DONE)


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


async def eventually_gone(pid: int) -> bool:
    with anyio.move_on_after(10):
        while not is_gone(pid):  # noqa: ASYNC110  (it is nobody's child here)
            await anyio.sleep(0.01)
    return is_gone(pid)


# ---------------------------------------------------------------- batches


async def test_only_what_is_there_is_read_and_only_what_is_not_is_written(rig: Rig) -> None:
    """A batch that lacks a key costs the server what it had found of it; a key written twice is lost when the older one is evicted."""
    async with rig.node() as node:
        await rig.stored(node, names(8)[::2])
        await rig.stored(node, names(8))
        items = rig.empty([*names(8), "absent"])
        outcomes = await node.read(items, soon())
        assert outcomes == [Outcome.DONE] * 8 + [Outcome.ABSENT]
        assert are_right(items, outcomes)
        seen = rig.server.statistics()
        assert seen["writes"] == [4, 4]
        assert seen["reads"] == [8]
        assert (seen["pinned"], seen["overwritten"]) == (0, 0)


async def test_a_name_twice_in_one_write_is_written_once(rig: Rig) -> None:
    async with rig.node() as node:
        await rig.stored(node, ["a", "b", "a"])
        assert rig.server.statistics()["writes"] == [2]


async def test_what_is_evicted_between_the_question_and_the_read_costs_its_neighbours_nothing(rig: Rig) -> None:
    async with rig.node() as node:
        await rig.stored(node, names(6))
        rig.server.forget("key3")
        rig.server.deny("key3")
        items = rig.empty(names(6))
        outcomes = await node.read(items, soon())
        assert outcomes == [Outcome.DONE] * 3 + [Outcome.ABSENT] + [Outcome.DONE] * 2
        assert are_right(items, outcomes)
        assert rig.server.statistics()["reads"] == [6, 1, 1, 1, 1, 1, 1]


async def test_one_request_at_a_time_whatever_is_asked_at_once(rig: Rig) -> None:
    """Two at once, and the client takes the refusal of one for that of the other."""
    async with rig.node() as node:

        async def one(index: int) -> None:
            await rig.stored(node, names(4, f"call{index}-"))
            items = rig.empty([*names(4, f"call{index}-"), f"absent{index}"])
            assert await node.read(items, soon()) == [Outcome.DONE] * 4 + [Outcome.ABSENT]
            assert are_right(items[:4], [Outcome.DONE] * 4)

        async with anyio.create_task_group() as group:
            for index in range(12):
                group.start_soon(one, index)
        assert rig.server.statistics()["most_in_flight"] == 1


async def test_reads_go_before_writes_that_wait(rig: Rig) -> None:
    async with rig.node() as node:
        await rig.stored(node, ["old"])
        rig.server.rule("write", "late:0.3")
        first = asyncio.ensure_future(node.write(rig.full(["first"]), soon()))
        await until(lambda: "first" in rig.server.statistics()["order"])
        second = asyncio.ensure_future(node.write(rig.full(["second"]), soon()))
        await asyncio.sleep(0)
        read = rig.empty(["old"])
        assert await node.read(read, soon()) == [Outcome.DONE]
        assert await first == await second == [Outcome.DONE]
        assert rig.server.statistics()["order"] == ["old", "first", "old", "second"]


async def until(is_so: Any) -> None:
    with anyio.fail_after(10):
        while not is_so():  # noqa: ASYNC110  (another process' doing)
            await anyio.sleep(0.01)


async def test_a_short_value_is_not_taken_for_a_whole_one(rig: Rig) -> None:
    """The server writes as much as it has, and says nothing of it: its end may be any byte, the one that is looked for too."""
    async with rig.node() as node:
        endings = bytes(range(256))
        short = [Item(f"short{byte}", rig.empty(["x"])[0].buffer[: SLOT - 1]) for byte in endings]
        whole = [Item(f"whole{byte}", rig.empty(["x"])[0].buffer) for byte in endings]
        for byte, *both in zip(endings, short, whole, strict=True):
            for item in both:
                item.buffer[-1] = byte
        assert set(await node.write([*short, *whole], soon())) == {Outcome.DONE}
        items = rig.empty([item.name for item in short])
        assert set(await node.read(items, soon())) == {Outcome.MALFORMED}
        items = rig.empty([item.name for item in whole])
        assert set(await node.read(items, soon())) == {Outcome.DONE}
        assert bytes(item.buffer[-1] for item in items) == endings


async def test_a_full_server_loses_writes_and_serves_reads(rig: Rig) -> None:
    async with rig.node() as node:
        await rig.stored(node, names(3))
        pid = node.child_pid
        rig.server.rule("write", "code:507")
        assert await node.write(rig.full(names(6)), soon()) == [Outcome.DONE] * 3 + [Outcome.FULL] * 3
        items = rig.empty(names(3))
        assert await node.read(items, soon()) == [Outcome.DONE] * 3
        assert node.child_pid == pid


# ---------------------------------------------------------------- memory


async def test_memory_outside_of_the_segments_fails(rig: Rig) -> None:
    async with rig.node() as node:
        (good,) = rig.full(["good"])
        foreign = Item("foreign", memoryview(bytearray(SLOT)))
        array = rig.segment.array
        stepped = Item("stepped", array[: 2 * SLOT : 2].data)
        beyond = Item("nothing", array[:0].data)
        outcomes = await node.write([foreign, good, stepped, beyond], soon())
        assert outcomes == [Outcome.FAILED, Outcome.DONE, Outcome.FAILED, Outcome.FAILED]
        assert await node.find(["foreign", "good"], soon()) == [False, True]
        with pytest.raises(MisuseError, match="cannot be written"):
            await node.read([Item("good", good.buffer.toreadonly())], soon())
        assert await node.write([Item("also", good.buffer.toreadonly())], soon()) == [Outcome.DONE]


async def test_places_in_segments() -> None:
    first, second = Segment.create(8 * SLOT, SLOT), Segment.create(4 * SLOT, SLOT)
    memory = Memory([first, second], region_bytes=3 * SLOT + 1)
    try:
        assert memory.regions == [(8 * SLOT, 3 * SLOT), (4 * SLOT, 3 * SLOT)]
        assert memory.locate(first.slot(5).data) == (0, 5 * SLOT)
        assert memory.locate(second.slot(3)[64:].data) == (1, 3 * SLOT + 64)
        assert memory.locate(first.array[2 * SLOT : 4 * SLOT].data) is None  # two regions
        assert memory.locate(memoryview(bytearray(SLOT))) is None
        first.close()
        assert os.fstat(memory.fds[0]).st_size == 8 * SLOT  # of its own
    finally:
        memory.close()
        memory.close()
        second.close()
    with pytest.raises(MisuseError, match="segments"):
        Memory([])


async def test_a_region_that_cannot_be_registered_fails_its_values_and_no_questions(rig: Rig) -> None:
    rig.server.rule("register", "raise:no memlock")
    async with rig.node() as node:
        assert await node.write(rig.full(names(2)), soon()) == [Outcome.FAILED] * 2
        assert await node.find(names(2), soon()) == [False, False]


# ---------------------------------------------------------------- clients that misbehave

ENDS = ["segv", "exit", "raise:boom", "code:500", "code:-1"]
STAYS = ["stop", "hang", "scribble"]


@pytest.mark.parametrize("op", ["read", "write"])
@pytest.mark.parametrize("do", ENDS)
async def test_a_client_that_dies_of_a_call_costs_a_moment(rig: Rig, op: str, do: str) -> None:
    """The call is made once more, with another child: nobody touches its buffers any more."""
    async with rig.node() as node:
        await rig.stored(node, names(3))
        pid = node.child_pid
        rig.server.rule(op, do)
        items = rig.empty(names(3)) if op == "read" else rig.full(names(3, "new"))
        outcomes = await (node.read if op == "read" else node.write)(items, soon())
        assert outcomes == [Outcome.DONE] * 3
        assert are_right(items, outcomes)
        assert node.child_pid != pid
        assert pid is not None
        assert is_gone(pid)


@pytest.mark.slow
@pytest.mark.parametrize("do", ENDS)
async def test_a_client_that_dies_of_every_call(rig: Rig, do: str) -> None:
    rig.server.rule("write", do, count=1000)
    async with rig.node() as node:
        for _ in range(3):
            assert await node.write(rig.full(names(2)), soon()) == [Outcome.FAILED] * 2
        started = time.monotonic()
        outcomes = [await node.write(rig.full(names(2)), soon()) for _ in range(20)]
        assert outcomes == [[Outcome.FAILED] * 2] * 20
        assert time.monotonic() - started < 10  # most were not even tried
        rig.server.reset()
        await rig.serves(node)


@pytest.mark.parametrize("op", ["read", "write"])
@pytest.mark.parametrize("do", STAYS)
async def test_a_client_that_does_not_let_go_is_killed_and_its_buffers_are_unsettled_until_then(rig: Rig, op: str, do: str) -> None:
    async with rig.node() as node:
        await rig.stored(node, names(3))
        pid = node.child_pid
        assert pid is not None
        rig.server.rule(op, do)
        items = rig.empty(names(3)) if op == "read" else rig.full(names(3, "new"))
        started = time.monotonic()
        outcomes = await (node.read if op == "read" else node.write)(items, soon(0.2))
        assert time.monotonic() - started < 0.2 + SLACK_S
        assert outcomes == [Outcome.UNSETTLED] * 3
        assert not is_gone(pid)
        with anyio.fail_after(0.3 + SLACK_S):
            await node.settle()
        assert is_gone(pid)
        paint(items)
        await rig.serves(node)
        assert is_painted(items)


async def test_a_late_writer_never_meets_a_slot_that_is_used_again(rig: Rig) -> None:
    """First that there is something to be afraid of: before it is settled the buffer does change under its owner's hands."""
    async with rig.node(patience_s=1.0) as node:
        await rig.stored(node, ["key"])
        rig.server.rule("read", "scribble")
        items = rig.empty(["key"])
        assert await node.read(items, soon(0.1)) == [Outcome.UNSETTLED]
        paint(items)
        await until(lambda: not is_painted(items))
        await node.settle()
        paint(items)
        await anyio.sleep(0.1)  # for a writer that writes every millisecond
        assert is_painted(items)


async def test_a_client_that_is_late_is_waited_for(rig: Rig) -> None:
    """It ends what it had begun before anybody loses patience, and goes on to serve."""
    async with rig.node(patience_s=30.0) as node:
        await rig.stored(node, names(2))
        pid = node.child_pid
        rig.server.rule("read", "late:0.5")
        items = rig.empty(names(2))
        assert await node.read(items, soon(0.1)) == [Outcome.UNSETTLED] * 2
        paint(items)
        await node.settle()
        assert not is_painted(items)  # it did write late
        paint(items)
        await rig.serves(node)
        assert node.child_pid == pid
        assert is_painted(items)


async def test_what_waits_behind_a_client_that_hangs_is_late_and_settled(rig: Rig) -> None:
    async with rig.node(patience_s=30.0) as node:
        await rig.stored(node, names(2))
        rig.server.rule("read", "hang")
        hung, waiting = rig.empty(names(2)), rig.empty(names(2))
        call = asyncio.ensure_future(node.read(hung, soon(0.2)))
        await until(lambda: rig.server.statistics()["reads"] == [2])
        assert await node.read(waiting, soon(0.1)) == [Outcome.LATE] * 2
        assert await call == [Outcome.UNSETTLED] * 2
        assert await node.find(names(2), soon()) == [True, True]  # questions do not wait for transfers


async def test_a_cancelled_call_takes_its_memory_along(rig: Rig) -> None:
    async with rig.node(patience_s=30.0) as node:
        await rig.stored(node, ["key"])
        rig.server.rule("read", "scribble")
        items = rig.empty(["key"])
        with anyio.move_on_after(0.2) as scope:
            await node.read(items, soon())
        assert scope.cancelled_caught
        paint(items)
        await rig.serves(node)
        assert is_painted(items)


async def test_it_is_closed_while_a_client_scribbles(rig: Rig) -> None:
    async with rig.node(patience_s=30.0) as node:
        await rig.stored(node, ["key"])
        rig.server.rule("read", "scribble")
        items = rig.empty(["key"])
        assert await node.read(items, soon(0.1)) == [Outcome.UNSETTLED]
        with anyio.fail_after(SLACK_S):
            await node.close()
            await node.settle()
        paint(items)
        await anyio.sleep(0.05)
        assert is_painted(items)


async def test_a_child_that_is_killed_while_idle_goes_unnoticed(rig: Rig) -> None:
    async with rig.node() as node:
        await rig.stored(node, names(3))
        assert node.child_pid is not None
        os.kill(node.child_pid, signal.SIGKILL)
        assert await node.find(names(3), soon()) == [True] * 3


# ---------------------------------------------------------------- connecting


@pytest.mark.slow
@pytest.mark.parametrize("do", ["segv", "exit", "raise:boom", "hang", "stop"])
async def test_a_client_that_cannot_connect(rig: Rig, do: str) -> None:
    rig.server.rule("connect", do, count=1000)
    async with rig.node(start_timeout_s=2.0) as node:
        assert await node.find(["x"], soon()) is None
        assert await node.write(rig.full(["x"]), soon()) == [Outcome.FAILED]  # a pause
        with pytest.raises(NodeUnreachable, match=f"127.0.0.1:{rig.server.port} over RDMA") as failure:
            await node.ping(soon())
        said = {
            "segv": "SIGSEGV",
            "exit": "exited with 1",
            "raise:boom": "boom",
            "hang": "not connected within",
            "stop": "not connected within",
        }
        assert said[do] in str(failure.value)
        rig.server.reset()
        await rig.serves(node)


async def test_a_server_that_is_not_there_costs_no_process_for_each_try(rig: Rig) -> None:
    async with rig.node(port=free_port()) as node:
        assert await node.find(["x"], soon()) is None
        pid = node.child_pid
        for _ in range(3):
            with pytest.raises(NodeUnreachable, match="cannot connect to"):
                await node.ping(soon())
        assert node.child_pid == pid


async def test_how_the_client_is_told_of_device_link_and_port(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "class/infiniband/mlx5_3").mkdir(parents=True)
    async with rig.node(device=Device("mlx5_3", 7), link_type="IB", ib_port=2, sysfs=tmp_path) as node:
        await node.ping(soon())
        seen = rig.server.statistics()["connect"]
        assert (seen["dev_name"], seen["link_type"], seen["ib_port"]) == ("mlx5_3", "IB", 2)


async def test_a_device_that_the_machine_does_not_have(rig: Rig, tmp_path: Path) -> None:
    """The native client would take another one, and say nothing."""
    async with rig.node(device=Device("mlx5_9"), sysfs=tmp_path) as node:
        with pytest.raises(NodeUnreachable, match="no RDMA device mlx5_9"):
            await node.ping(soon())


async def test_without_the_native_client(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "infinistore.py").write_text("raise ImportError('libibverbs.so.1: cannot open shared object file')")
    async with rig.node(Launch(paths=(str(tmp_path),))) as node:
        with pytest.raises(NodeUnreachable, match=r"libibverbs\.so\.1.*pip install kvoffload\[infinistore\]"):
            await node.ping(soon())


# ---------------------------------------------------------------- children that make no sense

CHILD = """
import socket, sys, threading
stay = threading.Event().wait
sys.path.insert(0, sys.argv[1])
from kvoffload.l2.rdma_frames import *
sock = socket.socket(fileno=int(sys.argv[2]))
hear = lambda: decode_to_child(sock.recv(1 << 20))
say = lambda message: sock.send(encode(message))
setup = hear()
"""
SERVES_ONCE = """
say(Connected(""))
call = hear().call
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit(7)",
        "print('some last words'); sock.close(); stay()",
        "stay()",
        "sock.send(b'nonsense'); stay()",
        "sock.send(b'x' * 150_000); stay()",
        "say(Answer(1, b'', '')); stay()",
        "say(Connected('')); say(Connected('')); stay()",
        "say(Withdraw(1)); stay()",
        "say(Broken('why not')); stay()",
        SERVES_ONCE + "say(Answer(call + 1, bytes(2), '')); stay()",
        SERVES_ONCE + "say(Answer(call, bytes(3), '')); stay()",
        SERVES_ONCE + "say(Answer(call, bytes([0, 9]), '')); stay()",
        SERVES_ONCE + "say(Answer(call, bytes([0, 6]), '')); stay()",
        SERVES_ONCE + "say(NotConnected('no')); stay()",
        SERVES_ONCE + "sys.stderr.write('x' * 300_000); raise SystemExit(1)",
        SERVES_ONCE + "stay()",
    ],
)
async def test_a_child_that_makes_no_sense_costs_its_calls(rig: Rig, program: str) -> None:
    async with rig.node(Launch(program=CHILD + program), start_timeout_s=1.0) as node:
        items = rig.empty(["a", "b"])
        started = time.monotonic()
        outcomes = await node.read(items, soon(2.0))
        assert time.monotonic() - started < 2.0 + SLACK_S
        assert set(outcomes) <= {Outcome.FAILED, Outcome.UNSETTLED}
        pid = node.child_pid
        with anyio.fail_after(0.3 + SLACK_S):
            await node.settle()
        with pytest.raises(NodeUnreachable, match="over RDMA"):
            await node.ping(soon(2.0))
    for each in {pid} - {None}:
        assert is_gone(each)  # type: ignore[arg-type]


async def test_a_child_that_answers_twice(rig: Rig) -> None:
    """The first answer counts; who says the second is not to be trusted."""
    program = CHILD + SERVES_ONCE + "say(Answer(call, bytes([1, 0]), '')); say(Answer(call, bytes([1, 1]), '')); stay()"
    async with rig.node(Launch(program=program)) as node:
        assert await node.find(["a", "b"], soon()) == [True, False]
        await until(lambda: node.child_pid is None)


# ---------------------------------------------------------------- processes


async def test_the_child_inherits_nothing(rig: Rig) -> None:
    secret = os.memfd_create("secret", 0)  # not closed on exec
    try:
        async with rig.node() as node:
            await node.ping(soon())
            folder = f"/proc/{node.child_pid}/fd"
            opened = [os.readlink(f"{folder}/{number}") for number in os.listdir(folder)]
    finally:
        os.close(secret)
    assert not [path for path in opened if "secret" in path]
    assert [path for path in opened if "kvoffload-segment" in path]  # it was given this one


@pytest.mark.slow
@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "os._exit(0)"])
async def test_the_child_ends_with_its_parent(rig: Rig, end: str) -> None:
    """Even while it does not listen: the kernel sees to it."""
    program = textwrap.dedent(f"""
        import asyncio, os, sys, time
        sys.path.insert(0, {str(Path(kvoffload.__file__).parent.parent)!r})
        from kvoffload.l2.infinistore_rdma import InfiniStoreRdmaNode
        from kvoffload.l2.node import Item
        from kvoffload.segment import Segment
        from kvoffload.testing.rdma_server import stand_in

        async def main():
            segment = Segment.create({SLOT}, {SLOT})
            node = InfiniStoreRdmaNode("n", "127.0.0.1", {rig.server.port}, value_bytes={SLOT}, segments=[segment], spawn=stand_in())
            await node.write([Item("x", segment.slot(0).data)], time.monotonic() + 20)
            await node.read([Item("x", segment.slot(0).data)], time.monotonic() + 1)
            print(node.child_pid, flush=True)
            {end}

        asyncio.run(main())
    """)
    rig.server.rule("read", "stop")
    run = await asyncio.to_thread(subprocess.run, [sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=40)
    assert run.stdout.strip().isdigit(), run.stderr
    assert await eventually_gone(int(run.stdout))


async def test_the_stand_in_is_found_before_the_real_client() -> None:
    assert (NATIVE / "infinistore.py").is_file()
    assert stand_in().paths[0] == str(NATIVE)


# ---------------------------------------------------------------- settings


async def test_an_engine_shows_its_segments_as_they_are(rig: Rig) -> None:
    """Whoever closes the segment meanwhile: a child that is started later maps it all the same."""
    segment = Segment.create(4 * SLOT, SLOT)
    view = SegmentView(segment)
    segment.close()
    node = InfiniStoreRdmaNode("n", "127.0.0.1", rig.server.port, value_bytes=SLOT, segments=[view], spawn=stand_in())
    try:
        view.slot(1)[:] = 7
        assert await node.write([Item("x", view.slot(1).data)], soon()) == [Outcome.DONE]
        assert await node.read([Item("x", view.slot(2).data)], soon()) == [Outcome.DONE]
        assert (view.slot(2) == 7).all()
        assert not view.slot(3).any()
    finally:
        await node.close()
    fd = view.fd
    del view
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


async def test_it_is_made_where_settings_want_it(segment: Segment) -> None:
    address = NodeAddress("n", "infinistore://127.0.0.1:12345")
    settings = L2Settings(backend="infinistore", nodes=("127.0.0.1:12345",), transport="rdma", devices=("mlx5_0:3",))
    node = make_node(address, settings, SLOT, (segment,))
    assert isinstance(node, InfiniStoreRdmaNode)
    with pytest.raises(NodeUnreachable, match="no RDMA device mlx5_0"):
        await node.ping(soon())
    await node.close()


async def test_without_a_device_it_is_refused_and_says_what_to_do(segment: Segment) -> None:
    if devices_here():
        pytest.skip("this machine has RDMA devices")
    address = NodeAddress("n", "infinistore://127.0.0.1:12345")
    settings = L2Settings(backend="infinistore", nodes=("127.0.0.1:12345",), transport="rdma")
    with pytest.raises(UnsupportedError, match=r"no RDMA device.*l2\.transport to tcp"):
        make_node(address, settings, SLOT, (segment,))


# ---------------------------------------------------------------- questions, to the real server


async def test_the_real_server_is_asked_for_many_keys_at_once(infinistore_shared: InfiniStoreServer) -> None:
    from kvoffload.l2.infinistore_tcp import InfiniStoreTcpNode

    writer = InfiniStoreTcpNode("n", "127.0.0.1", infinistore_shared.port, value_bytes=SLOT)
    some = names(20, "asked by a tether ")
    try:
        assert await writer.write([Item(name, memoryview(bytearray(100))) for name in some], soon()) == [Outcome.DONE] * 20
    finally:
        await writer.close()
    tether = await Tether.connect("127.0.0.1", infinistore_shared.port, 5.0)
    keys = [name.encode() for name in [*some, *names(2 * MOST_ASKED, "not there ")]]
    assert await tether.exist(keys) == [True] * 20 + [False] * (2 * MOST_ASKED)
    assert not tether.lost.is_set()
    tether.close()
    assert infinistore_shared.is_alive


async def test_the_real_client_without_a_device_says_so_and_harms_nobody(rig: Rig, infinistore_shared: InfiniStoreServer) -> None:
    """As far as it gets without RDMA: loaded, made and asked to connect as the child does it."""
    home = environment.HOME / "lib" / f"python{environment.PYTHON}" / "site-packages"
    async with rig.node(Launch(paths=(str(home),)), port=infinistore_shared.port) as node:
        if devices_here():
            pytest.skip("this machine has RDMA devices")
        with pytest.raises(NodeUnreachable, match="the native client cannot") as failure:
            await node.ping(soon())
        assert "unexpected keyword" not in str(failure.value)
    assert infinistore_shared.is_alive


async def test_a_tether_sees_the_server_go() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.close()

    port = free_port()
    async with await asyncio.start_server(hang_up, "127.0.0.1", port):
        tether = await Tether.connect("127.0.0.1", port, 5.0)
        with pytest.raises(PeerError, match="hung up"):
            await tether.exist([b"x"])
        assert tether.lost.is_set()
        tether.close()
    with pytest.raises(PeerError, match="cannot connect"):
        await Tether.connect("127.0.0.1", port, 5.0)
