"""The loop threads under the runtimes inside vLLM, and how a worker half and the hub meet: in one process, or over the link."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from functools import partial

import anyio

from kvoffload import link
from kvoffload.bridge import LoopThread
from kvoffload.config import Config
from kvoffload.errors import CapacityError, PeerError
from kvoffload.layout import Tensor
from kvoffload.ledger import Ledger
from kvoffload.observe.logs import get_logger
from kvoffload.runtime.hub import HubRuntime, RankPort
from kvoffload.runtime.shared import SegmentView, Shared
from kvoffload.runtime.worker import FromRank, Rank, WorkerRuntime, WrapEngine
from kvoffload.segment import Segment

log = get_logger("hosts")

JOIN_TIMEOUT_S = 30.0
"""For a hub to reach a worker half that announced itself."""

DRAIN_SHARE = 0.6
"""Of the time to close in, for blocks on their way to the second tier."""

ACCEPT_TIMEOUT_S = 1800.0
"""For the hub to come to a worker half: the warm-up of a large model may lie in between."""
PEER_LIMIT_S = 1.0
"""A peer that was silent for longer gets no new promises."""


class WorkerHost:
    """A worker half's loop thread, with its runtime, and its end of the link."""

    def __init__(self, config: Config, rank: Rank, listener: link.Listener) -> None:
        self.loop = LoopThread("worker", lambda error: self.runtime.turn_off(f"the worker's loop failed: {error!r}"))
        self.loop.start()
        try:
            self.runtime = WorkerRuntime(config, rank, self.loop.call_soon)
        except BaseException:
            self.loop.stop(1.0)
            raise
        self._listener = listener
        self._serving: anyio.CancelScope | None = None
        self._link: link.Link | None = None
        self._is_joined_here = False
        self._drain: Callable[[float], object] | None = None

    @classmethod
    def start(cls, config: Config, number: int, kv_caches: Mapping[str, Tensor], num_blocks: int, wrap: WrapEngine) -> WorkerHost:
        """Prove, start, and wait for the hub in the background. Raises what `Rank.prepare` and `link.listen` raise."""
        listener = link.listen()
        try:
            rank = Rank.prepare(config, number, kv_caches, num_blocks, wrap)
        except BaseException:
            listener.close()
            raise
        try:
            host = cls(config, rank, listener)
        except BaseException:
            rank.close()
            listener.close()
            raise
        link.register_half(host.address.token, host)
        try:
            host.runtime.start()
        except BaseException:
            host.close(1.0)
            listener.close()
            raise
        host.loop.submit(host.runtime.run)
        host.loop.submit(host._serve)
        return host

    @property
    def address(self) -> link.LinkAddress:
        return self._listener.address

    @property
    def block_bytes(self) -> int:
        return self.runtime.rank.layout.payload_bytes

    def join_here(self, drain: Callable[[float], object]) -> None:
        """The hub is in this process: no link is needed. On vLLM's thread. vLLM ends this half first, and with it the hub's loop:
        so ``drain(timeout_s)`` is called before.
        """
        self._is_joined_here = True
        self._drain = drain
        self.loop.call_soon(self._stop_serving)

    def turn_off(self, reason: str) -> None:
        """Off, and nobody needs to find this half any more. From any thread."""
        self.runtime.turn_off(reason)
        if self._link is None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self.loop.call_soon(self._stop_serving)

    def _stop_serving(self) -> None:
        """On the loop, where the listener's socket is waited for; that wait closes it."""
        if self._serving is not None:
            self._serving.cancel()

    async def _serve(self) -> None:
        with anyio.CancelScope() as self._serving:
            if self._is_joined_here:
                self._listener.close()
            else:
                await self._serve_hub()

    async def _serve_hub(self) -> None:
        rank = self.runtime.rank
        try:
            connection = await self._listener.accept(ACCEPT_TIMEOUT_S)
            joined, ledger_fd = await link.serve_worker(connection, self._hello(), rank.segment.fd)
            ledger = Ledger.attach(ledger_fd, rank.layout.num_blocks)
        except PeerError as error:
            self.runtime.turn_off(f"the hub did not join: {error}")
            return
        self._link = joined
        self.runtime.attach(ledger, joined.send)
        await joined.run(self.runtime.deliver, self._lose_hub)

    def _lose_hub(self, reason: str) -> None:
        assert self._link is not None
        self.runtime.turn_off(f"the link to the hub is lost: {reason}", quiet=self._link.peer_left)

    def _hello(self) -> link.Hello:
        rank = self.runtime.rank
        return link.Hello(
            version=link.LINK_VERSION,
            rank=rank.number,
            pid=os.getpid(),
            layout_digest=rank.layout.digest(),
            payload_bytes=rank.layout.payload_bytes,
            slot_bytes=rank.layout.slot_bytes,
            capacity_slots=rank.segment.slots,
            num_blocks=rank.layout.num_blocks,
            namespace=b"",
        )

    def close(self, timeout_s: float) -> None:
        """Bounded; whatever does not end is left to the end of the process."""
        link.unregister_half(self.address.token)
        if self._drain is not None:
            self._drain(timeout_s * DRAIN_SHARE)
            timeout_s *= 1 - DRAIN_SHARE
        with contextlib.suppress(RuntimeError):  # the loop has ended, and the listener with it
            self.loop.call_soon(self._stop_serving)
        self.runtime.close(timeout_s * 0.7)
        self.loop.stop(timeout_s * 0.3)


