from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import pairwise

import anyio
import pytest
from anyio import wait_all_tasks_blocked
from hypothesis import given
from hypothesis import strategies as st

from kvoffload.bridge import LoopThread
from kvoffload.errors import InternalError, MisuseError
from kvoffload.supervisor import Child, ChildState, RestartPolicy, Supervisor
from kvoffload.testing.cancel import cancel_at_every_checkpoint

EXACT = partial(RestartPolicy, jitter=0.0, backoff_s=1.0, backoff_most_s=8.0)


class Crashing:
    """Crashes at the start of each of its first ``times`` runs, then ends normally; notes when each run began."""

    def __init__(self, times: int, error: BaseException | None = None, after_s: float = 0.0) -> None:
        self.times = times
        self.error = error or ValueError("a bug")
        self.after_s = after_s
        self.began: list[float] = []

    async def run(self) -> None:
        self.began.append(anyio.current_time())
        await anyio.sleep(self.after_s)
        if len(self.began) <= self.times:
            raise self.error


class Escalations:
    def __init__(self) -> None:
        self.seen: list[tuple[str, BaseException]] = []

    def __call__(self, name: str, error: BaseException) -> None:
        self.seen.append((name, error))


async def forever() -> None:
    await anyio.sleep_forever()


def make_supervisor(*children: Child, chance: float = 0.5) -> Supervisor:
    return Supervisor(children, clock=anyio.current_time, chance=lambda: chance)


@pytest.mark.anyio
async def test_a_normal_end_is_final() -> None:
    crashing = Crashing(0)
    supervisor = make_supervisor(Child("a", crashing.run, RestartPolicy(restarts=None)))
    assert supervisor.statistics()["a"].state is ChildState.IDLE
    await supervisor.run()
    assert len(crashing.began) == 1
    assert supervisor.statistics()["a"].state is ChildState.ENDED


@pytest.mark.anyio
async def test_one_given_up_is_tried_again_and_given_up_at_once_where_that_fails() -> None:
    crashing, escalations = Crashing(5), Escalations()
    policy = EXACT(restarts=1, window_s=60.0, retry_s=100.0, escalate=escalations)
    supervisor = make_supervisor(Child("a", crashing.run, policy))
    await supervisor.run()
    waits = [later - earlier for earlier, later in pairwise(crashing.began)]
    assert waits == pytest.approx([1, 100, 100, 100, 100]), "not one crash after another, each with its traceback in the log"
    assert len(escalations.seen) == 4
    assert supervisor.statistics()["a"].state is ChildState.ENDED


@pytest.mark.anyio
async def test_one_that_was_tried_again_and_ran_for_long_may_crash_again() -> None:
    crashing, escalations = Crashing(3), Escalations()

    async def run() -> None:
        if len(crashing.began) == 2:
            await anyio.sleep(61)
        await crashing.run()

    await make_supervisor(Child("a", run, EXACT(restarts=1, window_s=60.0, retry_s=100.0, escalate=escalations))).run()
    waits = [later - earlier for earlier, later in pairwise(crashing.began)]
    assert waits == pytest.approx([1, 161, 1])
    assert len(escalations.seen) == 1


@pytest.mark.anyio
async def test_tries_of_what_was_given_up_are_jittered() -> None:
    crashing = Crashing(1)
    policy = RestartPolicy(restarts=0, retry_s=60.0, escalate=Escalations())
    await make_supervisor(Child("a", crashing.run, policy), chance=1.0).run()
    assert crashing.began[1] - crashing.began[0] == pytest.approx(72)


@pytest.mark.anyio
async def test_backoff_doubles_up_to_its_most() -> None:
    crashing = Crashing(6)
    supervisor = make_supervisor(Child("a", crashing.run, EXACT(restarts=None, window_s=1e6)))
    await supervisor.run()
    waits = [later - earlier for earlier, later in pairwise(crashing.began)]
    assert waits == pytest.approx([1, 2, 4, 8, 8, 8])
    counted = supervisor.statistics()["a"]
    assert (counted.crashes, counted.restarts, counted.state) == (6, 6, ChildState.ENDED)
    assert counted.last_error == "ValueError('a bug')"


