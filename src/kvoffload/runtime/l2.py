"""The second tier of one hub: the membership actor, and a writer and a prefetcher for each node that it names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from hashlib import blake2b

import anyio
import anyio.abc
import anyio.to_thread

from kvoffload.actors.l2_prefetcher import L2Prefetcher, PrefetcherConfig
from kvoffload.actors.l2_writer import L2Writer, WriterConfig
from kvoffload.actors.membership import Membership
from kvoffload.config import L2Settings
from kvoffload.envelope import Envelope
from kvoffload.errors import KVOffloadError
from kvoffload.l2.node import L2Node
from kvoffload.l2.nodes import make_node, prepare
from kvoffload.l2.remains import Remains, Reports
from kvoffload.l2.ring import NodeAddress
from kvoffload.l2.transfers import Turns
from kvoffload.l2.values import SlotBuffers
from kvoffload.layout import HEADER_BYTES
from kvoffload.mailbox import Receiver
from kvoffload.messages import AboutNodes, BlocksFound, FromL2, Node, NodeBack, NodesChanged, ToL2Prefetcher, ToL2Writer, TransfersSettled
from kvoffload.observe.logs import get_logger
from kvoffload.runtime.node_actors import RETRY_S, Life, NodeActors, NodeParts, NodeState, NodeStatistics
from kvoffload.runtime.nodes_health import NodesHealth, health_of
from kvoffload.runtime.shared import Shared
from kvoffload.supervisor import Child, RestartPolicy, Supervisor

log = get_logger("l2")

MakeNode = Callable[[NodeAddress, L2Settings, int], L2Node]


class L2Runtime:
    """Runs on the hub's loop; all calls are made there.

    Owns: Membership and the nodes' actors. Receives: `NodesChanged`; `to_prefetcher` and `to_writer` from L1Manager. Sends: what nodes
    answer, and the table, to ``deliver``. Ends: when cancelled.
    """

    def __init__(
        self, settings: L2Settings, shared: Shared, deliver: Callable[[FromL2 | AboutNodes], None], make: MakeNode | None = None
    ) -> None:
        """``make`` makes the clients of nodes, on the loop; None: `make_node`."""
        self._settings = settings
        self._deliver = deliver
        self._make = make or partial(make_node, segments=shared.segments)
        self._value_bytes = HEADER_BYTES + shared.payload_bytes
        digest = shared.digest()
        secret = settings.secret.get_secret_value().encode(errors="surrogateescape") if settings.secret is not None else None
        self._envelope = Envelope(digest, shared.payload_bytes, secret)
        # Engines with another layout have the same keys, and those with another secret too: a name is written once, so each kind has
        # names of its own, or what the one wrote would be a miss for the other for good.
        kind = blake2b(digest, digest_size=6, key=blake2b(secret or b"").digest(), person=b"kvoffload.names").hexdigest()
        self._names = f"{settings.namespace}.{kind}"
        self._slots = SlotBuffers(shared.segments, shared.payload_bytes)
        self._nodes: dict[Node, NodeActors] = {}
        self._wanted: dict[Node, NodeAddress] = {}
        self._unmade: dict[Node, str] = {}
        """Those of which no client could be made, and why."""
        self._tasks: anyio.abc.TaskGroup | None = None
        self.membership = Membership(settings.membership, settings.backend, settings.nodes, self._change)

    async def run(self) -> None:
        try:
            await anyio.to_thread.run_sync(prepare, self._settings, abandon_on_cancel=True)
            async with anyio.create_task_group() as self._tasks:
                self._tasks.start_soon(self._join_later)
                await Supervisor([Child("membership", self.membership.run, RestartPolicy(restarts=None))]).run()
        finally:
            self._tasks = None
            self._nodes.clear()

    def to_prefetcher(self, node: Node, message: ToL2Prefetcher) -> bool:
        """False: refused, there is no such node or it is behind."""
        actors = self._nodes.get(node)
        return actors is not None and actors.prefetcher.offer(message)

    def to_writer(self, node: Node, message: ToL2Writer) -> bool:
        """False: refused, there is no such node or it is behind."""
        actors = self._nodes.get(node)
        return actors is not None and actors.writer.offer(message)

    def statistics(self) -> dict[Node, NodeStatistics]:
        """Of the nodes of now. Live objects, to be read only; from any thread."""
        return {name: actors.state.statistics() for name, actors in list(self._nodes.items())}

    def health(self) -> NodesHealth:
        """As of now, from any thread."""
        return health_of(list(self._nodes.values()), len(self._unmade), self.membership.statistics())

    def _change(self, changed: NodesChanged) -> None:
        """Another table: nodes come and go, and L1 hears of it after that. A node at another address is another node."""
        wanted = {address.name: address for address in changed.ring.nodes}
        for name, actors in list(self._nodes.items()):
            if wanted.get(name) != actors.address:
                del self._nodes[name]
                actors.leave()
        self._unmade = {name: why for name, why in self._unmade.items() if name in wanted}
        for name, address in wanted.items():
            if name not in self._nodes:
                self._join(address)
        self._wanted = wanted
        self._deliver(changed)

    def _join(self, address: NodeAddress) -> bool:
        assert self._tasks is not None
        name = address.name
        try:
            node = self._make(address, self._settings, self._value_bytes)
        except Exception as error:  # one node's trouble must not keep the others from being told of
            why, is_ours = (str(error), None) if isinstance(error, KVOffloadError) else (repr(error), error)
            if self._unmade.get(name) != why:
                text = (
                    "node left out: its blocks are misses"
                    if is_ours is None
                    else "node left out, please report this: its blocks are misses"
                )
                log.error(text, node=name, reason=why, again_in_s=RETRY_S, exc_info=is_ours)
            self._unmade[name] = why
            return False
        self._unmade.pop(name, None)
        self._nodes[name] = actors = self._actors(address, node)
        self._tasks.start_soon(actors.run, name=f"kvoffload-node-{name}")
        return True

    async def _join_later(self) -> None:
        """Those whose clients could not be made."""
        while True:
            await anyio.sleep(RETRY_S)
            for name in list(self._unmade):
                if self._join(self._wanted[name]):
                    self._back(name)

    def _actors(self, address: NodeAddress, node: L2Node) -> NodeActors:
        settings, slots, envelope = self._settings, self._slots, self._envelope
        state, turns = NodeState(), Turns()
        reads = PrefetcherConfig(self._names, address.name, inflight_bytes=settings.inflight_bytes)
        writes = WriterConfig(
            self._names,
            address.name,
            inflight_bytes=settings.inflight_bytes,
            timeout_s=settings.write_timeout_ms / 1e3,
            queue_blocks=settings.write_queue_blocks,
        )

        def prefetcher(receiver: Receiver[ToL2Prefetcher], report: Reports) -> L2Prefetcher:
            return L2Prefetcher(node, state.reading, receiver, report, slots, envelope, reads, turns=turns, statistics=state.reads)

        def writer(receiver: Receiver[ToL2Writer], report: Reports) -> L2Writer:
            return L2Writer(node, state.writing, receiver, report, slots, envelope, writes, turns=turns, statistics=state.writes)

        parts = NodeParts(
            address,
            node,
            state,
            Life(f"l2_prefetcher.{address.name}", prefetcher, self._report),
            Life(f"l2_writer.{address.name}", writer, self._report),
            Remains(node, address.name, self._report, slots.clear),
        )
        return NodeActors(parts, partial(self._back, address.name))

    def _report(self, message: FromL2) -> None:
        if isinstance(message, TransfersSettled) or (message.found if isinstance(message, BlocksFound) else not message.failed):
            self._deliver(message)
            return
        self.membership.trouble()  # the table may know more
        self._deliver(message)

    def _back(self, node: Node) -> None:
        log.info("node back: what it lacks of L1 is looked for and offered again", node=node)
        self._deliver(NodeBack(node))
