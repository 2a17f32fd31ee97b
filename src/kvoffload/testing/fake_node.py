"""A node of the second tier that is not there: it holds, slows, loses, corrupts and lies when a test says so, else it does its work."""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

import anyio
from anyio.lowlevel import checkpoint

from kvoffload.errors import MisuseError
from kvoffload.l2.node import Item, NodeUnreachable, Outcome

Kind = Literal["find", "read", "write", "discard", "ping"]
KINDS: tuple[Kind, ...] = ("find", "read", "write", "discard", "ping")


class NodeFault(Enum):
    """What to do to one call. Those of reads and writes befall all items of the call, or those that a test names."""

    NONE = "none"
    ERROR = "error"
    """FAILED, after the latency; a find is answered None."""
    REFUSE = "refuse"
    """FAILED, at once, as by a host where nobody listens."""
    NEVER = "never"
    """No answer until the deadline."""
    RAISE = "raise"
    """`InjectedNodeCrash`: a bug in the client, which no node should have."""
    FULL = "full"
    ABSENT = "absent"
    """Reads and finds: not there, though it is."""
    MALFORMED = "malformed"
    OTHER_KEY = "other_key"
    """Reads: the value of another name, DONE; of the same length where there is one."""
    TRUNCATED = "truncated"
    """Reads: only the first half arrives, and it is called DONE all the same."""
    FLIPPED = "flipped"
    """Reads: one bit is wrong, DONE."""
    HALF_WRITTEN = "half_written"
    """Writes: FAILED, and the name has a value whose second half is zeros."""
    LOST = "lost"
    """Writes: DONE, and nothing was stored."""
    UNSETTLED = "unsettled"
    """Not transferred, and UNSETTLED: the buffer is written to once more by `FakeNode.settle_now`, or after ``settle_s``."""


class InjectedNodeCrash(Exception):
    """What `NodeFault.RAISE` raises."""


@dataclass(slots=True)
class FakeStore:
    """What several `FakeNode` share as if it were one server: values by name, and whether it lives."""

    values: dict[str, bytes] = field(default_factory=dict)
    capacity_bytes: int | None = None
    is_up: bool = True
    is_frozen: bool = False
    epoch: int = 0
    """How often it was killed: no call outlives that."""
    restarts: int = 0
    changed: anyio.Event = field(default_factory=anyio.Event)

    @property
    def used_bytes(self) -> int:
        return sum(map(len, self.values.values()))

    def kill(self) -> None:
        """Everything is gone; calls under way fail."""
        self.values.clear()
        self.is_up, self.is_frozen = False, False
        self.epoch += 1
        self.tell()

    def restart(self) -> None:
        """It is there again, empty."""
        self.kill()
        self.is_up = True
        self.restarts += 1
        self.tell()

    def freeze(self) -> None:
        self.is_frozen = True
        self.tell()

    def thaw(self) -> None:
        self.is_frozen = False
        self.tell()

    def tell(self) -> None:
        """Wake the calls that wait for a change."""
        self.changed.set()
        self.changed = anyio.Event()


@dataclass(frozen=True, slots=True)
class NodeCall:
    """A call, in order of arrival."""

    kind: Kind
    names: tuple[str, ...]
    deadline: float


class _Lost(Exception):
    """The connection broke under a call."""


