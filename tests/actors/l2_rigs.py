"""What the tests of a node's actors share: slots, a node that is not there, and every answer, in order."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, Generic, TypeVar

import anyio
import numpy as np
from anyio.lowlevel import checkpoint
from numpy.typing import NDArray

from kvoffload.actors.l2_prefetcher import L2Prefetcher, PrefetcherConfig
from kvoffload.actors.l2_writer import L2Writer, WriterConfig
from kvoffload.envelope import Envelope
from kvoffload.l2.breaker import Breaker
from kvoffload.l2.node import value_name
from kvoffload.l2.transfers import Turns
from kvoffload.l2.values import SlotBuffers
from kvoffload.layout import HEADER_BYTES
from kvoffload.mailbox import OnFull, Receiver, Sender, open_mailbox
from kvoffload.messages import (
    BlockKey,
    BlocksFound,
    FetchFinished,
    FromL2,
    ToL2Prefetcher,
    ToL2Writer,
    TransfersSettled,
    WriteFinished,
)
from kvoffload.segment import Segment
from kvoffload.testing.fake_node import FakeNode

PAYLOAD = 3000
SLOT_BYTES = 4096
SLOTS = 32
NAMESPACE = bytes(range(24))
NAMES = "here"
NODE = "node-1"
FAR = 1e6
"""A deadline that no test reaches, in seconds from now."""

ToActor = TypeVar("ToActor")


def key(index: int) -> BlockKey:
    return hashlib.blake2b(index.to_bytes(4, "little"), digest_size=24).digest()


def keys(*indices: int) -> tuple[BlockKey, ...]:
    return tuple(map(key, indices))


def payload(index: int, rank: int = 0) -> NDArray[np.uint8]:
    """The KV of block ``index``, one rank's part."""
    return np.random.default_rng([index, rank]).integers(0, 256, PAYLOAD, dtype=np.uint8)


