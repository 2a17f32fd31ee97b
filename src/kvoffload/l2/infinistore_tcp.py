"""InfiniStore over TCP, with a client of our own: the native one hangs for ever on a missing key, and takes its process along
when the server dies.

What the real server (0.2.35) makes us do:

- A value is put once, under ``<name>:<nonce>``, and then a pointer to it under ``<name>``, in one send. The server shows a key from
  the first byte of its value on, and dies when somebody reads or deletes it before the last.
- A value is put in parts of at most 2 MiB, each under a key of its own: of longer answers the server may freeze.
- A connection is kept until all its answers have been read, however late they come: see `kvoffload.l2.infinistore_socket`. An
  engine that is killed in the middle of a read may take the node along; nothing here can prevent that.
- Nothing is sent behind a get that has not been answered whole: the server would answer that get for ever.
- A name whose pointer exists is not written again: a key put twice is lost when the older of its values is evicted.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

import anyio

from kvoffload.errors import MisuseError
from kvoffload.l2 import infinistore_native as native
from kvoffload.l2 import infinistore_socket as wired
from kvoffload.l2.infinistore_drive import Drive
from kvoffload.l2.infinistore_lane import Lane, Report, Server
from kvoffload.l2.infinistore_transfers import Discard, Find, Transfer
from kvoffload.l2.infinistore_values import Read, Share, Write
from kvoffload.l2.infinistore_wire import MOST_VALUE_BYTES
from kvoffload.l2.node import Item, NodeUnreachable, Outcome
from kvoffload.l2.values import Values
from kvoffload.observe.logs import get_logger

log = get_logger("l2")

_SHARE_BYTES = 32 << 20  # one connection's share of a call at a time: others get their turn between them
_SHARE_ITEMS = 64
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0
_CLOSE_S = 0.5
_AT_ONCE_S = 0.0005
"""For so long at most do calls that are done at once keep the loop from everybody else."""
_PING = "kvoffload:ping"


class InfiniStoreTcpNode:
    """An `L2Node`. A thread for each of ``connections``; writes take at most half of several, finds and reads any. What is short the loop's
    thread does itself where a connection is idle: see `kvoffload.l2.infinistore_drive`.

    ``host`` may be a name or an address of either family; ``value_bytes`` is what values will have at most, to reject settings that cannot
    work. ``clock`` must be that of the deadlines. Never says UNSETTLED. Raises UnsupportedError where numba cannot compile, MisuseError.
    """

    def __init__(
        self,
        name: str,
        host: str,
        port: int,
        *,
        value_bytes: int,
        connections: int = 4,
        connect_timeout_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 < value_bytes <= MOST_VALUE_BYTES or connections < 1:
            raise MisuseError(f"node {name}: {connections} connections for values of {value_bytes} bytes; at most {MOST_VALUE_BYTES} fit")
        native.loops()
        self._name = name
        self._server = Server(host, port, connect_timeout_s)
        self._connections = connections
        # The server has one thread: more connections hide the time of flight, of a write once a value, of a read twice.
        self._write_lanes = max(1, connections // 2)
        self._clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._urgent: deque[Transfer] = deque()
        self._reads: deque[Transfer] = deque()
        self._writes: deque[Transfer] = deque()
        self._waiting: dict[Transfer, _Call] = {}
        self._lanes: set[Lane] = set()
        self._open: list[Lane] = []  # idle, the one used last at the end
        self._cold: list[Lane] = []  # idle, without a connection
        self._writing: set[Lane] = set()
        self._yield_at = float("-inf")
        self._drives: dict[Transfer, Drive] = {}
        self._failures = 0
        self._not_before = 0.0
        self._trouble = ""
        self._is_closed = False
        self._all_ended: asyncio.Event | None = None

    @property
    def name(self) -> str:
        return self._name

    # ------------------------------------------------------------ L2Node

    @property
    def renewals(self) -> int:
        return sum([lane.renewals for lane in list(self._lanes)])

    async def find(self, names: Sequence[str], deadline: float) -> list[bool] | None:
        if not names:
            return []
        find = Find(deadline, names)
        await self._perform([find], deadline)
        return find.found

    async def read(self, items: Sequence[Item], deadline: float) -> list[Outcome]:
        if not (isinstance(items, Values) and items.is_writable):
            for item in items:
                if item.buffer.readonly:
                    raise MisuseError(f"{item.name} is to be read into memory that cannot be written")
        return await self._transfer(Read, items, deadline)

    async def write(self, items: Sequence[Item], deadline: float) -> list[Outcome]:
        return await self._transfer(Write, items, deadline)

    async def discard(self, names: Sequence[str], deadline: float) -> None:
        """Their pointers: the values are evicted in time."""
        if names:
            await self._perform([Discard(deadline, names)], deadline)

    async def settle(self) -> None:
        """At once: nothing is ever unsettled."""

    async def ping(self, deadline: float) -> float:
        where = f"node {self._name}, {self._server.host}:{self._server.port}"
        if self._is_closed:
            raise NodeUnreachable(f"{where}: the client is closed")
        ping = Find(deadline, [_PING], is_probe=True)
        await self._perform([ping], deadline)
        if ping.found is not None:
            return ping.seconds
        if ping.trouble:
            raise NodeUnreachable(f"{where}: {ping.trouble}")
        if self._is_closed:
            raise NodeUnreachable(f"{where}: the client was closed")
        if ping.is_withdrawn and not self._open and self._lanes and self._trouble:
            raise NodeUnreachable(f"{where}: not in time; what was the matter last: {self._trouble}")
        raise NodeUnreachable(
            f"{where}: no answer in time: is it frozen, overloaded, behind a firewall, or no InfiniStore server's data port?"
        )

    async def close(self) -> None:
        """Connections on which an answer is outstanding linger for up to a minute, with their threads, for the server's sake."""
        if not self._is_closed:
            self._is_closed = True
            for transfer in list(self._waiting):
                if transfer.claim():
                    self._fail(transfer)
                else:
                    self._stop(transfer)
            for lane in self._lanes:
                lane.end()
        for call in set(self._waiting.values()):
            await call.is_over.wait()
        if self._lanes:
            self._all_ended = self._all_ended or asyncio.Event()
            with anyio.move_on_after(_CLOSE_S):
                await self._all_ended.wait()

    # ------------------------------------------------------------ calls

    async def _transfer(self, kind: type[Share], items: Sequence[Item], deadline: float) -> list[Outcome]:
        lanes = self._write_lanes if kind is Write else self._connections
        if isinstance(items, Values):  # not one of them is made here
            places = _cut_equal(len(items), _checked("values", items.value_bytes), lanes)
        else:
            places = _cut([_checked(repr(item.name), item.buffer.nbytes) for item in items], lanes)
            for item in items:
                if not item.name or not item.buffer.contiguous:
                    raise MisuseError(f"{item.name!r}: a name, and one run of bytes are needed")
        shares = [kind(deadline, items[share.start : share.stop : share.step]) for share in places]
        await self._perform(shares, deadline)
        outcomes = [Outcome.LATE] * len(items)
        for share, values in zip(places, shares, strict=True):
            outcomes[share.start : share.stop : share.step] = values.outcomes
        if self._is_closed:
            return [Outcome.FAILED if outcome is Outcome.LATE else outcome for outcome in outcomes]
        return outcomes

    async def _perform(self, transfers: Sequence[Transfer], deadline: float) -> None:
        """Until all are over, or withdrawn because the deadline came before they began."""
        left_s = deadline - self._clock()
        if not transfers or left_s <= 0 or self._is_closed:
            return
        self._loop = loop = asyncio.get_running_loop()
        call = _Call(len(transfers))
        for transfer in transfers:
            self._waiting[transfer] = call
            (self._writes if transfer.is_write else self._urgent if transfer.is_urgent else self._reads).append(transfer)
        timer = None
        try:
            self._dispatch()
            if not all([transfer.is_under_way for transfer in transfers]):  # those that are see to their deadline themselves
                timer = loop.call_later(left_s, self._withdraw, transfers)
            if not call.left and self._clock() >= self._yield_at:  # not each time: beside a busy engine to yield may take 5 ms
                self._yield_at = self._clock() + _AT_ONCE_S
                await asyncio.sleep(0)
            await call.is_over.wait()
        except BaseException:  # a cancellation, or a bug: nothing of this call may touch a buffer behind it
            self._withdraw(transfers)
            for transfer in transfers:
                self._stop(transfer)
            await call.until_over()
            raise
        finally:
            if timer is not None:
                timer.cancel()
        for transfer in transfers:
            if transfer.error is not None:
                raise transfer.error

    def _await_connection(self, transfer: Transfer) -> None:
        """Not beyond its deadline."""
        left_s = transfer.deadline - self._clock()
        if transfer in self._waiting and (self._is_closed or left_s <= 0):
            self._withdraw([transfer])
        elif transfer in self._waiting and self._loop is not None:
            self._loop.call_later(left_s, self._withdraw, [transfer])

    def _withdraw(self, transfers: Sequence[Transfer]) -> None:
        """What runs ends at its deadline by itself; what does not run never will."""
        for transfer in transfers:
            if transfer in self._waiting and transfer.claim():
                transfer.is_withdrawn = True
                self._settle(transfer)

    def _stop(self, transfer: Transfer) -> None:
        """It may run, and ends soon."""
        transfer.stop()
        drive = self._drives.get(transfer)
        if drive is not None:
            drive.leave()

    def _fail(self, transfer: Transfer) -> None:
        transfer.trouble = transfer.trouble or self._trouble
        transfer.conclude(wired.CLOSED)
        self._settle(transfer)

    def _settle(self, transfer: Transfer) -> None:
        self._drives.pop(transfer, None)
        call = self._waiting.pop(transfer, None)
        if call is not None:
            call.left -= 1
            if not call.left:
                call.is_over.set()

    # ------------------------------------------------------------ lanes

    def _dispatch(self) -> None:
        """Give idle lanes what waits. Fail it where there is no connection, and none may be tried yet."""
        loop, driven = self._loop, 0
        assert loop is not None
        while (queue := self._next_queue()) is not None:
            if driven == self._connections:  # their requests were made here: somebody else's turn
                loop.call_soon(self._dispatch)
                return
            transfer = queue[0]
            if transfer not in self._waiting:
                queue.popleft()
                continue
            has_connection = bool(self._open)
            lane = self._lane(transfer.is_probe)
            if lane is not None:
                queue.popleft()
                transfer.is_under_way = has_connection
                if transfer.is_write:
                    self._writing.add(lane)
                if has_connection and transfer.is_short:
                    driven += 1
                    self._drive(loop, lane, transfer)
                else:
                    lane.give(transfer)
            elif len(self._lanes) > len(self._cold):
                return  # one that is at work will have its turn
            else:
                queue.popleft()
                if transfer.claim():
                    self._fail(transfer)

    def _drive(self, loop: asyncio.AbstractEventLoop, lane: Lane, transfer: Transfer) -> None:
        transfer.claim()  # nobody else could: no thread knows it
        drive = Drive(loop, lane, transfer, lambda: transfer.deadline - self._clock(), self._was_driven)
        self._drives[transfer] = drive
        if drive.start():
            self._settle(transfer)
            self._open.append(lane)

    def _was_driven(self, lane: Lane, transfer: Transfer) -> None:
        self._settle(transfer)
        self._open.append(lane)
        self._dispatch()

    def _next_queue(self) -> deque[Transfer] | None:
        if self._urgent:
            return self._urgent
        if self._reads:
            return self._reads
        return self._writes if self._writes and len(self._writing) < self._write_lanes else None

    def _lane(self, is_probe: bool) -> Lane | None:
        if self._open:
            return self._open.pop()
        if self._clock() < self._not_before and not is_probe:
            return None
        if self._cold:
            return self._cold.pop()
        if len(self._lanes) == self._connections:
            return None
        try:
            lane = Lane(f"kvoffload-{self._name}-{len(self._lanes)}", self._server, self._clock, self._post)
        except RuntimeError as error:  # a limit on processes or threads
            self._trouble = f"no thread for a connection: {error}"
            return None
        self._lanes.add(lane)
        return lane

    def _post(self, report: Report) -> None:
        """From a lane's thread."""
        loop = self._loop
        assert loop is not None
        with suppress(RuntimeError):  # the loop was closed over it
            loop.call_soon_threadsafe(self._hear, report)

    def _hear(self, report: Report) -> None:
        lane, transfer = report.lane, report.released
        if transfer is not None:
            self._trouble = transfer.trouble or self._trouble
            self._settle(transfer)
        if report.connecting_for is not None:
            self._drives.pop(report.connecting_for, None)
            self._await_connection(report.connecting_for)
            return
        if report.has_ended:
            self._lanes.discard(lane)
            if not self._lanes and self._all_ended is not None:
                self._all_ended.set()
            return
        if not report.is_idle:
            return
        self._writing.discard(lane)
        (self._open if report.is_open else self._cold).append(lane)
        if report.is_open:
            self._failures, self._not_before = 0, 0.0
        elif report.has_failed and self._clock() >= self._not_before:  # those that tried at the same time count as one
            pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**self._failures) * random.uniform(0.5, 1.0)
            self._failures = min(self._failures + 1, 10)
            self._not_before = self._clock() + pause_s
            log.info("cannot connect", node=self._name, reason=self._trouble, again_in_s=round(pause_s, 3))
        self._dispatch()


