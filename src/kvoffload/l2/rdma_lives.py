"""The child processes of a node, one after the other: started, connected, asked, buried. Of asyncio."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from kvoffload.errors import PeerError
from kvoffload.l2.node import Item, Outcome
from kvoffload.l2.rdma_frames import Answer, Broken, Connect, Connected, Find, FromChild, Move, NotConnected, Setup, Withdraw
from kvoffload.l2.rdma_memory import Memory
from kvoffload.l2.rdma_process import Launch, RdmaProcess
from kvoffload.observe.logs import get_logger

log = get_logger("l2")

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 10.0
_MOST_DYING = 3
_LONG_LIFE_S = 10.0
_FREE_CRASHES = 2
_OF_A_READ = frozenset(map(int, (Outcome.DONE, Outcome.ABSENT, Outcome.MALFORMED, Outcome.FAILED, Outcome.LATE)))
_OF_A_WRITE = frozenset(map(int, (Outcome.DONE, Outcome.FULL, Outcome.FAILED, Outcome.LATE)))


class State(Enum):
    CONNECTING = auto()
    CONNECTED = auto()
    NOT_CONNECTED = auto()


@dataclass(eq=False, slots=True)
class Call:
    """One message to a child, and its answer. Keeps the caller's memory until it is over."""

    message: Find | Move
    over: asyncio.Future[None]
    items: Sequence[Item] = ()
    codes: bytes | None = None
    is_lost: bool = False
    """Its child ended with it."""
    is_unsettled: bool = False

    def end(self) -> None:
        if not self.over.done():
            self.over.set_result(None)


@dataclass(eq=False, slots=True)
class Life:
    """A child process, and what it was asked."""

    process: RdmaProcess
    since: float
    state: State = State.CONNECTING
    calls: dict[int, Call] = field(default_factory=dict)
    waiting: list[Call] = field(default_factory=list)
    """Until it is connected."""
    timer: asyncio.TimerHandle | None = None
    has_served: bool = False
    is_innocent: bool = False
    """It is killed, and would have served on."""


def again(call: Call) -> Call:
    """The same call, to be asked anew: nobody touches its buffers."""
    call.over = asyncio.get_running_loop().create_future()
    call.is_lost = False
    return call