@pytest.mark.anyio
async def test_crashes_outside_the_window_are_forgotten() -> None:
    crashing = Crashing(5, after_s=100.0)
    escalations = Escalations()
    policy = EXACT(restarts=1, window_s=60.0, escalate=escalations)
    await make_supervisor(Child("a", crashing.run, policy)).run()
    waits = [later - earlier for earlier, later in pairwise(crashing.began)]
    assert waits == pytest.approx([101] * 5)
    assert escalations.seen == []


@pytest.mark.anyio
@pytest.mark.parametrize("restarts", [0, 1, 3])
async def test_too_many_crashes_escalate_once(restarts: int) -> None:
    crashing = Crashing(100)
    escalations = Escalations()
    supervisor = make_supervisor(Child("a", crashing.run, EXACT(restarts=restarts, escalate=escalations)))
    await supervisor.run()
    assert len(crashing.began) == restarts + 1
    assert escalations.seen == [("a", crashing.error)]
    assert supervisor.statistics()["a"].state is ChildState.ESCALATED


@pytest.mark.anyio
@pytest.mark.parametrize("error", [ValueError("a bug"), SystemExit(1), KeyboardInterrupt(), BaseExceptionGroup("g", [SystemExit(2)])])
async def test_a_crash_reaches_neither_siblings_nor_caller(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    escalations = Escalations()
    finished: list[str] = []

    async def sibling() -> None:
        await anyio.sleep(3600)
        finished.append("sibling")

    crashing = Crashing(1, error)
    await make_supervisor(Child("bad", crashing.run, RestartPolicy(escalate=escalations)), Child("good", sibling)).run()
    assert finished == ["sibling"]
    assert escalations.seen == [("bad", error)]
    assert caplog.text.count("child_crashed") == 1


@pytest.mark.anyio
async def test_cleanup_comes_before_the_restart_and_before_the_escalation() -> None:
    order: list[str] = []

    async def run() -> None:
        order.append("run")
        raise ValueError

    async def clean_up() -> None:
        await anyio.sleep(5)
        order.append("cleaned")

    def escalate(name: str, error: BaseException) -> None:
        order.append("escalated")

    policy = RestartPolicy(restarts=1, window_s=1e6, on_crash=clean_up, escalate=escalate)
    await make_supervisor(Child("a", run, policy)).run()
    assert order == ["run", "cleaned", "run", "cleaned", "escalated"]


@pytest.mark.anyio
async def test_hooks_that_fail_are_logged_and_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def clean_up() -> None:
        raise RuntimeError("cleanup")

    def escalate(name: str, error: BaseException) -> None:
        raise RuntimeError("escalation")

    crashing = Crashing(9)
    await make_supervisor(Child("a", crashing.run, RestartPolicy(restarts=1, on_crash=clean_up, escalate=escalate))).run()
    assert len(crashing.began) == 2
    assert caplog.text.count("crash_cleanup_failed") == 2
    assert caplog.text.count("escalation_failed") == 1


@pytest.mark.anyio
async def test_without_an_escalation_it_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    await make_supervisor(Child("a", Crashing(1).run)).run()
    assert "child_given_up" in caplog.text


@pytest.mark.anyio
async def test_cancelling_the_supervisor_is_no_crash() -> None:
    escalations = Escalations()
    supervisor = make_supervisor(Child("a", forever, RestartPolicy(escalate=escalations)))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(supervisor.run)
        await wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert escalations.seen == []
    assert supervisor.statistics()["a"].crashes == 0


@pytest.mark.anyio
async def test_it_can_be_cancelled_at_every_checkpoint() -> None:
    running: set[str] = set()

    async def tracked() -> None:
        running.add("a")
        try:
            await anyio.sleep(1)
        finally:
            running.discard("a")

    def check(nth: int) -> None:
        assert not running

    await cancel_at_every_checkpoint(lambda: make_supervisor(Child("a", tracked), Child("b", Crashing(1).run)).run(), check)


@pytest.mark.asyncio
async def test_a_stray_cancellation_is_a_crash() -> None:
    """anyio's task groups would take it for a normal end, and the actor would be missing, silently."""
    escalations = Escalations()

    async def cancelled_by_mistake() -> None:
        raise asyncio.CancelledError

    await Supervisor([Child("a", cancelled_by_mistake, RestartPolicy(escalate=escalations))]).run()
    [(name, error)] = escalations.seen
    assert name == "a"
    assert isinstance(error, InternalError)


def test_stopping_the_loop_thread_is_no_crash() -> None:
    escalations = Escalations()
    crashes: list[BaseException] = []
    loop = LoopThread("test", crashes.append)
    loop.start()
    supervisor = Supervisor([Child(name, forever, RestartPolicy(escalate=escalations)) for name in "abc"])
    loop.submit(supervisor.run)
    assert loop.stop(30)
    assert escalations.seen == []
    assert crashes == []
    assert all(child.crashes == 0 for child in supervisor.statistics().values())


Drain = Callable[[float], Awaitable[bool]]


@pytest.mark.anyio
async def test_drain_asks_in_order_and_within_the_deadline() -> None:
    asked: list[tuple[str, float]] = []

    def drain_after(name: str, seconds: float, answer: bool) -> Drain:
        async def drain(deadline: float) -> bool:
            asked.append((name, deadline))
            await anyio.sleep(seconds)
            return answer

        return drain

    async def failing(deadline: float) -> bool:
        raise RuntimeError("drain")

    supervisor = make_supervisor(
        Child("finishes", forever, drain=drain_after("finishes", 1, True)),
        Child("does not", forever, drain=drain_after("does not", 1, False)),
        Child("hangs", forever, drain=drain_after("hangs", 1e9, True)),
        Child("fails", forever, drain=failing),
        Child("has nothing", forever),
        Child("is over", Crashing(0).run, drain=drain_after("is over", 0, False)),
        Child("crashed", Crashing(1).run, drain=drain_after("crashed", 0, True)),
    )
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(supervisor.run)
        await wait_all_tasks_blocked()
        deadline = anyio.current_time() + 10
        answers = await supervisor.drain(["fails", "finishes", "does not", "hangs", "has nothing", "is over", "crashed"], deadline)
        assert anyio.current_time() == pytest.approx(deadline)
        tasks.cancel_scope.cancel()
    assert answers == {
        "fails": False,
        "finishes": True,
        "does not": False,
        "hangs": False,
        "has nothing": True,
        "is over": True,
        "crashed": False,
    }
    assert asked == [("finishes", deadline), ("does not", deadline), ("hangs", deadline)]


def test_names_are_unique() -> None:
    with pytest.raises(MisuseError, match="names"):
        Supervisor([Child("a", forever), Child("a", forever)])


@pytest.mark.parametrize(
    "wrong",
    [{"restarts": -1}, {"window_s": 0}, {"backoff_s": 0}, {"backoff_s": 20.0}, {"jitter": 1.5}],
)
def test_policies_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(MisuseError):
        RestartPolicy(**wrong)  # type: ignore[arg-type]


@given(crashes=st.integers(1, 10**6), chance=st.floats(0, 1), jitter=st.floats(0, 1))
def test_backoff_stays_within_its_jitter(crashes: int, chance: float, jitter: float) -> None:
    policy = RestartPolicy(backoff_s=0.5, backoff_most_s=30.0, jitter=jitter)
    exact = min(30.0, 0.5 * 2.0 ** min(crashes - 1, 100))
    assert exact * (1 - jitter) - 1e-9 <= policy.wait_s(crashes, chance) <= exact * (1 + jitter) + 1e-9