def _checked(name: str, num_bytes: int) -> int:
    if not 0 < num_bytes <= MOST_VALUE_BYTES:
        raise MisuseError(f"{name}: {num_bytes} bytes; a value has at least one, and at most {MOST_VALUE_BYTES}")
    return num_bytes


def _cut(sizes: Sequence[int], connections: int) -> list[range]:
    """The places of each share. Connections take turns, so that what is done when time runs out is the beginning; bounded shares."""
    shares: list[range] = []
    first, total = 0, 0
    for place, size in enumerate(sizes):
        if total + size > _SHARE_BYTES * connections or place - first == _SHARE_ITEMS * connections:
            shares += _deal(range(first, place), connections)
            first, total = place, 0
        total += size
    return [*shares, *_deal(range(first, len(sizes)), connections)]


def _cut_equal(count: int, num_bytes: int, connections: int) -> list[range]:
    """`_cut` of so many, all of the same size."""
    at_once = max(1, min(_SHARE_ITEMS * connections, _SHARE_BYTES * connections // num_bytes))
    return [share for first in range(0, count, at_once) for share in _deal(range(first, min(first + at_once, count)), connections)]


def _deal(places: range, connections: int) -> list[range]:
    return [places[start::connections] for start in range(min(connections, len(places)))]


class _Call:
    """What it waits for. It is over when no thread has any of its buffers."""

    __slots__ = ("is_over", "left")

    def __init__(self, transfers: int) -> None:
        self.left = transfers
        self.is_over = asyncio.Event()

    async def until_over(self) -> None:
        """However often the task is cancelled meanwhile, by anyio or by asyncio: it takes 20 ms."""
        with anyio.CancelScope(shield=True):
            while self.left:
                with suppress(asyncio.CancelledError):
                    await self.is_over.wait()
