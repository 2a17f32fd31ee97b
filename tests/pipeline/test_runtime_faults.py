"""What the runtime promises while parts of it are dead or hung, without vLLM: real threads, loops, copies and links."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from tests.pipeline.hosts import CONFIG, SLOTS, Hosts, blocked, keys, until

from kvoffload import link
from kvoffload.bridge import LoopThread
from kvoffload.config import Config
from kvoffload.errors import CapacityError
from kvoffload.link import find_half
from kvoffload.messages import DropReason, LoadOutcome, MatchPrefix, PrefixHit, ResetCache
from kvoffload.runtime.hosts import WorkerHost
from kvoffload.runtime.hub import HubRuntime, RankPort
from kvoffload.runtime.worker import WorkerRuntime

LIMIT_S = 3.0
"""For `shutdown`."""


@pytest.fixture(params=["here", "link"])
def hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    with Hosts(over_link=request.param == "link") as started:
        yield started


def crash_actor(hosts: Hosts) -> None:
    """GpuCopy's own task ends by a message that cannot be."""
    nonsense: Any = object()
    hosts.worker.loop.call_soon(lambda: hosts.worker.runtime._grants.owe(nonsense))


def crash_l1(hosts: Hosts) -> None:
    nonsense: Any = object()
    hosts.hub.owe(nonsense)


def cut_link(hosts: Hosts) -> None:
    assert hosts.worker._link is not None
    hosts.worker._link._connection._socket.shutdown(socket.SHUT_RDWR)


DEATHS = pytest.mark.parametrize(
    ("hosts", "die"),
    [("here", crash_actor), ("link", crash_actor), ("here", crash_l1), ("link", crash_l1), ("link", cut_link)],
    indirect=["hosts"],
)


# ---------------------------------------------------------------- something dies


@DEATHS
def test_a_death_turns_both_halves_off(hosts: Hosts, die: Callable[[Hosts], None]) -> None:
    hosts.save([1, 2, 3])
    hosts.flush()
    die(hosts)
    hosts.wait_off()


@pytest.mark.parametrize("kind", ["save", "load"])
def test_a_crash_of_a_copy_thread_turns_both_halves_off_and_is_reported(hosts: Hosts, kind: str) -> None:
    hosts.save([1, 2, 3])
    hosts.flush()
    hit = hosts.match("r", 3)
    hosts.copies.crash_next(kind)
    if kind == "save":
        hosts.save([4, 5], seed=1)
        assert "crashed" in hosts.wait_off()
        handle = hosts.load(hit, [11, 12, 13])
        assert handle is None, "a load is not even queued any more"
        assert hosts.ready() == 3
    else:
        hosts.load(hit, [11, 12, 13])
        assert hosts.wait_ended().outcome is LoadOutcome.FAILED
        assert "crashed" in hosts.wait_off()


@DEATHS
def test_a_started_load_ends_as_ever_and_others_are_withdrawn_at_once(hosts: Hosts, die: Callable[[Hosts], None]) -> None:
    hosts.save([1, 2, 3])
    hosts.flush()
    expected = hosts.page(2)
    first, second = hosts.match("first", 3), hosts.match("second", 3)
    hosts.copies.hold_loads()
    hosts.load(first, [11, 12, 13])
    assert hosts.copies.wait_held("load")
    hosts.load(second, [21, 22, 23])
    assert hosts.take_ended() == []
    die(hosts)
    ended = hosts.wait_ended()
    assert (ended.request, ended.outcome) == ("second", LoadOutcome.WITHDRAWN)
    hosts.wait_off()
    assert hosts.take_ended() == [], "nobody is told of a copy that still runs"
    hosts.copies.release()
    ended = hosts.wait_ended()
    assert (ended.request, ended.outcome) == ("first", LoadOutcome.LOADED)
    assert np.array_equal(hosts.page(12), expected)


@DEATHS
def test_a_save_that_was_torn_in_the_meantime_is_never_ready(hosts: Hosts, die: Callable[[Hosts], None]) -> None:
    hosts.copies.hold_saves()
    hosts.save([1, 2, 3])
    assert hosts.copies.wait_held("save")
    die(hosts)
    hosts.overwrite(1, 2, 3)
    hosts.copies.release()
    hosts.wait_off()
    assert hosts.worker.runtime.hands.wait_idle(10)
    assert hosts.ready() == 0


