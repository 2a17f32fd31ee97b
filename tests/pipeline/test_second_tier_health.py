"""What an operator sees of nodes in trouble: numbers in vLLM's line, and a line in the log; and a node whose client could not be made."""

from __future__ import annotations

import anyio
import pytest
from tests.pipeline.engines import COUNT, engine
from tests.pipeline.sites import Site

from kvoffload.config import Config, L2Settings
from kvoffload.envelope import Fault
from kvoffload.errors import UnsupportedError
from kvoffload.l2.node import L2Node
from kvoffload.l2.ring import NodeAddress
from kvoffload.messages import AboutNodes, FindBlocks, FromL2, NodeBack, NodesChanged
from kvoffload.runtime.l2 import L2Runtime
from kvoffload.runtime.node_actors import RETRY_S
from kvoffload.runtime.shared import SegmentView, Shared
from kvoffload.segment import Segment
from kvoffload.testing.fake_node import FakeNode


class Making:
    """Makes clients, once it can."""

    def __init__(self, error: Exception) -> None:
        self.error: Exception | None = error
        self.tries = 0

    def __call__(self, address: NodeAddress, settings: L2Settings, value_bytes: int) -> L2Node:
        self.tries += 1
        if self.error is not None:
            raise self.error
        return FakeNode(address.name)


@pytest.mark.anyio
@pytest.mark.parametrize("error", [UnsupportedError("node n0 needs luck"), ZeroDivisionError("a bug")])
async def test_a_client_that_could_not_be_made_is_tried_again(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    making, told = Making(error), list[FromL2 | AboutNodes]()
    config = Config.load({"l2.backend": "infinistore", "l2.nodes": ["10.0.0.1:1"], "model.version": "x"}, {})
    segment = Segment.create(2 * 8192, 8192)
    try:
        l2 = L2Runtime(config.l2, Shared(b"n" * 24, b"l" * 16, 4096, (SegmentView(segment),)), told.append, making)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(l2.run)
            while not told:  # noqa: ASYNC110  (imports are done in a thread, in real time)
                await anyio.sleep(1)
            [changed] = told
            assert isinstance(changed, NodesChanged)
            [node] = changed.ring.nodes
            await anyio.sleep(2.5 * RETRY_S)
            assert making.tries == 3
            assert l2.health().out == 1
            assert not l2.to_prefetcher(node.name, FindBlocks(1, (b"k" * 24,), 1e9))
            making.error = None
            await anyio.sleep(RETRY_S)
            assert l2.health().out == 0
            assert told[1:] == [NodeBack(node.name)]
            assert l2.to_prefetcher(node.name, FindBlocks(1, (b"k" * 24,), 1e9))
            tasks.cancel_scope.cancel()
    finally:
        segment.close()
    assert caplog.text.count("node left out") == 1, "once, as long as the reason is the same"


@pytest.mark.asyncio
async def test_a_dead_node_is_in_the_numbers_and_in_the_log(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    async with engine(site) as mine:
        assert await mine.write(1) > 0
        health = mine.l2.health()
        assert (health.left_alone, health.unwritten, health.out, dict(health.faults)) == (0, 0, 0, {})
        assert "node left alone" not in caplog.text
        site.kill()
        await mine.until_left_alone(2)
        await mine.until(lambda: mine.l2.health().left_alone == 1 and "node left alone" in caplog.text, "told of")
        site.restart()
        mine.probe_now()
        await mine.until(lambda: mine.l2.health().left_alone == 0 and "node used again" in caplog.text, "told of as well")


@pytest.mark.asyncio
async def test_a_node_that_sends_what_was_not_written_is_named(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    async with engine(site) as forger, engine(site, secret="hunter2-and-more-of-it") as reader:
        assert await forger.write(1) == COUNT
        for his, ours in zip(forger.names(1), reader.names(1), strict=True):
            value = site.get(his)
            assert value is not None
            site.put(ours, value)
        assert await reader.load(1) == 0
        faults = reader.l2.health().faults
        assert set(faults) == {Fault.FLAGS}
        [node] = reader.nodes
        told = f"node={node} wrong_flags="
        await reader.until(lambda: told in caplog.text, "told of")
        assert "hunter2-and-more-of-it" not in caplog.text