class Rig(Generic[ToActor]):
    """One node's slots, and what its actors said. Time is the loop's."""

    def __init__(self, ranks: int = 1, secret: bytes | None = None) -> None:
        self.ranks = ranks
        self.segments = [Segment.create(SLOTS * SLOT_BYTES, SLOT_BYTES) for _ in range(ranks)]
        for segment in self.segments:
            segment.populate_next()
        self.envelope = Envelope(NAMESPACE, PAYLOAD, secret)
        self.slots = SlotBuffers(self.segments, PAYLOAD)
        self.node = FakeNode(NODE, clock=anyio.current_time)
        self.breaker = Breaker(chance=lambda: 0.5)
        self.turns = Turns()
        self.out: list[FromL2] = []
        self.unclear: list[int] = []
        """Slots that still had a header when they were reported as of no use, or settled."""
        self._said = anyio.Event()
        self.sender: Sender[ToActor]
        self.receiver: Receiver[ToActor]
        self.sender, self.receiver = open_mailbox("l2", 100, OnFull.REFUSE, clock=anyio.current_time)

    def report(self, message: FromL2) -> None:
        if isinstance(message, FetchFinished):
            self.unclear += [slot for slot in (*message.failed, *message.absent) if not (self.is_clear(slot) or self.is_untouched(slot))]
        elif isinstance(message, TransfersSettled):
            self.unclear += [slot for slot in message.slots if not self.is_clear(slot)]
        self.out.append(message)
        self._said.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what the actors say, in virtual time."""
        while not condition():
            self._said = anyio.Event()
            await self._said.wait()

    def close(self) -> None:
        for segment in self.segments:
            segment.close()

    def post(self, *messages: ToActor) -> None:
        for message in messages:
            assert self.sender.offer(message)

    def fill(self, slot: int, index: int) -> None:
        """Block ``index`` as GpuCopy leaves it in a slot: not sealed."""
        for rank, segment in enumerate(self.segments):
            segment.slot(slot)[:HEADER_BYTES] = 0
            segment.slot(slot)[HEADER_BYTES : HEADER_BYTES + PAYLOAD] = payload(index, rank)

    def holds(self, slot: int, index: int) -> bool:
        """Whether the slot has that block, of all ranks."""
        return all(
            np.array_equal(segment.slot(slot)[HEADER_BYTES : HEADER_BYTES + PAYLOAD], payload(index, rank))
            for rank, segment in enumerate(self.segments)
        )

    def is_clear(self, slot: int) -> bool:
        """Whether it passes for no block: the header is empty, of all ranks."""
        return not any(segment.slot(slot)[:HEADER_BYTES].any() for segment in self.segments)

    def mark(self, *slots: int) -> None:
        """As bytes that a test looks for later on."""
        for segment in self.segments:
            for slot in slots:
                segment.slot(slot)[:] = 0xAB

    def is_untouched(self, slot: int) -> bool:
        return all((segment.slot(slot) == 0xAB).all() for segment in self.segments)

    def value(self, index: int, rank: int = 0, secret: bytes | None = None) -> bytes:
        """What a node has of a block that was written."""
        slot = np.zeros(SLOT_BYTES, np.uint8)
        slot[HEADER_BYTES : HEADER_BYTES + PAYLOAD] = payload(index, rank)
        Envelope(NAMESPACE, PAYLOAD, secret).seal(slot, key(index), rank)
        return slot[: HEADER_BYTES + PAYLOAD].tobytes()

    def store(self, *indices: int) -> None:
        """Put blocks on the node, whole."""
        for index in indices:
            for rank in range(self.ranks):
                self.node.store.values[self.name(index, rank)] = self.value(index, rank)

    def name(self, index: int, rank: int = 0) -> str:
        return value_name(NAMES, key(index), rank)

    def answers(self) -> list[BlocksFound | FetchFinished | WriteFinished]:
        return [message for message in self.out if not isinstance(message, TransfersSettled)]

    def answer(self) -> Any:
        """The only one."""
        (message,) = self.answers()
        return message

    def settled(self) -> list[tuple[int, tuple[int, ...]]]:
        return [(message.batch, message.slots) for message in self.out if isinstance(message, TransfersSettled)]

    def check_answered_once(self, slots_by_batch: dict[int, tuple[int, ...]]) -> None:
        """Each batch has one answer, whose sets are its slots; what was unsettled was settled, after it, and once."""
        given = [message for message in self.answers() if not isinstance(message, BlocksFound)]
        answers = {message.batch: message for message in given}
        assert sorted(message.batch for message in given) == sorted(slots_by_batch), "one answer each"
        finds = [message.batch for message in self.answers() if isinstance(message, BlocksFound)]
        assert len(finds) == len(set(finds))
        for batch, slots in slots_by_batch.items():
            answer = answers[batch]
            sets = [*answer.failed, *answer.unsettled]
            sets += [*answer.fetched, *answer.absent] if isinstance(answer, FetchFinished) else answer.stored
            assert sorted(sets) == sorted(slots)
            settled = [slot for of_batch, some in self.settled() if of_batch == batch for slot in some]
            assert sorted(settled) == sorted(answer.unsettled)
        assert not self.node.unsettled


class PrefetcherRig(Rig[ToL2Prefetcher]):
    def actor(self, **settings: Any) -> L2Prefetcher:
        config = PrefetcherConfig(NAMES, NODE, **settings)
        return L2Prefetcher(
            self.node, self.breaker, self.receiver, self.report, self.slots, self.envelope, config, self.turns, anyio.current_time
        )


class WriterRig(Rig[ToL2Writer]):
    def actor(self, **settings: Any) -> L2Writer:
        config = WriterConfig(NAMES, NODE, **settings)
        return L2Writer(
            self.node, self.breaker, self.receiver, self.report, self.slots, self.envelope, config, self.turns, anyio.current_time
        )


def turns_of_the_loop() -> Iterator[int]:
    """After how many turns to cancel: each of the first, then sparser, as threads let the loop turn many times."""
    turns = 0
    while True:
        yield turns
        turns = max(turns + 1, turns * 5 // 4 if turns > 60 else 0)


async def cancel_everywhere(
    make: Callable[[], Callable[[], Coroutine[Any, Any, None]]], check: Callable[[], Awaitable[None] | None]
) -> int:
    """Cancel an actor with all its tasks after 0, 1, 2, ... turns of the loop, until it ends before that; how often that was.

    ``make`` gives the ``run`` of a fresh one; ``check`` is called after each.
    """
    for cancelled, turns in enumerate(turns_of_the_loop()):
        run = make()
        has_ended = False

        async def watch(run: Callable[[], Coroutine[Any, Any, None]] = run) -> None:
            nonlocal has_ended
            await run()
            has_ended = True

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            for _ in range(turns):
                await checkpoint()
                if has_ended:
                    break
            tasks.cancel_scope.cancel()
        checked = check()
        if checked is not None:
            await checked
        if has_ended:
            return cancelled
    raise AssertionError