# ---------------------------------------------------------------- something hangs


@pytest.mark.parametrize("which", ["worker", "hub", "both"])
def test_a_hang_stops_new_promises_and_nothing_else(hosts: Hosts, which: str) -> None:
    """Loads that were promised are done and reported with every loop hung, and afterwards all goes on as before."""
    hosts.save([1, 2, 3])
    hosts.flush()
    expected = hosts.page(3)
    hit = hosts.match("r", 3)
    loops = {"worker": hosts.loops[:1], "hub": hosts.loops[-1:], "both": hosts.loops}[which]
    with blocked(*loops):
        until(lambda: not hosts.hub.is_live, "the heartbeat is missed")
        hosts.load(hit, [11, 12, 13])
        assert hosts.wait_ended().outcome is LoadOutcome.LOADED
        assert np.array_equal(hosts.page(13), expected)
        assert hosts.hub.off_reason is None
    until(lambda: hosts.hub.is_live, "the heartbeat is back")
    hosts.save([4, 5], seed=1)
    hosts.flush()
    assert hosts.ready() == 5
    assert hosts.statistics().leases == 0


@pytest.mark.parametrize("which", ["worker", "hub", "both"])
@pytest.mark.parametrize("checked", [True, False])
def test_a_save_torn_during_a_hang_is_never_ready(hosts: Hosts, which: str, checked: bool) -> None:
    """The ledger needs no loop. (Without its check the torn bytes are found: the test can fail.)"""
    hosts.copies.ignore_ledger(not checked)
    loops = {"worker": hosts.loops[:1], "hub": hosts.loops[-1:], "both": hosts.loops}[which]
    hosts.copies.hold_saves()
    hosts.save([1, 2, 3])
    assert hosts.copies.wait_held("save")
    with blocked(*loops):
        hosts.overwrite(2, 3)
        hosts.copies.release()
        assert hosts.worker.runtime.hands.wait_idle(10)
    hosts.flush()
    assert hosts.ready() == (1 if checked else 3)
    assert hosts.statistics().drops.get(DropReason.OVERWRITTEN, 0) == (2 if checked else 0)


def test_a_loop_that_is_gone_is_noticed_at_once(hosts: Hosts) -> None:
    hosts.save([1, 2, 3])
    hosts.flush()
    hit = hosts.match("r", 3)
    for loop in hosts.loops:
        assert loop.stop(10)
    assert not hosts.hub.is_live
    handle = hosts.load(hit, [11, 12, 13])
    ended = hosts.wait_ended() if handle is not None else None
    assert ended is None or ended.outcome in (LoadOutcome.LOADED, LoadOutcome.WITHDRAWN)
    assert not hosts.save([4])


# ---------------------------------------------------------------- ends


def timed_close(hosts: Hosts) -> None:
    for close in (hosts.worker.close, hosts.host.close):
        begun = time.monotonic()
        close(2.5)
        assert time.monotonic() - begun < LIMIT_S