class HubHost:
    """The hub, with a loop thread of its own, or on the one of the worker half where that is in this process."""

    def __init__(self, config: Config, ledger: Ledger, shared_as: bytes | None = None) -> None:
        """``shared_as``: the namespace under which blocks may be shared with other engines; None: they must stay in this one."""
        self.hub = HubRuntime(config)
        self._shared_as = shared_as
        self._mapped: Segment | None = None
        self._ledger = ledger
        self._loop: LoopThread | None = None
        self._link: link.Link | None = None

    def join(self, address: link.LinkAddress) -> None:
        """Meet the worker half at ``address``; does not wait for it."""
        worker = link.find_half(address.token)
        if isinstance(worker, WorkerHost):
            self._join_here(worker)
        else:
            self._loop = LoopThread("hub", lambda error: self.hub.turn_off(f"the hub's loop failed: {error!r}"))
            self._loop.start()
            self._loop.submit(lambda: self._join_over_link(address))

    def _join_here(self, worker: WorkerHost) -> None:
        worker.join_here(self.hub.drain)
        rank = worker.runtime.rank
        shared = self._shared(rank.layout.digest(), rank.layout.payload_bytes, rank.segment)
        self.hub.open(rank.segment.slots, [RankPort(worker.runtime.deliver)], worker.loop.call_soon, worker.loop.heartbeat, shared)
        worker.loop.submit(self.hub.run)
        worker.runtime.attach(self._ledger, partial(self.hub.deliver, worker.runtime.rank.number))

    async def _join_over_link(self, address: link.LinkAddress) -> None:
        assert self._loop is not None
        try:
            joined, worker = await link.join_hub(await link.connect(address, JOIN_TIMEOUT_S), self._ledger)
        except PeerError as error:
            self.hub.turn_off(f"the worker half cannot be reached: {error}")
            return
        self._link = joined
        hello = worker.hello
        port = RankPort(joined.send, lambda: joined.peer_age_s() < PEER_LIMIT_S)
        shared = self._map(worker)
        self.hub.open(hello.capacity_slots, [port], self._loop.call_soon, self._loop.heartbeat, shared)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.hub.run)
            deliver: Callable[[FromRank], None] = partial(self.hub.deliver, hello.rank)
            await joined.run(deliver, lambda reason: self.hub.lose_rank(hello.rank, reason, quiet=joined.peer_left))

    def _map(self, worker: link.JoinedWorker) -> Shared | None:
        """Map the worker's segment, where there is a second tier to read it; the worker's exit ends the engine, and needs no watching."""
        hello = worker.hello
        if self._shared_as is None:
            worker.close()
            return None
        os.close(worker.process_fd)
        try:
            self._mapped = Segment.attach(worker.segment_fd, hello.capacity_slots, hello.slot_bytes)
        except (PeerError, CapacityError) as error:
            os.close(worker.segment_fd)
            log.error("L2 off: the worker's slots cannot be mapped", reason=str(error))
            return None
        return self._shared(hello.layout_digest, hello.payload_bytes, self._mapped)

    def _shared(self, layout_digest: bytes, payload_bytes: int, segment: Segment) -> Shared | None:
        if self._shared_as is None:
            return None
        return Shared(self._shared_as, layout_digest, payload_bytes, (SegmentView(segment),))

    def close(self, timeout_s: float) -> None:
        if self._loop is not None:
            self.hub.drain(timeout_s * DRAIN_SHARE)
        self.hub.close()
        if self._loop is not None:
            self._loop.stop(timeout_s * (1 - DRAIN_SHARE))
        if self._mapped is not None:
            self._mapped.close()
