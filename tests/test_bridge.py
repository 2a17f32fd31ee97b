from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kvoffload.bridge import Heartbeat, Inbox, LoopThread
from kvoffload.errors import InternalError, MisuseError
from kvoffload.mailbox import OnFull, Receiver, Reply, Sender, open_mailbox

GENEROUS_S = 30.0


class Loops:
    """Makes loop threads and remembers what they reported; all are stopped when the test ends."""

    def __init__(self) -> None:
        self.crashes: list[BaseException] = []
        self.crashed = threading.Event()
        self.made: list[LoopThread] = []

    def report(self, error: BaseException) -> None:
        self.crashes.append(error)
        self.crashed.set()

    def start(self, name: str = "test") -> LoopThread:
        loop = LoopThread(name, self.report)
        self.made.append(loop)
        loop.start()
        return loop


@pytest.fixture
def loops(caplog: pytest.LogCaptureFixture) -> Iterator[Loops]:
    loops = Loops()
    yield loops
    for loop in loops.made:
        assert loop.stop(GENEROUS_S)
    logged = [record.getMessage() for record in (*caplog.get_records("call"), *caplog.get_records("teardown"))]
    assert not [line for line in logged if "loop_callback_failed" in line or "loop_cleanup_failed" in line]


def run_on(loop: LoopThread, function: Callable[[], object]) -> object:
    reply: Reply[object] = Reply()
    loop.call_soon(lambda: reply.answer(function()))
    return reply.wait_sync(GENEROUS_S)


def test_the_thread_is_a_named_daemon(loops: Loops) -> None:
    loop = loops.start("hub")
    thread = run_on(loop, threading.current_thread)
    assert isinstance(thread, threading.Thread)
    assert (thread.name, thread.daemon) == ("kvoffload-hub", True)
    assert run_on(loop, lambda: loop.is_current) is True
    assert not loop.is_current
    assert loop.is_alive


def test_a_root_runs_and_is_cancelled_by_stop(loops: Loops) -> None:
    loop = loops.start()
    begun = threading.Event()
    log: list[str] = []

    async def root() -> None:
        begun.set()
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0)
            log.append("cleaned up")

    loop.submit(root)
    assert begun.wait(GENEROUS_S)
    assert loop.stop(GENEROUS_S)
    assert log == ["cleaned up"]
    assert not loop.is_alive
    assert loops.crashes == []


@pytest.mark.parametrize("error", [ValueError("a bug"), SystemExit(3), KeyboardInterrupt()])
def test_a_crash_is_reported_once_and_others_go_on(loops: Loops, error: BaseException) -> None:
    loop = loops.start()

    async def root() -> None:
        raise error

    loop.submit(root)
    assert loops.crashed.wait(GENEROUS_S)
    assert run_on(loop, lambda: "alive") == "alive"
    assert loop.stop(GENEROUS_S)
    assert loops.crashes == [error]


def test_a_cancellation_that_nobody_asked_for_is_a_crash(loops: Loops) -> None:
    loop = loops.start()

    async def root() -> None:
        raise asyncio.CancelledError

    loop.submit(root)
    assert loops.crashed.wait(GENEROUS_S)
    assert isinstance(loops.crashes[0], InternalError)


def test_a_callback_that_raises_system_exit_does_not_end_the_loop(loops: Loops) -> None:
    loop = loops.start()

    def leave() -> None:
        raise SystemExit(1)

    loop.call_soon(leave)
    assert loops.crashed.wait(GENEROUS_S)
    assert run_on(loop, lambda: "alive") == "alive"


def test_a_failing_callback_is_logged_and_the_loop_goes_on(loops: Loops, caplog: pytest.LogCaptureFixture) -> None:
    loop = loops.start()
    loop.call_soon(lambda: 1 / 0)
    assert run_on(loop, lambda: "alive") == "alive"
    assert "loop_callback_failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    assert loops.crashes == []
    caplog.clear()


def test_a_failing_crash_report_ends_nothing() -> None:
    def report(error: BaseException) -> None:
        raise RuntimeError("the report failed")

    loop = LoopThread("test", report)
    loop.start()
    try:

        async def root() -> None:
            raise ValueError

        loop.submit(root)
        assert run_on(loop, lambda: "alive") == "alive"
    finally:
        assert loop.stop(GENEROUS_S)


def test_stop_of_a_hung_loop_is_bounded_and_makes_it_stale(loops: Loops) -> None:
    loop = loops.start()
    hung, release = threading.Event(), threading.Event()

    def hang() -> None:
        hung.set()
        release.wait(GENEROUS_S)

    loop.call_soon(hang)
    assert hung.wait(GENEROUS_S)
    began = time.monotonic()
    assert not loop.stop(0.05)
    assert time.monotonic() - began < GENEROUS_S / 2
    assert loop.is_alive
    assert not loop.heartbeat.fresh()
    release.set()
    assert loop.stop(GENEROUS_S)


def test_stop_waits_in_vain_for_a_task_that_refuses_to_end(loops: Loops) -> None:
    loop = loops.start()
    begun, may_end = threading.Event(), threading.Event()

    async def stubborn() -> None:
        begun.set()
        while not may_end.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue

    loop.submit(stubborn)
    assert begun.wait(GENEROUS_S)
    for _ in range(3):  # further stops leave the cleanup that is under way alone
        assert not loop.stop(0.05)
    may_end.set()
    assert loop.stop(GENEROUS_S)