def test_an_orderly_end_is_quiet_and_leaves_nothing(hosts: Hosts, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    hosts.save([1, 2, 3])
    hosts.flush()
    token = hosts.worker.address.token
    timed_close(hosts)
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == []
    assert find_half(token) is None
    assert not any(loop.is_alive for loop in hosts.loops)


def test_the_hub_may_end_first(hosts: Hosts, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    hosts.save([1, 2, 3])
    hosts.flush()
    hosts.host.close(2.5)
    hosts.worker.close(2.5)
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == []


@pytest.mark.parametrize("kind", ["save", "load"])
@pytest.mark.parametrize("crashed", [False, True])
def test_the_end_does_not_wait_for_a_held_copy(hosts: Hosts, kind: str, crashed: bool) -> None:
    hosts.save([1, 2, 3])
    hosts.flush()
    if kind == "save":
        hosts.copies.hold_saves()
        hosts.save([4, 5], seed=1)
    else:
        hit = hosts.match("r", 3)
        hosts.copies.hold_loads()
        hosts.load(hit, [11, 12, 13])
    assert hosts.copies.wait_held(kind)
    if crashed:
        crash_actor(hosts)
    timed_close(hosts)
    # The memory that it uses is still there.
    hosts.copies.release()
    assert hosts.worker.runtime.hands.close(10)
    assert len(hosts.worker.runtime.rank.segment.array) > 0
    if kind == "load":
        assert hosts.wait_ended().outcome is LoadOutcome.LOADED


def test_the_end_does_not_wait_for_a_hung_loop(hosts: Hosts) -> None:
    with blocked(*hosts.loops):
        timed_close(hosts)


def test_a_worker_half_without_memory_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvoffload.config import Config
    from kvoffload.errors import CapacityError
    from kvoffload.runtime.hosts import WorkerHost

    before = set(os.listdir("/proc/self/fd"))
    config = Config.load({"l1": {"capacity_gb": 1 << 20}})
    with pytest.raises(CapacityError):
        WorkerHost.start(config, 0, {"layer": np.zeros((SLOTS, 64), dtype=np.uint8)}, SLOTS, lambda engine: engine)
    assert set(os.listdir("/proc/self/fd")) == before


EXIT = """
import sys, threading
from tests.pipeline.hosts import Hosts, blocked
hosts = Hosts(over_link=sys.argv[1] == "link").__enter__()
hosts.save([1, 2, 3])
hosts.flush()
if "crashed" in sys.argv[2]:
    hosts.copies.hold_saves()
    hosts.save([4, 5], seed=1)
    assert hosts.copies.wait_held("save")
    hosts.worker.loop.call_soon(lambda: hosts.worker.runtime._grants.owe(object()))
    hosts.copies.release()
    hosts.wait_off()
if "held" in sys.argv[2]:
    hosts.copies.hold_saves()
    hosts.save([6, 7], seed=2)
    assert hosts.copies.wait_held("save")
if "hung" in sys.argv[2]:
    context = blocked(*hosts.loops)
    context.__enter__()
if "closed" in sys.argv[2]:
    hosts.close()
assert all(thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()), threading.enumerate()
print("end", flush=True)
"""


@pytest.mark.parametrize("topology", ["here", "link"])
@pytest.mark.parametrize("state", ["live", "held", "hung", "crashed hung", "held hung closed"])
def test_the_interpreter_ends_whatever_hangs(topology: str, state: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        [sys.executable, "-c", EXIT, topology, state], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "end\n", process.stderr.read() if process.stderr is not None else ""
            begun = time.monotonic()
            process.wait(20)
        finally:
            process.kill()
    assert process.returncode == 0
    assert time.monotonic() - begun < 15


# ---------------------------------------------------------------- before it begins


def test_a_reset_before_the_ranks_are_there_is_counted() -> None:
    """Else every later answer is of an older generation than the facade's, and ignored for good."""
    loop = LoopThread("test", lambda error: None)
    loop.start()
    hub = HubRuntime(Config.load(CONFIG))
    hub.owe(ResetCache(1))
    hub.open(SLOTS, [RankPort(lambda message: None)], loop.call_soon, loop.heartbeat)
    loop.submit(hub.run)
    assert hub.offer(MatchPrefix("r", 1, keys(1), 0.0))
    assert hub.wait(20)
    (hit,) = hub.take()
    assert isinstance(hit, PrefixHit)
    assert hit.generation == 1
    hub.close()
    loop.stop(LIMIT_S)


def test_a_worker_half_that_cannot_start_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(runtime: WorkerRuntime) -> None:
        raise CapacityError("no memory for the first slots")

    monkeypatch.setattr(WorkerRuntime, "start", start)
    listener = link.listen()
    monkeypatch.setattr(link, "listen", lambda: listener)
    threads = set(threading.enumerate())
    tensors = {"layer0": np.zeros((16, 2048), dtype=np.uint8)}
    with pytest.raises(CapacityError):
        WorkerHost.start(Config.load(CONFIG), 0, tensors, 16, lambda engine: engine)
    assert set(threading.enumerate()) == threads
    assert find_half(listener.address.token) is None
    assert listener._socket.fileno() == -1
