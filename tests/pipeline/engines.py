"""Engines for tests of the second tier: standalone runtimes whose blocks hold what their prompt and place say, so that any load can
be judged."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import lru_cache
from typing import Any

import anyio
import numpy as np
from numpy.typing import NDArray
from tests.pipeline.sites import WAIT_S, Place

from kvoffload.actors.membership import MembershipStatistics
from kvoffload.config import Config, L2Settings
from kvoffload.keys import KeyChain
from kvoffload.l1.states import State
from kvoffload.l1.statistics import L1Statistics, RemoteStatistics
from kvoffload.l2.breaker import BreakerState
from kvoffload.l2.node import L2Node, value_name
from kvoffload.l2.nodes import make_node
from kvoffload.l2.ring import NodeAddress
from kvoffload.runtime.l2 import L2Runtime
from kvoffload.runtime.node_actors import NodeStatistics
from kvoffload.standalone import Runtime, Saved

BLOCK_SIZE, LAYERS, PAGE = 4, 4, 16 << 10
BLOCK_BYTES = LAYERS * PAGE
SLOT_BYTES = BLOCK_BYTES + 4096
COUNT = 16
"""Blocks of a prompt: a MiB."""
ENGINE_BLOCKS = 128
DEADLINE_S = 0.5
SLACK_S = 2.0
"""How much later than its deadline a match may be answered here: the machine may be busy with anything."""

AT_REST = frozenset({State.FREE, State.READY})


@lru_cache(1024)
def content(prompt: int, place: int) -> NDArray[np.uint8]:
    """The only right bytes of this block: layers, page."""
    return np.random.default_rng([prompt, place]).integers(0, 256, (LAYERS, PAGE), dtype=np.uint8)


def tokens_of(prompt: int, count: int = COUNT) -> list[int]:
    """Of ``count`` blocks."""
    return list(range(prompt * 10_000, prompt * 10_000 + count * BLOCK_SIZE))


class Engine:
    """Saves and loads prompts by number. Many of its calls may run at once, while there are engine blocks."""

    def __init__(self, runtime: Runtime, config: Config) -> None:
        self.runtime = runtime
        self.config = config
        self.tensors = {f"layer{layer}": np.zeros((ENGINE_BLOCKS, PAGE), dtype=np.uint8) for layer in range(LAYERS)}
        self.lie = 0
        """Not 0: what it saves is not what the prompt and the place say."""
        self._free = list(range(ENGINE_BLOCKS))
        self.longest_s = 0.0
        """Of matches."""
        self.loaded = 0
        """Blocks, compared."""

    @property
    def deadline_s(self) -> float:
        return self.config.l2.deadline_most_ms / 1e3

    async def save(self, prompt: int, count: int = COUNT) -> Saved:
        with self._blocks(count) as blocks:
            self._fill(blocks, lambda place: content(prompt + self.lie, place))
            return await self.runtime.save(tokens_of(prompt, count), blocks)

    async def write(self, prompt: int, count: int = COUNT) -> int:
        """Save, and wait until nodes have it or will not have it; how many more blocks they have then."""
        before = self.remote.totals.written
        await self.save(prompt, count)
        await self.flush()
        return self.remote.totals.written - before

    async def load(self, prompt: int, count: int = COUNT) -> int:
        """How many blocks of this prompt there are. Loads them, and none may hold anything but its own bytes."""
        begun = time.monotonic()
        async with self.runtime.match(tokens_of(prompt, count)) as hit:
            seconds = time.monotonic() - begun
            self.longest_s = max(self.longest_s, seconds)
            assert seconds <= self.deadline_s + SLACK_S, f"a match of {count} blocks took {seconds:.3f} s"
            if not hit.blocks:
                return 0
            with self._blocks(hit.blocks) as blocks:
                self._fill(blocks, lambda place: np.uint8(0xA5))
                await self.runtime.load(hit, blocks)
                for place, block in enumerate(blocks):
                    assert np.array_equal(self._page(block), content(prompt, place)), f"block {place} of prompt {prompt} is wrong"
            self.loaded += hit.blocks
            return hit.blocks

    async def load_all(self, prompt: int, count: int = COUNT) -> None:
        """Until all of it is there."""
        with anyio.fail_after(WAIT_S):
            while await self.load(prompt, count) < count:  # noqa: ASYNC110
                await anyio.sleep(0.05)

    async def flush(self) -> None:
        with anyio.fail_after(WAIT_S):
            await self.runtime.flush()

    @property
    def statistics(self) -> L1Statistics:
        return self.runtime.statistics()

    @property
    def remote(self) -> RemoteStatistics:
        remote = self.statistics.remote
        assert remote is not None
        return remote

    @property
    def nodes(self) -> dict[str, NodeStatistics]:
        assert self.runtime._parts is not None
        return self.runtime._parts.hub.node_statistics()

    @property
    def node(self) -> NodeStatistics:
        """The only one."""
        [statistics] = self.nodes.values()
        return statistics

    @property
    def is_left_alone(self) -> bool:
        """Whether reads of the only node are not tried."""
        return self.node.reading.state is not BreakerState.CLOSED

    @property
    def l2(self) -> L2Runtime:
        assert self.runtime._parts is not None
        opened = self.runtime._parts.hub._opened
        assert opened is not None
        assert opened.l2 is not None
        return opened.l2

    @property
    def membership(self) -> MembershipStatistics:
        return self.l2.membership.statistics()

    def probe_now(self) -> None:
        """What is left alone is tried again at its next use, and not after its pause, which may be half a minute."""
        for actors in list(self.l2._nodes.values()):
            for breaker in (actors.state.reading, actors.state.writing):
                breaker._probe_at = min(breaker._probe_at, 0.0)

    async def until_left_alone(self, prompt: int) -> None:
        """Ask for what nobody has, until that is not tried any more: the node is dead."""
        with anyio.fail_after(WAIT_S):
            while not self.is_left_alone:
                assert await self.load(prompt) == 0

    def names(self, prompt: int, count: int = COUNT) -> list[str]:
        """Of the values on the node."""
        assert self.runtime._parts is not None
        chain = KeyChain(self.runtime._parts.namespace, BLOCK_SIZE)
        chain.extend(tokens_of(prompt, count), b"")
        return [value_name(self.l2._names, key, 0) for key in chain.keys]

    async def until(self, is_so: Callable[[], bool], what: str) -> None:
        with anyio.move_on_after(WAIT_S):
            while not is_so():  # noqa: ASYNC110  (what happens on the runtime's loop sets no event here)
                await anyio.sleep(0.005)
        assert is_so(), f"not within {WAIT_S} s: {what}"

    async def check(self) -> None:
        """Nothing is under way, held, waited for or lost, and every invariant holds."""
        await self.flush()
        await self.until(self._is_at_rest, "at rest")
        assert self.runtime._parts is not None
        opened = self.runtime._parts.hub._opened
        assert opened is not None
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()

        def verify() -> None:
            try:
                opened.core.check()
            except BaseException as error:
                loop.call_soon_threadsafe(done.set_exception, error)
            else:
                loop.call_soon_threadsafe(done.set_result, None)

        self.runtime._loop.call_soon(verify)
        await done
        assert self.runtime._parts.hub.off_reason is None

    def _is_at_rest(self) -> bool:
        statistics, remote = self.statistics, self.remote
        busy = (statistics.protected, statistics.leases, statistics.saves, statistics.loads)
        away = (remote.waiting, remote.fetching, remote.writing, remote.unsettled)
        others = [count for state, count in statistics.slots.items() if state not in AT_REST]
        return not any((*busy, *away, *others))

    @contextmanager
    def _blocks(self, count: int) -> Iterator[list[int]]:
        taken, self._free[:] = self._free[:count], self._free[count:]
        assert len(taken) == count, "the test uses more engine blocks at once than there are"
        try:
            yield taken
        finally:
            self._free += taken

    def _fill(self, blocks: list[int], what: Callable[[int], NDArray[np.uint8] | np.uint8]) -> None:
        for place, block in enumerate(blocks):
            pages = np.broadcast_to(what(place), (LAYERS, PAGE))
            for tensor, page in zip(self.tensors.values(), pages, strict=True):
                tensor[block] = page

    def _page(self, block: int) -> NDArray[np.uint8]:
        return np.stack([tensor[block] for tensor in self.tensors.values()])


def settings(site: Place, *, slots: int = 256, deadline_s: float = DEADLINE_S, **l2: object) -> dict[str, object]:
    """Of an engine that knows this node, unless ``membership`` says otherwise; quick to try again."""
    return {
        "l1": {"capacity_bytes": slots * SLOT_BYTES, "reserve_bytes": 0},
        "l2": {
            "backend": site.backend,
            **({} if "membership" in l2 else {"nodes": [f"127.0.0.1:{site.port}"]}),
            "min_tokens": 1,
            "load_or_compute": False,
            "deadline_base_ms": deadline_s * 1e3,
            "deadline_most_ms": deadline_s * 1e3,
            "deadline_per_1000_tokens_ms": 0,
            "retry_after_s": 0.1,
            "connect_timeout_ms": 300,
            "write_timeout_ms": 700,
            **l2,
        },
    }


@asynccontextmanager
async def engine(site: Place, *, slots: int = 256, deadline_s: float = DEADLINE_S, **l2: Any) -> AsyncIterator[Engine]:
    """One that knows ``site``, with ``l2`` settings of its own. Ends in bounded time, whatever became of the node."""

    def make(address: NodeAddress, settings: L2Settings, value_bytes: int) -> L2Node:
        return site.make(address, settings, value_bytes) or make_node(address, settings, value_bytes)

    config = Config.load(settings(site, slots=slots, deadline_s=deadline_s, **l2), {})
    runtime = Runtime(config, make)
    made = Engine(runtime, config)
    try:
        await runtime.register(made.tensors, block_size=BLOCK_SIZE)
        if "membership" not in l2:
            await made.until(lambda: made.membership.nodes > 0, "L1 has been told of its nodes")
        yield made
    finally:
        begun = time.monotonic()
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(runtime._close)
        assert time.monotonic() - begun < 3 + SLACK_S, "closing took too long"
        await made.until(lambda: not runtime._loop.is_alive, "its loop has ended")  # what is not settled may hold it up