class FakeNode:
    """An `L2Node` on anyio alone, for asyncio and trio. All handles are for the loop's thread.

    A call takes ``latency_s`` (a number, or drawn evenly between two by ``seed``), and then its values one after another at
    ``bytes_per_s``. ``clock`` is that of the deadlines: in virtual time pass `anyio.current_time`.
    """

    def __init__(
        self,
        name: str = "fake",
        store: FakeStore | None = None,
        *,
        latency_s: float | tuple[float, float] = 0.0,
        bytes_per_s: float | None = None,
        settle_s: float | None = None,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self.store = FakeStore() if store is None else store
        self.latency_s = latency_s
        self.bytes_per_s = bytes_per_s
        self.settle_s = settle_s
        self._random = random.Random(seed)
        self._clock = clock
        self._next: dict[Kind, deque[NodeFault]] = {kind: deque() for kind in KINDS}
        self._always: dict[Kind, NodeFault] = dict.fromkeys(KINDS, NodeFault.NONE)
        self._of_name: dict[tuple[Kind, str], NodeFault] = {}
        self._held: set[Kind] = set()
        self._waiting: Counter[Kind] = Counter()
        self._unsettled: list[Item] = []
        self._is_closed = False
        self.calls: list[NodeCall] = []
        """All so far."""
        self.most_at_once: Counter[Kind] = Counter()
        """How many calls of a kind ran at the same time, at most."""
        self._running: Counter[Kind] = Counter()

    # ------------------------------------------------------------ handles

    def count(self, kind: Kind) -> int:
        """Calls of this kind so far."""
        return sum(call.kind == kind for call in self.calls)

    def hold(self, *kinds: Kind) -> None:
        """Calls of these kinds (of all, if none is named) wait from now on before they do anything, until `release`."""
        self._held.update(kinds or KINDS)

    def release(self) -> None:
        """Let everything held go on, and hold no more."""
        self._held.clear()
        self.store.tell()

    async def wait_held(self, kind: Kind, calls: int = 1) -> None:
        """Until so many calls of this kind are being held."""
        while self._waiting[kind] < calls:
            await self.store.changed.wait()

    def fail_next(self, kind: Kind, fault: NodeFault, calls: int = 1) -> None:
        """The next ``calls`` calls of this kind get this fault; NONE lets one pass."""
        self._next[kind].extend([fault] * calls)

    def fail_always(self, kind: Kind, fault: NodeFault) -> None:
        """Every call of this kind gets this fault, where nothing else was asked for; NONE ends it."""
        self._always[kind] = fault

    def fail_name(self, kind: Kind, name: str, fault: NodeFault) -> None:
        """This one of the items (or names) of any call gets this fault; NONE ends it. Not for REFUSE, NEVER and RAISE."""
        if fault in _OF_CALLS:
            raise MisuseError(f"{fault.value} befalls a whole call: use fail_next or fail_always")
        self._of_name[kind, name] = fault

    @property
    def unsettled(self) -> int:
        """Items called UNSETTLED that are not settled."""
        return len(self._unsettled)

    def scribble(self) -> None:
        """The late writer: every buffer that is not settled is written to."""
        for item in self._unsettled:
            if not item.buffer.readonly:
                item.buffer[:] = self._random.randbytes(item.buffer.nbytes)

    def settle_now(self) -> None:
        """`scribble` one last time, and touch those buffers no more."""
        self.scribble()
        self._unsettled.clear()
        self.store.tell()

    # ------------------------------------------------------------ L2Node

    @property
    def name(self) -> str:
        return self._name

    @property
    def renewals(self) -> int:
        return self.store.restarts

    async def find(self, names: Sequence[str], deadline: float) -> list[bool] | None:
        fault = self._enter("find", names, deadline)
        answer: list[bool] | None = None
        with anyio.move_on_after(deadline - self._clock()):
            try:
                await self._begin("find", fault)
            except _Lost:
                return None
            absent = NodeFault.ABSENT
            answer = [name in self.store.values and self._fault_of("find", name, fault) is not absent for name in names]
        return None if fault is NodeFault.ERROR else answer

    async def read(self, items: Sequence[Item], deadline: float) -> list[Outcome]:
        return await self._transfer("read", self._read_one, items, deadline)

    async def write(self, items: Sequence[Item], deadline: float) -> list[Outcome]:
        return await self._transfer("write", self._write_one, items, deadline)

    async def discard(self, names: Sequence[str], deadline: float) -> None:
        fault = self._enter("discard", names, deadline)
        with anyio.move_on_after(deadline - self._clock()), suppress(_Lost):
            await self._begin("discard", fault)
            for name in names if fault is NodeFault.NONE else ():
                self.store.values.pop(name, None)

    async def settle(self) -> None:
        mine = list(self._unsettled)
        with anyio.move_on_after(self.settle_s):
            while any(item is other for item in mine for other in self._unsettled):
                await self.store.changed.wait()
            return
        self.settle_now()

    async def ping(self, deadline: float) -> float:
        fault = self._enter("ping", (), deadline)
        started = self._clock()
        with anyio.move_on_after(deadline - started):
            try:
                await self._begin("ping", fault)
            except _Lost:
                raise NodeUnreachable(f"node {self._name}: nobody listens: was it killed by the test?") from None
            if fault is NodeFault.ERROR:
                raise NodeUnreachable(f"node {self._name}: it answered with an error, as the test asked for")
            return self._clock() - started
        raise NodeUnreachable(f"node {self._name}: no answer within {self._clock() - started:.3f} s: is it frozen, or held by the test?")

    async def close(self) -> None:
        self._is_closed = True
        self._unsettled.clear()
        self.store.tell()
        await checkpoint()

    # ------------------------------------------------------------ inside

    def _enter(self, kind: Kind, names: Iterable[str], deadline: float) -> NodeFault:
        self.calls.append(NodeCall(kind, tuple(names), deadline))
        return self._next[kind].popleft() if self._next[kind] else self._always[kind]

    def _fault_of(self, kind: Kind, name: str, fault: NodeFault) -> NodeFault:
        own = self._of_name.get((kind, name), NodeFault.NONE)
        return fault if own is NodeFault.NONE else own

    async def _begin(self, kind: Kind, fault: NodeFault) -> int:
        """All that comes before the first byte; returns the store's epoch. Raises _Lost, InjectedNodeCrash."""
        if fault is NodeFault.RAISE:
            raise InjectedNodeCrash(f"injected crash of a {kind}")
        epoch = self.store.epoch if fault is not NodeFault.REFUSE else -1
        await checkpoint()
        self._waiting[kind] += 1
        self.store.tell()
        try:
            while self._is_usable(epoch) and (kind in self._held or fault is NodeFault.NEVER):
                await self.store.changed.wait()
        finally:
            self._waiting[kind] -= 1
        low, high = self.latency_s if isinstance(self.latency_s, tuple) else (self.latency_s, self.latency_s)
        await self._pass(self._random.uniform(low, high), epoch)
        return epoch

    def _is_usable(self, epoch: int) -> bool:
        return self.store.is_up and not self._is_closed and epoch == self.store.epoch

    async def _pass(self, seconds: float, epoch: int) -> None:
        """Let so much time pass in which the store neither is frozen nor dies. Raises _Lost."""
        until = self._clock() + seconds
        while True:
            if not self._is_usable(epoch):
                raise _Lost
            if self.store.is_frozen:
                frozen_at = self._clock()
                await self.store.changed.wait()
                until += self._clock() - frozen_at
                continue
            left = until - self._clock()
            if left <= 0:
                return
            with anyio.move_on_after(left):
                await self.store.changed.wait()

    async def _transfer(
        self, kind: Kind, one: Callable[[Item, NodeFault], Outcome], items: Sequence[Item], deadline: float
    ) -> list[Outcome]:
        fault = self._enter(kind, (item.name for item in items), deadline)
        outcomes: list[Outcome] = []
        rest = Outcome.LATE
        self._running[kind] += 1
        self.most_at_once[kind] = max(self.most_at_once[kind], self._running[kind])
        try:
            with anyio.move_on_after(deadline - self._clock()):
                try:
                    epoch = await self._begin(kind, fault)
                    for item in items:
                        if self.bytes_per_s is not None:
                            await self._pass(item.buffer.nbytes / self.bytes_per_s, epoch)
                        outcomes.append(one(item, self._fault_of(kind, item.name, fault)))
                except _Lost:
                    rest = Outcome.FAILED
        finally:
            self._running[kind] -= 1
        if Outcome.UNSETTLED in outcomes:
            self._unsettled += [item for item, outcome in zip(items, outcomes, strict=False) if outcome is Outcome.UNSETTLED]
        return outcomes + [rest] * (len(items) - len(outcomes))

    def _read_one(self, item: Item, fault: NodeFault) -> Outcome:
        if fault in _PLAIN:
            return _PLAIN[fault]
        value = self.store.values.get(item.name)
        if fault is NodeFault.OTHER_KEY:
            others = [other for name, other in sorted(self.store.values.items()) if name != item.name]
            alike = [other for other in others if len(other) == item.buffer.nbytes]
            value = self._random.choice(alike or others) if others else None
        if value is None or fault is NodeFault.ABSENT:
            return Outcome.ABSENT
        if len(value) != item.buffer.nbytes:
            return Outcome.MALFORMED
        if fault is NodeFault.TRUNCATED:
            value = value[: len(value) // 2]
        if fault is NodeFault.FLIPPED and value:
            bit = self._random.randrange(8 * len(value))
            value = value[: bit // 8] + bytes([value[bit // 8] ^ 1 << bit % 8]) + value[bit // 8 + 1 :]
        item.buffer.cast("B")[: len(value)] = value
        return Outcome.DONE

    def _write_one(self, item: Item, fault: NodeFault) -> Outcome:
        if fault in _PLAIN:
            return _PLAIN[fault]
        if fault is NodeFault.LOST or item.name in self.store.values:
            return Outcome.DONE
        value = bytes(item.buffer)
        capacity_bytes = self.store.capacity_bytes
        if capacity_bytes is not None and self.store.used_bytes + len(value) > capacity_bytes:
            return Outcome.FULL
        if fault is NodeFault.HALF_WRITTEN:
            half = len(value) // 2
            self.store.values[item.name] = value[:half] + bytes(len(value) - half)
            return Outcome.FAILED
        self.store.values[item.name] = value
        return Outcome.DONE


_OF_CALLS = (NodeFault.REFUSE, NodeFault.NEVER, NodeFault.RAISE)
_PLAIN = {
    NodeFault.ERROR: Outcome.FAILED,
    NodeFault.FULL: Outcome.FULL,
    NodeFault.MALFORMED: Outcome.MALFORMED,
    NodeFault.UNSETTLED: Outcome.UNSETTLED,
}
