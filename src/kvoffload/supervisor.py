"""Who is restarted when it crashes, how often, and who is told when that is too often: a table of `Child`, and the loop over it."""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import anyio

from kvoffload.errors import InternalError, MisuseError
from kvoffload.observe.logs import get_logger

log = get_logger("supervisor")


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """After a crash: ``on_crash``, then a restart; or ``escalate``, at more than ``restarts`` crashes within ``window_s``.

    ``restarts`` None is for ever, 0 never. The n-th crash within the window waits ``backoff_s * 2 ** (n - 1)``, at most
    ``backoff_most_s``, give or take the share ``jitter`` (0 to 1) of it. ``escalate`` gets the child's name and the last exception.
    After that it is tried again in ``retry_s``, give or take as much, and escalated at once should it crash within ``window_s``; None:
    it is not.
    """

    restarts: int | None = 0
    window_s: float = 60.0
    backoff_s: float = 0.1
    backoff_most_s: float = 10.0
    jitter: float = 0.2
    retry_s: float | None = None
    escalate: Callable[[str, BaseException], None] | None = None
    on_crash: Callable[[], Awaitable[None]] | None = None

    def __post_init__(self) -> None:
        if not (self.restarts is None or self.restarts >= 0):
            raise MisuseError(f"restarts must be None or at least 0, not {self.restarts}")
        has_good_times = self.window_s > 0 and 0 < self.backoff_s <= self.backoff_most_s and (self.retry_s is None or self.retry_s > 0)
        if not (has_good_times and 0 <= self.jitter <= 1):
            raise MisuseError(f"times must be positive, the least backoff at most the greatest, and jitter from 0 to 1: {self}")

    def wait_s(self, crashes: int, chance: float) -> float:
        """The backoff after that many crashes (>= 1) within the window; ``chance`` from 0 to 1 places it within the jitter."""
        # 2.0 ** 1024 overflows; long before, the most is reached.
        return self.jittered(min(self.backoff_most_s, self.backoff_s * 2.0 ** min(crashes - 1, 64)), chance)

    def jittered(self, seconds: float, chance: float) -> float:
        return seconds * (1 + self.jitter * (2 * chance - 1))


@dataclass(frozen=True, slots=True)
class Child:
    """One actor: ``run`` is called anew for each restart; ``drain(deadline)`` answers whether all was finished by then."""

    name: str
    run: Callable[[], Awaitable[None]]
    policy: RestartPolicy = field(default_factory=RestartPolicy)
    drain: Callable[[float], Awaitable[bool]] | None = None


class ChildState(Enum):
    IDLE = "idle"
    RUNNING = "running"
    BACKING_OFF = "backing_off"
    ENDED = "ended"
    ESCALATED = "escalated"


@dataclass(slots=True)
class ChildStatistics:
    """One child's life so far; ``last_error`` is the repr of its last crash."""

    state: ChildState = ChildState.IDLE
    crashes: int = 0
    restarts: int = 0
    last_error: str | None = None


class Supervisor:
    """Runs its children side by side, each by its own policy; a crash never reaches a sibling nor the caller.

    Owns: the children's tasks. Receives: their ends. Sends: ``escalate``. Ends: when every child has, or when cancelled.
    """

    def __init__(
        self, children: Iterable[Child], *, clock: Callable[[], float] = time.monotonic, chance: Callable[[], float] = random.random
    ) -> None:
        listed = tuple(children)
        self._children = {child.name: child for child in listed}
        if len(self._children) < len(listed):
            raise MisuseError(f"children need names of their own: {[child.name for child in listed]}")
        self._clock = clock
        self._chance = chance
        self._statistics = {name: ChildStatistics() for name in self._children}

    def statistics(self) -> dict[str, ChildStatistics]:
        """By child; live objects, to be read only."""
        return dict(self._statistics)

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            for child in self._children.values():
                tasks.start_soon(self._keep, child, name=f"kvoffload-{child.name}")

    async def drain(self, order: Sequence[str], deadline: float) -> dict[str, bool]:
        """Drain these children one after another, until ``deadline`` (on ``clock``, s): did each finish what it had begun?

        A child that does not answer in time, fails to, or does not run any more has not; one without ``drain`` has nothing to.
        """
        answers: dict[str, bool] = {}
        for name in order:
            child, state = self._children[name], self._statistics[name].state
            if child.drain is None or state is ChildState.ENDED:
                answers[name] = True
            elif state is ChildState.RUNNING:
                answers[name] = await self._drain(child, child.drain, deadline)
            else:
                answers[name] = False
        return answers

    async def _drain(self, child: Child, drain: Callable[[float], Awaitable[bool]], deadline: float) -> bool:
        with anyio.move_on_after(max(0.0, deadline - self._clock())):
            try:
                return await drain(deadline)
            except Exception as error:
                log.error("drain_failed", child=child.name, error=repr(error), exc_info=error)
                return False
        log.warning("drain_timed_out", child=child.name)
        return False

    async def _keep(self, child: Child) -> None:
        """Run one child, again and again, until it ends for good."""
        policy, counted = child.policy, self._statistics[child.name]
        crashed_at: deque[float] = deque()
        on_trial_until = -math.inf  # from when on a crash is one like others
        while True:
            counted.state = ChildState.RUNNING
            error = await self._run_once(child)
            if error is None:
                counted.state = ChildState.ENDED
                return
            now = anyio.current_time()
            crashed_at.append(now)
            while crashed_at[0] < now - policy.window_s:
                crashed_at.popleft()
            counted.state = ChildState.BACKING_OFF
            counted.crashes += 1
            counted.last_error = repr(error)
            log.error("child_crashed", child=child.name, crashes=len(crashed_at), error=repr(error), exc_info=error)
            await self._clean_up(child)
            if policy.restarts is not None and (len(crashed_at) > policy.restarts or now < on_trial_until):
                self._escalate(child, error)
                if policy.retry_s is None:
                    return
                await anyio.sleep(policy.jittered(policy.retry_s, self._chance()))
                crashed_at.clear()
                on_trial_until = anyio.current_time() + policy.window_s
            else:
                await anyio.sleep(policy.wait_s(len(crashed_at), self._chance()))
            counted.restarts += 1

    async def _run_once(self, child: Child) -> BaseException | None:
        """None for a normal end, or what it crashed with. Only a cancellation of the supervisor itself passes."""
        try:
            await child.run()
        except anyio.get_cancelled_exc_class() as error:
            if anyio.current_effective_deadline() == -math.inf:
                raise
            return InternalError(f"{child.name} was cancelled, and not by its supervisor: {error!r}")
        except GeneratorExit:
            raise
        except BaseException as error:
            # SystemExit and KeyboardInterrupt as well: no actor ends vLLM.
            return error
        return None

    async def _clean_up(self, child: Child) -> None:
        if child.policy.on_crash is not None:
            try:
                await child.policy.on_crash()
            except Exception as error:
                log.error("crash_cleanup_failed", child=child.name, error=repr(error), exc_info=error)

    def _escalate(self, child: Child, error: BaseException) -> None:
        self._statistics[child.name].state = ChildState.ESCALATED
        if child.policy.escalate is None:
            log.error("child_given_up", child=child.name, error=repr(error))
            return
        try:
            child.policy.escalate(child.name, error)
        except Exception as failure:
            log.error("escalation_failed", child=child.name, error=repr(failure), exc_info=failure)
