"""The link between two real processes, one of which dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import anyio
import pytest

from kvoffload.errors import PeerError
from kvoffload.ledger import Ledger
from kvoffload.link import LinkAddress, connect, join_hub, wait_for_exit
from kvoffload.messages import BlocksFilled, SlotGrant

pytestmark = [pytest.mark.anyio, pytest.mark.real_clock]

WORKER = """
import json, os, sys
import anyio
from kvoffload.link import LINK_VERSION, Hello, listen, serve_worker
from kvoffload.messages import BlocksFilled

async def main():
    listener = listen()
    address = listener.address
    print(json.dumps([address.name, address.pid, address.token.hex()]), flush=True)
    connection = await listener.accept(30)
    segment = os.memfd_create("kvoffload-test-segment")
    os.ftruncate(segment, 4096)
    link, ledger = await serve_worker(connection, Hello(LINK_VERSION, 0, os.getpid(), b"", 4000, 4096, 1, 8, b""), segment)

    def answer(grant):
        epochs = os.pread(ledger, 64, 0)
        filled = tuple(slot for slot, block in zip(grant.slots, grant.blocks) if epochs[8 * block])
        link.send(BlocksFilled(grant.job, 0, filled, ()))

    await link.run(answer, lambda reason: print(reason, flush=True))

anyio.run(main)
"""


@pytest.fixture
def worker() -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE, env=environment, text=True) as process:
        yield process
        process.kill()


def address_of(worker: subprocess.Popen[str]) -> LinkAddress:
    assert worker.stdout is not None
    name, pid, token = json.loads(worker.stdout.readline())
    return LinkAddress(name, pid, bytes.fromhex(token))


class Hub:
    def __init__(self) -> None:
        self.received: list[object] = []
        self.lost: list[str] = []
        self.arrived = anyio.Event()

    def deliver(self, message: object) -> None:
        self.received.append(message)
        self.arrived.set()


async def test_a_worker_that_is_killed_is_lost_once_and_its_exit_is_seen(worker: subprocess.Popen[str]) -> None:
    ledger = Ledger(8)
    ledger.bump([5])
    hub = Hub()
    address = await anyio.to_thread.run_sync(address_of, worker)
    with anyio.fail_after(50):
        link, joined = await join_hub(await connect(address, 30), ledger)
        with pytest.raises(PeerError, match="cannot be reached"):
            await connect(address, 30)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(link.run, hub.deliver, hub.lost.append)
            link.send(SlotGrant(1, (10, 11), (4, 5), (0, 0)))
            await hub.arrived.wait()
            assert hub.received == [BlocksFilled(1, 0, (11,), ())]
            os.kill(worker.pid, signal.SIGSTOP)
            link.send(SlotGrant(2, (), (), ()))
            with anyio.move_on_after(1.0) as no_exit_yet:
                await wait_for_exit(joined.process_fd)
            assert no_exit_yet.cancelled_caught
            assert link.peer_age_s() > 0.5
            assert hub.lost == []
            os.kill(worker.pid, signal.SIGKILL)
            await wait_for_exit(joined.process_fd)
    assert len(hub.lost) == 1
    joined.close()
    ledger.close()


async def test_a_worker_whose_hub_goes_is_told_and_ends(worker: subprocess.Popen[str]) -> None:
    ledger = Ledger(8)
    hub = Hub()
    address = await anyio.to_thread.run_sync(address_of, worker)
    with anyio.fail_after(50):
        link, joined = await join_hub(await connect(address, 30), ledger)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(link.run, hub.deliver, hub.lost.append)
            link.close()
        await wait_for_exit(joined.process_fd)
    assert worker.stdout is not None
    assert "the peer closed the link: it was stopped" in await anyio.to_thread.run_sync(worker.stdout.read)
    assert worker.wait(30) == 0
    assert hub.lost == []
    joined.close()
    ledger.close()