def test_roots_are_cancelled_before_the_tasks_that_they_look_after(loops: Loops) -> None:
    """So that a parent, such as a task group, ends its children itself."""
    loop = loops.start()
    order: list[str] = []
    begun = threading.Event()

    async def child() -> None:
        try:
            begun.set()
            await asyncio.sleep(3600)
        finally:
            order.append("child")

    async def root() -> None:
        task = asyncio.create_task(child())
        try:
            await asyncio.sleep(3600)
        finally:
            order.append("root")
            assert not task.cancelling()

    loop.submit(root)
    assert begun.wait(GENEROUS_S)
    assert loop.stop(GENEROUS_S)
    assert order == ["root", "child"]
    assert loops.crashes == []


def test_stop_is_idempotent_and_harmless_before_the_start() -> None:
    loop = LoopThread("test", lambda error: None)
    assert loop.stop(0)
    assert loop.stop(0)
    with pytest.raises(MisuseError, match="once"):
        loop.start()


def test_stop_from_its_own_thread_does_not_wait(loops: Loops) -> None:
    loop = loops.start()
    assert run_on(loop, lambda: loop.stop(GENEROUS_S)) is False
    assert loop.stop(GENEROUS_S)


def test_it_starts_once(loops: Loops) -> None:
    loop = loops.start()
    with pytest.raises(MisuseError, match="once"):
        loop.start()


def test_a_stopped_loop_says_so_in_the_way_mailboxes_understand(loops: Loops) -> None:
    loop = loops.start()
    sender: Sender[str]
    sender, _ = open_mailbox("m", 1, OnFull.REFUSE, call_soon=loop.call_soon)
    post = sender.threadsafe()
    assert loop.stop(GENEROUS_S)
    with pytest.raises(RuntimeError):
        loop.call_soon(lambda: None)
    with pytest.raises(RuntimeError):
        loop.submit(lambda: asyncio.sleep(0))
    assert not post.offer("late")
    with pytest.raises(RuntimeError, match="not started"):
        LoopThread("never", loops.report).call_soon(lambda: None)


def test_posts_made_before_the_first_turn_arrive(loops: Loops) -> None:
    loop = loops.start()
    got = Inbox[list[int]]()
    sender: Sender[int]
    receiver: Receiver[int]
    sender, receiver = open_mailbox("m", 10, OnFull.REFUSE, call_soon=loop.call_soon)
    for i in range(3):
        sender.threadsafe().offer(i)

    async def root() -> None:
        got.put(await receiver.receive_burst())

    loop.submit(root)
    assert got.wait(GENEROUS_S)
    assert got.take() == [[0, 1, 2]]


def test_the_heart_beats_and_ends_with_the_loop(loops: Loops) -> None:
    loop = loops.start()
    deadline = time.monotonic() + GENEROUS_S
    beaten = threading.Event()
    while loop.heartbeat.beats < 3:
        assert time.monotonic() < deadline
        beaten.wait(0.01)
    assert loop.heartbeat.fresh(GENEROUS_S)
    assert loop.stop(GENEROUS_S)
    assert not loop.heartbeat.fresh(GENEROUS_S)
    assert loop.heartbeat.age_s() == float("inf")


def test_a_heartbeat_ages() -> None:
    now = 50.0
    heart = Heartbeat(clock=lambda: now)
    assert not heart.fresh()
    heart.beat()
    now = 51.0
    assert heart.age_s() == 1.0
    assert heart.fresh()
    now = 51.5
    assert not heart.fresh()
    heart.beat()
    assert heart.fresh()
    assert heart.beats == 2


def test_roots_do_not_inherit_the_submitter_context(loops: Loops) -> None:
    """vLLM's context variables (tracing, forward context) stay vLLM's."""
    marker: contextvars.ContextVar[str] = contextvars.ContextVar("marker", default="clean")
    loop = loops.start()
    seen = Inbox[str]()

    async def root() -> None:
        seen.put(marker.get())

    marker.set("vllm")
    loop.submit(root)
    assert seen.wait(GENEROUS_S)
    assert seen.take() == ["clean"]


def test_an_inbox_is_a_queue() -> None:
    inbox = Inbox[int]()
    assert inbox.take() == []
    inbox.put(1)
    inbox.put(2)
    assert len(inbox) == 2
    assert inbox.wait(0)
    assert inbox.take() == [1, 2]
    assert not inbox.wait(0)


def test_an_inbox_waits_no_longer_than_told() -> None:
    inbox = Inbox[int]()
    began = time.monotonic()
    assert not inbox.wait(0.02)
    assert 0.015 <= time.monotonic() - began < GENEROUS_S


def test_a_late_signal_does_not_cut_the_wait_short() -> None:
    """A producer that appended, was overtaken, and signals only now."""
    inbox = Inbox[int]()
    inbox._arrived.set()
    began = time.monotonic()
    assert not inbox.wait(0.02)
    assert time.monotonic() - began >= 0.015


def test_an_inbox_loses_nothing_and_every_wait_ends() -> None:
    inbox = Inbox[tuple[int, int]]()
    each, producers = 3000, 3

    def produce(number: int) -> None:
        for i in range(each):
            inbox.put((number, i))

    threads = [threading.Thread(target=produce, args=(number,)) for number in range(producers)]
    for thread in threads:
        thread.start()
    got: list[tuple[int, int]] = []
    while len(got) < each * producers:
        assert inbox.wait(GENEROUS_S)
        got += inbox.take()
    for thread in threads:
        thread.join()
    for number in range(producers):
        assert [i for n, i in got if n == number] == list(range(each))
    assert inbox.take() == []


def test_ping_pong_through_two_inboxes() -> None:
    """One lost wake-up shows as a wait of thirty seconds."""
    there, back = Inbox[int](), Inbox[int]()

    def echo() -> None:
        for _ in range(500):
            assert there.wait(GENEROUS_S)
            for message in there.take():
                back.put(message)

    thread = threading.Thread(target=echo)
    thread.start()
    for i in range(500):
        there.put(i)
        assert back.wait(GENEROUS_S)
        assert back.take() == [i]
    thread.join()
