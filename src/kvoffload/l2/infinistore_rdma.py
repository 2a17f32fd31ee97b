"""InfiniStore over RDMA: the native client, in a child process for each node, which has the segments mapped and registered.

The native client hangs, and ends its process, on what any network may bring; so it is kept out of the engine's. Deadlines are kept
here. A transfer that is late leaves its buffers UNSETTLED until the child says that it is over, or is known to be gone: only the end
of the process ends what a network card may still do to memory. A child that does not say so in time is killed, and another started.

Not run on RDMA hardware yet. What was run: this module and the real child program, against a stand-in for the native client
(`kvoffload.testing.rdma`); and questions whether a node has a value, against the real server. Not known, therefore: whether the
native client connects and moves values as its source says; how long it takes to register memory; what a child that is killed in
the middle of a transfer does to the server.

What a server needs, beside its pool, for each engine: 512 MiB of registered buffers, and the child as much (infinistore 0.2.35).
A child needs a memlock limit that allows for that and the segments.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path

import anyio

from kvoffload.errors import MisuseError, PeerError
from kvoffload.l2.node import Item, NodeUnreachable, Outcome
from kvoffload.l2.rdma_devices import SYSFS, Device
from kvoffload.l2.rdma_frames import (
    MOST_NAME_BYTES,
    MOST_VALUES,
    PROTOCOL_VERSION,
    Answer,
    Broken,
    Connect,
    Connected,
    Find,
    FromChild,
    Move,
    NotConnected,
    Setup,
    Withdraw,
)
from kvoffload.l2.rdma_memory import Memory, Shared
from kvoffload.l2.rdma_process import Launch, RdmaProcess
from kvoffload.observe.logs import get_logger

log = get_logger("l2")

MOST_VALUE_BYTES = (1 << 31) - 1  # the native client takes an int
_GRACE_S = 0.05  # after the deadline, for the child to say what became of it
_CANCEL_GRACE_S = 0.25
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 10.0
_MOST_DYING = 3
_PING = "kvoffload:ping"
_LONG_LIFE_S = 10.0
_FREE_CRASHES = 2
_OF_A_READ = frozenset(map(int, (Outcome.DONE, Outcome.ABSENT, Outcome.MALFORMED, Outcome.FAILED, Outcome.LATE)))
_OF_A_WRITE = frozenset(map(int, (Outcome.DONE, Outcome.FULL, Outcome.FAILED, Outcome.LATE)))


@dataclass(frozen=True, slots=True)
class RdmaSettings:
    """``device`` None: the first there is. ``link_type`` "Ethernet" or "IB". A child has ``start_timeout_s`` to start and connect,
    ``patience_s`` beyond a deadline to say that it has left the buffers, ``silence_s`` beyond it to answer what touches none.
    """

    device: Device | None = None
    link_type: str = "Ethernet"
    ib_port: int = 1
    connect_timeout_s: float = 1.0
    start_timeout_s: float = 30.0
    patience_s: float = 3.0
    silence_s: float = 10.0
    sysfs: Path = SYSFS


class _State(Enum):
    CONNECTING = auto()
    CONNECTED = auto()
    NOT_CONNECTED = auto()


@dataclass(eq=False, slots=True)
class _Call:
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
class _Life:
    """A child process, and what it was asked."""

    process: RdmaProcess
    since: float
    state: _State = _State.CONNECTING
    calls: dict[int, _Call] = field(default_factory=dict)
    waiting: list[_Call] = field(default_factory=list)
    """Until it is connected."""
    timer: asyncio.TimerHandle | None = None
    has_served: bool = False
    is_innocent: bool = False
    """It is killed, and would have served on."""


class InfiniStoreRdmaNode:
    """An `L2Node`. Values must lie in ``segments``, one slot's worth at most; those that do not are FAILED. Of one size or several.

    ``value_bytes`` is what values will have at most. ``clock`` must be that of the deadlines. Raises MisuseError.
    """

    def __init__(
        self,
        name: str,
        host: str,
        port: int,
        *,
        value_bytes: int,
        segments: Sequence[Shared],
        settings: RdmaSettings | None = None,
        spawn: Launch | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 < value_bytes <= MOST_VALUE_BYTES:
            raise MisuseError(f"node {name}: values of {value_bytes} bytes; at most {MOST_VALUE_BYTES} fit")
        self._name = name
        self._where = f"node {name}, {host}:{port} over RDMA"
        self._settings = settings = settings or RdmaSettings()
        self._launch = spawn or Launch()
        self._clock = clock
        self._memory = Memory(segments)
        device = settings.device or Device("")
        self._setup = Setup(
            version=PROTOCOL_VERSION,
            host=host,
            port=port,
            device=device.name,
            gid_index=-1 if device.gid_index is None else device.gid_index,
            link_type=settings.link_type,
            ib_port=settings.ib_port,
            connect_timeout_s=settings.connect_timeout_s,
            regions=self._memory.regions,
            sysfs=str(settings.sysfs),
        )
        self._ids = itertools.count(1)
        self._life: _Life | None = None
        self._dying: dict[RdmaProcess, _Life] = {}
        self._unsettled: set[_Call] = set()
        self._all_gone: asyncio.Event | None = None
        self._failures = 0
        self._crashes = 0
        self._not_before = 0.0
        self._trouble = ""
        self._is_closed = False

    @property
    def name(self) -> str:
        return self._name

    @property
    def child_pid(self) -> int | None:
        """Of the child that serves, or is about to."""
        return None if self._life is None else self._life.process.pid

    # ------------------------------------------------------------ L2Node

    async def find(self, names: Sequence[str], deadline: float) -> list[bool] | None:
        """One round trip for some 500 names."""
        if not names:
            return []
        loop = asyncio.get_running_loop()
        cuts = _cut([len(name.encode()) for name in names], len(names))
        calls = [_Call(Find(next(self._ids), [names[at] for at in cut]), loop.create_future()) for cut in cuts]
        await self._perform(calls, deadline)
        codes = [call.codes for call in calls if call.codes is not None]
        return [bool(code) for code in b"".join(codes)] if len(codes) == len(calls) else None

    async def read(self, items: Sequence[Item], deadline: float) -> list[Outcome]:
        for item in items:
            if item.buffer.readonly:
                raise MisuseError(f"{item.name} is to be read into memory that cannot be written")
        return await self._move(items, deadline, is_write=False)

    async def write(self, items: Sequence[Item], deadline: float) -> list[Outcome]:
        """A value that another engine writes at the same time may be stored twice, which does no harm but to the server's room."""
        return await self._move(items, deadline, is_write=True)

    async def settle(self) -> None:
        for call in list(self._unsettled):
            await asyncio.wait([call.over])

    async def ping(self, deadline: float) -> float:
        if self._is_closed:
            raise NodeUnreachable(f"{self._where}: the client is closed")
        begun = started = self._clock()
        call = _Call(Find(next(self._ids), [_PING]), asyncio.get_running_loop().create_future())
        was_connected = self._life is not None and self._life.state is _State.CONNECTED
        await self._perform([call], deadline, is_probe=True)
        if call.codes is not None and not was_connected:
            started = self._clock()
            call = _Call(Find(next(self._ids), [_PING]), asyncio.get_running_loop().create_future())
            await self._perform([call], deadline, is_probe=True)
        if call.codes is not None:
            return self._clock() - started
        seconds = self._clock() - begun
        state = "not connected yet" if self._life is None or self._life.state is not _State.CONNECTED else "connected, but silent"
        raise NodeUnreachable(
            f"{self._where}: no answer within {max(0.0, seconds):.3f} s ({state}). {self._trouble or 'No error was seen.'}"
        )

    async def close(self) -> None:
        """Ends the child, and waits until it is gone."""
        self._is_closed = True
        self._all_gone = self._all_gone or asyncio.Event()
        if self._life is not None:
            self._bury(self._life, "the node was closed")
        try:
            if self._dying:
                await self._all_gone.wait()
        finally:
            self._memory.close()

    # ------------------------------------------------------------ calls

    async def _move(self, items: Sequence[Item], deadline: float, *, is_write: bool) -> list[Outcome]:
        outcomes = [Outcome.FAILED] * len(items)
        loop = asyncio.get_running_loop()
        by_size: dict[int, list[tuple[int, tuple[int, int]]]] = {}
        for at, item in enumerate(items):
            place = self._memory.locate(item.buffer)
            if place is not None and len(item.name.encode()) <= MOST_NAME_BYTES:
                by_size.setdefault(item.buffer.nbytes, []).append((at, place))
            else:
                log.error("a buffer outside of the segments cannot be moved by RDMA", node=self._name, value=item.name)
        calls: list[_Call] = []
        spots: list[list[int]] = []
        for size, some in by_size.items():
            for cut in _cut([len(items[at].name.encode()) for at, _ in some], MOST_VALUES):
                share = [some[index] for index in cut]
                spots.append([at for at, _ in share])
                message = Move(next(self._ids), is_write, size, [items[at].name for at in spots[-1]], [place for _, place in share])
                calls.append(_Call(message, loop.create_future(), [items[at] for at in spots[-1]]))
        if not await self._perform(calls, deadline):
            outcomes = [Outcome.LATE] * len(items)
        for call, at_all in zip(calls, spots, strict=True):
            for index, at in enumerate(at_all):
                if call.codes is not None:
                    outcomes[at] = Outcome(call.codes[index])
                elif call.is_unsettled and not call.over.done():
                    outcomes[at] = Outcome.UNSETTLED
                elif call.is_lost:
                    outcomes[at] = Outcome.FAILED
        return outcomes

    async def _perform(self, calls: Sequence[_Call], deadline: float, *, is_probe: bool = False) -> bool:
        """Until all are over, or the deadline came (False). What is not over then is in `_unsettled`, if it has buffers.

        Once more with another child, where one that has served ended in the middle: its server may have been started again.
        """
        if self._is_closed or not calls:
            return True
        left: Sequence[_Call] = calls
        for _ in range(2):
            if self._clock() >= deadline:
                return False
            life = self._serving(is_probe)
            if life is None:
                return True
            for call in left:
                self._submit(life, call)
            try:
                await asyncio.wait([call.over for call in left], timeout=max(0.0, deadline - self._clock()))
                if not all(call.over.done() for call in left):
                    await self._give_up(life, left)
                    return False
            except asyncio.CancelledError:
                await self._abandon(life, left)
                raise
            if self._is_closed or not life.has_served or life is self._life:
                return True
            left = [_again(call) for call in left if call.is_lost]
            if not left:
                return True
        return True

    def _submit(self, life: _Life, call: _Call) -> None:
        life.calls[call.message.call] = call
        if life.state is _State.CONNECTED:
            life.process.send(call.message)
        else:
            life.waiting.append(call)

    async def _give_up(self, life: _Life, calls: Sequence[_Call]) -> None:
        """The deadline came. The child has a moment to say what became of it, and more to say that it has left the buffers."""
        loop = asyncio.get_running_loop()
        self._withdraw(life, calls)
        running = [call for call in calls if not call.over.done()]
        if running:
            await asyncio.wait([call.over for call in running], timeout=_GRACE_S)
        for call in running:
            if not call.over.done():
                patience_s = self._settings.silence_s
                if isinstance(call.message, Move):
                    patience_s = self._settings.patience_s
                    call.is_unsettled = True
                    self._unsettled.add(call)
                    call.over.add_done_callback(lambda _, call=call: self._unsettled.discard(call))  # type: ignore[misc]
                timer = loop.call_later(patience_s, self._overdue, life, call)
                call.over.add_done_callback(lambda _, timer=timer: timer.cancel())  # type: ignore[misc]

    async def _abandon(self, life: _Life, calls: Sequence[_Call]) -> None:
        """The caller is cancelled, and takes its memory along: a child that does not leave it at once is killed for it."""
        self._withdraw(life, calls)
        moves = [call.over for call in calls if isinstance(call.message, Move)]
        await _until_done(moves, _CANCEL_GRACE_S)
        if not all(over.done() for over in moves):
            life.is_innocent = True
            self._bury(life, "a transfer was cancelled, and the child did not leave its buffers")
            await _until_done(moves, None)
        loop = asyncio.get_running_loop()
        for call in calls:
            if not call.over.done():
                timer = loop.call_later(self._settings.silence_s, self._overdue, life, call)
                call.over.add_done_callback(lambda _, timer=timer: timer.cancel())  # type: ignore[misc]

    def _withdraw(self, life: _Life, calls: Sequence[_Call]) -> None:
        for call in calls:
            if call.over.done():
                continue
            if call in life.waiting or life.process.unsend(call.message):
                life.waiting = [other for other in life.waiting if other is not call]
                del life.calls[call.message.call]
                call.end()
            elif isinstance(call.message, Move):
                life.process.send(Withdraw(call.message.call))

    def _overdue(self, life: _Life, call: _Call) -> None:
        if not call.over.done():
            self._bury(life, "it did not end what it had begun")

    # ------------------------------------------------------------ children

    def _serving(self, is_probe: bool) -> _Life | None:
        """The child, one started now where there is none; None where that failed a moment ago."""
        life = self._life
        if life is not None and life.state is not _State.NOT_CONNECTED:
            return life
        if self._clock() < self._not_before and not is_probe:
            return None
        if life is not None:
            life.process.send(Connect())
            life.state = _State.CONNECTING
        elif len(self._dying) >= _MOST_DYING:
            self._trouble = f"{len(self._dying)} child processes were killed and are not gone: does the driver hang?"
            return None
        else:
            try:
                process = RdmaProcess(self._launch, self._setup, self._memory.fds, self._on_message, self._on_gone)
            except PeerError as error:
                self._failed(str(error))
                return None
            self._life = life = _Life(process, self._clock())
        life.timer = asyncio.get_running_loop().call_later(self._settings.start_timeout_s, self._start_overdue, life)
        return life

    def _start_overdue(self, life: _Life) -> None:
        self._bury(life, f"it was not connected within {self._settings.start_timeout_s} s: is the server frozen?")

    def _bury(self, life: _Life, reason: str) -> None:
        """It serves no more; what it was asked is over when it is gone."""
        if self._life is life:
            self._life = None
            self._dying[life.process] = life
        life.process.break_off(reason)

    def _failed(self, trouble: str) -> None:
        self._trouble = trouble
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**self._failures) * random.uniform(0.5, 1.0)
        self._failures = min(self._failures + 1, 16)
        self._not_before = self._clock() + pause_s
        log.info("no connection", node=self._name, reason=trouble, again_in_s=round(pause_s, 3))

    def _on_message(self, process: RdmaProcess, message: FromChild) -> None:
        life = self._life if self._life is not None and self._life.process is process else self._dying.get(process)
        if life is None:
            return
        match message:
            case Connected(note) if life.state is _State.CONNECTING:
                self._connected(life, note)
            case NotConnected(reason) if life.state is _State.CONNECTING:
                life.state = _State.NOT_CONNECTED
                self._stop_timer(life)
                self._failed(reason)
                waiting, life.waiting = life.waiting, []
                for call in waiting:
                    del life.calls[call.message.call]
                    call.is_lost = True
                    call.end()
            case Answer() if life.state is _State.CONNECTED and self._is_sound(life, message):
                self._answered(life, message)
            case Broken(reason):
                self._trouble = reason
                self._bury(life, reason)
            case _:
                self._bury(life, f"it said what was not asked: {type(message).__name__}")

    def _connected(self, life: _Life, note: str) -> None:
        life.state = _State.CONNECTED
        self._stop_timer(life)
        if note:
            log.warning("RDMA connected, but", node=self._name, note=note)
        waiting, life.waiting = life.waiting, []
        for call in waiting:
            life.process.send(call.message)

    def _is_sound(self, life: _Life, answer: Answer) -> bool:
        call = life.calls.get(answer.call)
        if call is None or len(answer.codes) != len(call.message.names):
            return False
        if isinstance(call.message, Find):
            return set(answer.codes) <= {0, 1}
        return set(answer.codes) <= (_OF_A_WRITE if call.message.is_write else _OF_A_READ)

    def _answered(self, life: _Life, answer: Answer) -> None:
        call = life.calls.pop(answer.call)
        call.codes = answer.codes
        if answer.trouble:
            self._trouble = answer.trouble
            log.warning("values were not moved", node=self._name, reason=answer.trouble)
        life.has_served = True
        if self._crashes <= _FREE_CRASHES or self._clock() - life.since > _LONG_LIFE_S:
            self._failures, self._not_before = 0, 0.0
        call.end()

    def _stop_timer(self, life: _Life) -> None:
        if life.timer is not None:
            life.timer.cancel()
            life.timer = None

    def _on_gone(self, process: RdmaProcess) -> None:
        life = self._dying.pop(process, None)
        if life is None:
            life, self._life = self._life, None
        assert life is not None
        self._stop_timer(life)
        if not self._is_closed:
            self._trouble = f"its child process is gone: {process.fate}"
            # A server that was started again costs no pause, a client that crashes whatever it is asked for does.
            if not life.is_innocent:
                self._crashes = 1 if self._clock() - life.since > _LONG_LIFE_S else self._crashes + 1
            if not life.has_served or self._crashes > _FREE_CRASHES:
                self._failed(self._trouble)
            log.warning(
                "the RDMA client's process has ended", node=self._name, process=process.pid, fate=process.fate, calls=len(life.calls)
            )
        for call in life.calls.values():
            call.is_lost = True
            call.end()
        if self._all_gone is not None and not self._dying and self._life is None:
            self._all_gone.set()


def _again(call: _Call) -> _Call:
    """The same call, to be asked anew: nobody touches its buffers."""
    call.over = asyncio.get_running_loop().create_future()
    call.is_lost = False
    return call


def _cut(name_bytes: Sequence[int], most: int) -> list[list[int]]:
    """Places, in runs of at most so many, and of names that fit into a message."""
    runs: list[list[int]] = []
    room = 0
    for place, size in enumerate(name_bytes):
        size += 20  # what else is said of it
        if room < size or len(runs[-1]) >= most:
            runs.append([])
            room = MOST_NAME_BYTES
        runs[-1].append(place)
        room -= size
    return runs


async def _until_done(futures: Sequence[asyncio.Future[None]], timeout_s: float | None) -> None:
    """However often the task is cancelled meanwhile, by anyio or by asyncio: somebody uses its memory."""
    until = None if timeout_s is None else time.monotonic() + timeout_s
    with anyio.CancelScope(shield=True):
        while pending := [future for future in futures if not future.done()]:
            left_s = None if until is None else until - time.monotonic()
            if left_s is not None and left_s <= 0:
                return
            with suppress(asyncio.CancelledError):
                await asyncio.wait(pending, timeout=left_s)
