"""A hub as it runs inside an engine, on a loop whose every slice is timed: what ``kvoffload bench l2`` measures the loop with."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from kvoffload.config import Config
from kvoffload.errors import PeerError
from kvoffload.layout import HEADER_BYTES
from kvoffload.messages import (
    ROOT,
    BlockKey,
    BlocksFilled,
    MatchPrefix,
    PrefixHit,
    ReleaseHit,
    ReserveSlots,
    SaveRun,
    SegmentGrown,
    SlotGrant,
    ToScheduler,
)
from kvoffload.runtime.hub import HubRuntime, RankPort
from kvoffload.runtime.l2 import MakeNode
from kvoffload.runtime.shared import SegmentView, Shared
from kvoffload.segment import Segment

SLOT_BYTES = 4096
DEADLINE_S = 20.0


class TimedLoop(asyncio.SelectorEventLoop):
    """Takes the processor time of every callback: on a busy machine that has no waiting in it."""

    def __init__(self) -> None:
        super().__init__()
        self.slices: list[float] | None = None

    def _timed(self, callback: Callable[..., object], *arguments: Any) -> None:
        slices = self.slices
        if slices is None:
            callback(*arguments)
            return
        begun = time.thread_time()
        callback(*arguments)
        slices.append(time.thread_time() - begun)

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:  # type: ignore[override]
        return super().call_soon(self._timed, callback, *args, context=context)

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:  # type: ignore[override]
        return super().call_soon_threadsafe(self._timed, callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:  # type: ignore[override]
        return super().call_at(when, self._timed, callback, *args, context=context)


@dataclass(slots=True)
class Engine:
    """A hub and its slots, and what its scheduler would hear."""

    config: Config
    slots: int
    make: MakeNode
    hub: HubRuntime = field(init=False)
    segment: Segment = field(init=False)
    answers: asyncio.Queue[ToScheduler] = field(default_factory=asyncio.Queue)
    grants: asyncio.Queue[SlotGrant] = field(default_factory=asyncio.Queue)
    sequence: int = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Engine]:
        loop = asyncio.get_running_loop()
        self.segment = Segment.create(self.slots * SLOT_BYTES, SLOT_BYTES)
        while self.segment.populated_slots < self.slots:
            self.segment.populate_next()
        shared = Shared(bytes(24), bytes(24), SLOT_BYTES - HEADER_BYTES, (SegmentView(self.segment),))
        self.hub = HubRuntime(self.config, self.answers.put_nowait, self.make)
        self.hub.open(self.slots, [RankPort(self.grants.put_nowait)], loop.call_soon_threadsafe, None, shared)  # type: ignore[arg-type]
        running = loop.create_task(self.hub.run())
        self.hub.deliver(0, SegmentGrown(0, self.slots))
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not self.hub.node_statistics():  # noqa: ASYNC110 - once, at the start
                    await asyncio.sleep(0.001)
            yield self
        finally:
            running.cancel()
            await asyncio.wait([running])
            self.segment.close()

    async def save(self, keys: tuple[BlockKey, ...]) -> None:
        """What GpuCopy would have filled is whatever the slots hold."""
        self.sequence += 1
        places = tuple(range(len(keys)))
        self.hub.offer(ReserveSlots(self.sequence, (SaveRun("save", ROOT, keys, places, places),)))
        async with asyncio.timeout(DEADLINE_S):
            grant = await self.grants.get()
        if len(grant.slots) != len(keys):
            raise PeerError(f"{len(grant.slots)} of {len(keys)} blocks found a slot")
        self.hub.deliver(0, BlocksFilled(grant.job, 0, grant.slots, ()))

    async def written(self) -> None:
        """Until nodes have all that was saved."""
        if not await self.hub.flush().wait():
            raise PeerError("not all was written")

    async def match(self, keys: tuple[BlockKey, ...]) -> tuple[float, float]:
        """Seconds, and seconds of this thread's processor, from the question to an answer that has all blocks."""
        self.sequence += 1
        request = f"match-{self.sequence}"
        cpu, begun = time.thread_time(), time.perf_counter()
        self.hub.offer(MatchPrefix(request, self.sequence, keys, time.monotonic() + DEADLINE_S, block_tokens=16))
        async with asyncio.timeout(2 * DEADLINE_S):
            hit = await self.answers.get()
        took, spent = time.perf_counter() - begun, time.thread_time() - cpu
        if not isinstance(hit, PrefixHit) or len(hit.slots) != len(keys):
            raise PeerError(f"of {len(keys)} blocks {hit} came back")
        self.hub.owe(ReleaseHit(request, hit.sequence))
        return took, spent
