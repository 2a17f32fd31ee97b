"""What a node of the second tier can do, whoever serves it: every call is a batch, has a deadline, and is told in outcomes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol

from kvoffload.messages import BlockKey


class Outcome(IntEnum):
    """How the transfer of one value ended."""

    DONE = 0
    """Read: the buffer holds what the node sent, of the right length (nothing else is known of it). Written: the node said it has it."""
    ABSENT = 1
    """The node does not have it."""
    FULL = 2
    """The node has no room for it. It still serves reads."""
    MALFORMED = 3
    """What the node has under this name is of another length, or no value at all."""
    FAILED = 4
    """The connection broke, the node refused, or it made no sense."""
    LATE = 5
    """The deadline came first."""
    UNSETTLED = 6
    """As FAILED or LATE, and something may still read or write the buffer, until `L2Node.settle` returns."""


class Item(NamedTuple):
    """A value's name on the node, and its bytes: header and payload, one run. Written to when it is read, so it must be writable then."""

    name: str
    buffer: memoryview


class NodeUnreachable(Exception):
    """`L2Node.ping` failed; the text says what was tried, and what to look at."""


class L2Node(Protocol):
    """One node. Deadlines are on the clock of `time.monotonic`, in seconds; a call returns at the latest a few ms after its own.

    Trouble of the node is an outcome and never an exception, and never reaches another node. A call that returned, or was cancelled,
    leaves nothing behind that reads or writes a buffer, save for those it called UNSETTLED. It connects by itself when it must, and
    again after trouble. A value is stored whole or not at all: `read` never gives a part of one that is being written.
    All calls are on one event loop; several may run at once.
    """

    @property
    def name(self) -> str:
        """As in the ring."""

    @property
    def renewals(self) -> int:
        """How often a connection took the place of one that was lost: each time the node may have been restarted, and be empty."""

    async def find(self, names: Sequence[str], deadline: float) -> list[bool] | None:
        """Which of these the node has; None when it could not be asked in time. At most a few round trips, however many names."""

    async def read(self, items: Sequence[Item], deadline: float) -> list[Outcome]:
        """Fill each item's buffer with the value of its name. A buffer's bytes mean nothing unless its outcome is DONE."""

    async def write(self, items: Sequence[Item], deadline: float) -> list[Outcome]:
        """Store each item's buffer under its name. One that is there already is left as it is, and DONE."""

    async def discard(self, names: Sequence[str], deadline: float) -> None:
        """Drop what the node has under these names: it was read whole, and is not what was written. Else it would stay, as nothing is
        ever overwritten. Best effort: where that is not safe, or takes longer than the deadline, it is not done."""

    async def settle(self) -> None:
        """Wait until nothing reads or writes any buffer that was called UNSETTLED so far."""

    async def ping(self, deadline: float) -> float:
        """Seconds of one round trip over a working connection. Raises NodeUnreachable."""

    async def close(self) -> None:
        """Drop all connections; calls that run end FAILED. May be called twice. Leaves nothing that touches a buffer."""


def value_name(namespace: str, key: BlockKey, rank: int) -> str:
    """The name under which a node keeps one rank's part of a block. ``namespace`` is ``l2.namespace``."""
    return value_names(namespace, (key,), (rank,))[0]


def value_names(namespace: str, keys: Iterable[BlockKey], ranks: Iterable[int]) -> list[str]:
    """`value_name` of each key and its rank, up to the end of the shorter one."""
    head = f"kvo1:{namespace}:"
    return [f"{head}{key.hex()}:r{rank}" for key, rank in zip(keys, ranks, strict=False)]
