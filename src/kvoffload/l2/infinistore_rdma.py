"""InfiniStore over RDMA: the native client, in a child process for each node, which has the segments mapped and registered.

The native client hangs, and ends its process, on what any network may bring; so it is kept out of the engine's. Deadlines are kept
here. A transfer that is late leaves its buffers UNSETTLED until the child says that it is over, or is known to be gone: only the end
of the process ends what a network card may still do to memory. A child that does not say so in time is killed, and another started.

Not run on RDMA hardware yet. What was run: this module and the real child program against a stand-in for the native client
(`kvoffload.testing.rdma_server`); the real client (0.2.35) up to where it finds no device; questions whether a node has a value, against
the real server. Not known, therefore: whether the client connects and moves values as its source says, how long it takes to register
memory, and what a child that is killed in the middle of a transfer does to the server.

What a server needs, beside its pool, for each engine: 512 MiB of registered buffers, and the child as much (infinistore 0.2.35).
A child needs a memlock limit that allows for that and the segments.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import anyio

from kvoffload.errors import MisuseError
from kvoffload.l2.node import Item, NodeUnreachable, Outcome
from kvoffload.l2.rdma_devices import SYSFS, Device
from kvoffload.l2.rdma_frames import MOST_NAME_BYTES, MOST_VALUES, PROTOCOL_VERSION, Find, Move, Setup
from kvoffload.l2.rdma_lives import Call, Life, Lives, again
from kvoffload.l2.rdma_memory import Memory, Shared
from kvoffload.l2.rdma_process import Launch
from kvoffload.observe.logs import get_logger

log = get_logger("l2")

MOST_VALUE_BYTES = (1 << 31) - 1  # the native client takes an int
_GRACE_S = 0.05  # after the deadline, for the child to say what became of it
_CANCEL_GRACE_S = 0.25
_PING = "kvoffload:ping"


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
        self._clock = clock
        self._memory = Memory(segments)
        device = settings.device or Device("")
        setup = Setup(
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
        self._unsettled: set[Call] = set()
        self._lives = Lives(name, setup, self._memory, spawn or Launch(), settings.start_timeout_s, clock)
        self._is_closed = False

    @property
    def name(self) -> str:
        return self._name

    @property
    def child_pid(self) -> int | None:
        """Of the child that serves, or is about to."""
        return None if self._lives.current is None else self._lives.current.process.pid

    # ------------------------------------------------------------ L2Node

    @property
    def renewals(self) -> int:
        """0: when its server goes, calls fail until there is another child, which is noticed otherwise."""
        return 0

    async def find(self, names: Sequence[str], deadline: float) -> list[bool] | None:
        """One round trip for some 500 names."""
        if not names:
            return []
        loop = asyncio.get_running_loop()
        cuts = _cut([len(name.encode()) for name in names], len(names))
        calls = [Call(Find(next(self._ids), [names[at] for at in cut]), loop.create_future()) for cut in cuts]
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

    async def discard(self, names: Sequence[str], deadline: float) -> None:
        """Nothing: values are under their own names here, and a delete of one that another engine puts at that moment ends the server."""

    async def settle(self) -> None:
        for call in list(self._unsettled):
            await asyncio.wait([call.over])

    async def ping(self, deadline: float) -> float:
        if self._is_closed:
            raise NodeUnreachable(f"{self._where}: the client is closed")
        seconds = await self._ask_ping(deadline)
        if seconds is not None and self._clock() < deadline:
            seconds = await self._ask_ping(deadline)  # the first one may have started the child
        if seconds is None:
            state = "connected, but silent" if self._lives.is_connected else "not connected"
            raise NodeUnreachable(f"{self._where}: no answer in time ({state}). {self._lives.trouble or 'No error was seen.'}")
        return seconds

    async def _ask_ping(self, deadline: float) -> float | None:
        started = self._clock()
        call = Call(Find(next(self._ids), [_PING]), asyncio.get_running_loop().create_future())
        await self._perform([call], deadline, is_probe=True)
        return None if call.codes is None else self._clock() - started

    async def close(self) -> None:
        """Ends the child, and waits until it is gone."""
        self._is_closed = True
        try:
            await self._lives.close()
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
        calls: list[Call] = []
        spots: list[list[int]] = []
        for size, some in by_size.items():
            for cut in _cut([len(items[at].name.encode()) for at, _ in some], MOST_VALUES):
                share = [some[index] for index in cut]
                spots.append([at for at, _ in share])
                message = Move(next(self._ids), is_write, size, [items[at].name for at in spots[-1]], [place for _, place in share])
                calls.append(Call(message, loop.create_future(), [items[at] for at in spots[-1]]))
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

    async def _perform(self, calls: Sequence[Call], deadline: float, *, is_probe: bool = False) -> bool:
        """Until all are over, or the deadline came (False). What is not over then is in `_unsettled`, if it has buffers.

        Once more with another child, where one that has served ended in the middle: its server may have been started again.
        """
        if self._is_closed or not calls:
            return True
        left: Sequence[Call] = calls
        for _ in range(2):
            if self._clock() >= deadline:
                return False
            life = self._lives.serving(is_probe)
            if life is None:
                return True
            for call in left:
                self._lives.submit(life, call)
            try:
                await asyncio.wait([call.over for call in left], timeout=max(0.0, deadline - self._clock()))
                if not all(call.over.done() for call in left):
                    await self._give_up(life, left)
                    return False
            except asyncio.CancelledError:
                await self._abandon(life, left)
                raise
            if not life.has_served or life is self._lives.current:
                return True
            left = [again(call) for call in left if call.is_lost]
            if not left:
                return True
        return True

    async def _give_up(self, life: Life, calls: Sequence[Call]) -> None:
        """The deadline came. The child has a moment to say what became of it, and more to say that it has left the buffers."""
        self._lives.withdraw(life, calls)
        running = [call for call in calls if not call.over.done()]
        if running:
            await asyncio.wait([call.over for call in running], timeout=_GRACE_S)
        for call in running:
            if call.over.done():
                continue
            if isinstance(call.message, Move):
                call.is_unsettled = True
                self._unsettled.add(call)
                call.over.add_done_callback(lambda _, call=call: self._unsettled.discard(call))  # type: ignore[misc]
            self._bury_unless_over(life, call)

    async def _abandon(self, life: Life, calls: Sequence[Call]) -> None:
        """The caller is cancelled, and takes its memory along: a child that does not leave it at once is killed for it."""
        self._lives.withdraw(life, calls)
        moves = [call.over for call in calls if isinstance(call.message, Move)]
        await _until_done(moves, _CANCEL_GRACE_S)
        if not all(over.done() for over in moves):
            life.is_innocent = True
            self._lives.bury(life, "a transfer was cancelled, and the child did not leave its buffers")
            await _until_done(moves, None)
        for call in calls:
            if not call.over.done():
                self._bury_unless_over(life, call)

    def _bury_unless_over(self, life: Life, call: Call) -> None:
        """What the child has begun must end some time."""
        patience_s = self._settings.patience_s if isinstance(call.message, Move) else self._settings.silence_s
        reason = f"it did not end what it had begun within {patience_s} s of its deadline"
        timer = asyncio.get_running_loop().call_later(patience_s, self._lives.bury, life, reason)
        call.over.add_done_callback(lambda _: timer.cancel())


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