class Lives:
    """Owns: the child that serves, and those that are killed and not gone yet. At most one serves.

    A call that is submitted ends: with an answer, or lost, when its child is gone. ``memory``'s descriptors go to each child.
    """

    def __init__(self, name: str, setup: Setup, memory: Memory, launch: Launch, start_timeout_s: float, clock: Callable[[], float]) -> None:
        self._name = name
        self._setup = setup
        self._memory = memory
        self._launch = launch
        self._start_timeout_s = start_timeout_s
        self._clock = clock
        self._dying: dict[RdmaProcess, Life] = {}
        self._all_gone: asyncio.Event | None = None
        self._failures = 0
        self._crashes = 0
        self._not_before = 0.0
        self._is_closed = False
        self.current: Life | None = None
        self.trouble = ""
        """What was the matter last."""

    @property
    def is_connected(self) -> bool:
        return self.current is not None and self.current.state is State.CONNECTED

    async def close(self) -> None:
        """End them, and wait until they are gone. May be called twice."""
        self._is_closed = True
        self._all_gone = self._all_gone or asyncio.Event()
        if self.current is not None:
            self.bury(self.current, "the node was closed")
        if self._dying:
            await self._all_gone.wait()

    def submit(self, life: Life, call: Call) -> None:
        life.calls[call.message.call] = call
        if life.state is State.CONNECTED:
            life.process.send(call.message)
        else:
            life.waiting.append(call)

    def withdraw(self, life: Life, calls: Sequence[Call]) -> None:
        for call in calls:
            if call.over.done():
                continue
            if call in life.waiting or life.process.unsend(call.message):
                life.waiting = [other for other in life.waiting if other is not call]
                del life.calls[call.message.call]
                call.end()
            elif isinstance(call.message, Move):
                life.process.send(Withdraw(call.message.call))

    def serving(self, is_probe: bool) -> Life | None:
        """The child, one started now where there is none; None where that failed a moment ago, or all is closed."""
        if self._is_closed:
            return None
        life = self.current
        if life is not None and life.state is not State.NOT_CONNECTED:
            return life
        if self._clock() < self._not_before and not is_probe:
            return None
        if life is not None:
            life.process.send(Connect())
            life.state = State.CONNECTING
        elif len(self._dying) >= _MOST_DYING:
            self.trouble = f"{len(self._dying)} child processes were killed and are not gone: does the driver hang?"
            return None
        else:
            try:
                process = RdmaProcess(self._launch, self._setup, self._memory.fds, self._on_message, self._on_gone)
            except PeerError as error:
                self._failed(str(error))
                return None
            self.current = life = Life(process, self._clock())
        life.timer = asyncio.get_running_loop().call_later(self._start_timeout_s, self._start_overdue, life)
        return life

    def _start_overdue(self, life: Life) -> None:
        self.bury(life, f"it was not connected within {self._start_timeout_s} s: is the server frozen?")

    def bury(self, life: Life, reason: str) -> None:
        """It serves no more; what it was asked is over when it is gone."""
        if self.current is life:
            self.current = None
            self._dying[life.process] = life
        life.process.break_off(reason)

    def _failed(self, trouble: str) -> None:
        self.trouble = trouble
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**self._failures) * random.uniform(0.5, 1.0)
        self._failures = min(self._failures + 1, 16)
        self._not_before = self._clock() + pause_s
        log.info("no connection", node=self._name, reason=trouble, again_in_s=round(pause_s, 3))

    def _on_message(self, process: RdmaProcess, message: FromChild) -> None:
        life = self.current if self.current is not None and self.current.process is process else self._dying.get(process)
        if life is None:
            return
        match message:
            case Connected(note) if life.state is State.CONNECTING:
                self._connected(life, note)
            case NotConnected(reason) if life.state is State.CONNECTING:
                life.state = State.NOT_CONNECTED
                self._stop_timer(life)
                self._failed(reason)
                waiting, life.waiting = life.waiting, []
                for call in waiting:
                    del life.calls[call.message.call]
                    call.is_lost = True
                    call.end()
            case Answer() if life.state is State.CONNECTED and self._is_sound(life, message):
                self._answered(life, message)
            case Broken(reason):
                self.trouble = reason
                self.bury(life, reason)
            case _:
                self.bury(life, f"it said what was not asked: {type(message).__name__}")

    def _connected(self, life: Life, note: str) -> None:
        life.state = State.CONNECTED
        self._stop_timer(life)
        if note:
            log.warning("RDMA connected, but", node=self._name, note=note)
        waiting, life.waiting = life.waiting, []
        for call in waiting:
            life.process.send(call.message)

    def _is_sound(self, life: Life, answer: Answer) -> bool:
        call = life.calls.get(answer.call)
        if call is None or len(answer.codes) != len(call.message.names):
            return False
        if isinstance(call.message, Find):
            return set(answer.codes) <= {0, 1}
        return set(answer.codes) <= (_OF_A_WRITE if call.message.is_write else _OF_A_READ)

    def _answered(self, life: Life, answer: Answer) -> None:
        call = life.calls.pop(answer.call)
        call.codes = answer.codes
        if answer.trouble:
            self.trouble = answer.trouble
            log.warning("values were not moved", node=self._name, reason=answer.trouble)
        life.has_served = True
        if self._crashes <= _FREE_CRASHES or self._clock() - life.since > _LONG_LIFE_S:
            self._failures, self._not_before = 0, 0.0
        call.end()

    def _stop_timer(self, life: Life) -> None:
        if life.timer is not None:
            life.timer.cancel()
            life.timer = None

    def _on_gone(self, process: RdmaProcess) -> None:
        life = self._dying.pop(process, None)
        if life is None:
            life, self.current = self.current, None
        assert life is not None
        self._stop_timer(life)
        if not self._is_closed:
            self.trouble = f"its child process is gone: {process.fate}"
            # A server that was started again costs no pause, a client that crashes whatever it is asked for does.
            if not life.is_innocent:
                self._crashes = 1 if self._clock() - life.since > _LONG_LIFE_S else self._crashes + 1
            if not life.has_served or self._crashes > _FREE_CRASHES:
                self._failed(self.trouble)
            log.warning(
                "the RDMA client's process has ended", node=self._name, process=process.pid, fate=process.fate, calls=len(life.calls)
            )
        for call in life.calls.values():
            call.is_lost = True
            call.end()
        if self._all_gone is not None and not self._dying and self.current is None:
            self._all_gone.set()
