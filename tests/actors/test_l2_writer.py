"""L2Writer: what is stored was sealed, payloads are never changed, reads go first, every batch is answered once."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import anyio
import numpy as np
import pytest
from tests.actors.l2_rigs import FAR, NODE, PAYLOAD, PrefetcherRig, WriterRig, cancel_everywhere, keys

from kvoffload.actors.l2_writer import L2Writer
from kvoffload.errors import InternalError
from kvoffload.l2.breaker import BreakerState
from kvoffload.l2.node import Outcome
from kvoffload.layout import HEADER_BYTES
from kvoffload.mailbox import Reply
from kvoffload.messages import Drain, FetchBlocks, FetchFinished, Flush, TransfersSettled, WriteBlocks, WriteFinished
from kvoffload.testing.cancel import cancel_at_every_checkpoint
from kvoffload.testing.clock import virtual_backend
from kvoffload.testing.fake_node import InjectedNodeCrash, NodeFault

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """Hashing is done in threads: they get some real time before the clock jumps."""
    return virtual_backend(request.param, grace_s=0.1)


@pytest.fixture
def rigs() -> Iterator[list[WriterRig]]:
    made: list[WriterRig] = []
    yield made
    for rig in made:
        rig.close()


def make_rig(rigs: list[WriterRig], ranks: int = 1, secret: bytes | None = None) -> WriterRig:
    """Slot ``i`` holds block ``i``."""
    rig = WriterRig(ranks, secret)
    rigs.append(rig)
    for index in range(16):
        rig.fill(index, index)
    return rig


def write(batch: int, *blocks: int) -> WriteBlocks:
    return WriteBlocks(batch, blocks, keys(*blocks))


async def run_to_end(rig: WriterRig, actor: L2Writer | None = None) -> L2Writer:
    actor = actor or rig.actor()
    rig.sender.close()
    await actor.run()
    return actor


def one_block_slices(rig: WriterRig) -> dict[str, int]:
    return {"slice_bytes": rig.slots.block_bytes}


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("secret", [None, b"sixteen bytes or more"])
async def test_what_is_stored_was_sealed_and_no_payload_changed(rigs: list[WriterRig], secret: bytes | None) -> None:
    rig = make_rig(rigs, ranks=2, secret=secret)
    rig.post(write(1, 0, 1, 2))
    actor = await run_to_end(rig)
    assert rig.answer() == WriteFinished(1, NODE, (0, 1, 2), ())
    assert rig.node.store.values == {rig.name(index, rank): rig.value(index, rank, secret) for index in (0, 1, 2) for rank in (0, 1)}
    assert all(rig.holds(slot, slot) for slot in range(3))
    assert rig.is_clear(3), "only those that were to be written are sealed"
    assert (actor.statistics.stored, actor.statistics.failed) == (3, 0)
    assert actor.statistics.stored_bytes == 3 * rig.slots.block_bytes
    assert actor.statistics.outcomes == {Outcome.DONE: 6}


async def test_the_same_block_again_changes_nothing(rigs: list[WriterRig]) -> None:
    rig = make_rig(rigs)
    rig.post(write(1, 0), write(2, 0))
    await run_to_end(rig)
    assert [answer.stored for answer in rig.answers()] == [(0,), (0,)]  # type: ignore[union-attr]
    assert rig.segments[0].slot(0)[: HEADER_BYTES + PAYLOAD].tobytes() == rig.value(0)


async def test_what_one_engine_wrote_another_fetches(rigs: list[WriterRig]) -> None:
    rig = make_rig(rigs, ranks=2)
    rig.post(write(1, *range(8)))
    await run_to_end(rig)
    reader = PrefetcherRig(ranks=2)
    reader.node.store.values.update(rig.node.store.values)
    reader.post(FetchBlocks(1, tuple(range(8)), keys(*range(8)), FAR))
    reader.sender.close()
    await reader.actor().run()
    assert reader.answer() == FetchFinished(1, NODE, tuple(range(8)), (), ())
    assert all(reader.holds(slot, slot) for slot in range(8))
    for slot in range(8):
        for mine, its in zip(rig.segments, reader.segments, strict=True):
            assert np.array_equal(mine.slot(slot)[: HEADER_BYTES + PAYLOAD], its.slot(slot)[: HEADER_BYTES + PAYLOAD])
    reader.close()


@pytest.mark.parametrize("fault", [NodeFault.ERROR, NodeFault.FULL, NodeFault.HALF_WRITTEN])
async def test_a_block_is_stored_when_every_part_is(rigs: list[WriterRig], fault: NodeFault) -> None:
    rig = make_rig(rigs, ranks=2)
    rig.node.fail_name("write", rig.name(1, 1), fault)
    rig.post(write(1, 0, 1, 2))
    await run_to_end(rig)
    assert rig.answer() == WriteFinished(1, NODE, (0, 2), (1,))


async def test_a_node_that_never_answers_costs_the_timeout(rigs: list[WriterRig]) -> None:
    rig = make_rig(rigs)
    rig.node.fail_next("write", NodeFault.NEVER)
    rig.post(write(1, 0))
    begun = anyio.current_time()
    await run_to_end(rig, rig.actor(timeout_s=7.0))
    assert rig.answer().failed == (0,)
    assert anyio.current_time() - begun == pytest.approx(7, abs=0.2)


async def test_an_empty_write_is_answered(rigs: list[WriterRig]) -> None:
    rig = make_rig(rigs)
    rig.post(write(1))
    await run_to_end(rig)
    assert rig.out == [WriteFinished(1, NODE, (), ())]


async def test_a_full_node_is_left_alone_for_a_while_and_the_loss_is_counted(rigs: list[WriterRig]) -> None:
    rig = make_rig(rigs)
    rig.node.store.capacity_bytes = 2 * rig.slots.block_bytes
    rig.post(write(1, 0, 1, 2, 3, 4))
    actor = await run_to_end(rig, rig.actor(slices=1, **one_block_slices(rig)))
    assert rig.answer() == WriteFinished(1, NODE, (0, 1), (2, 3, 4))
    assert actor.statistics.outcomes == {Outcome.DONE: 2, Outcome.FULL: 1}
    assert actor.statistics.refused == 2, "not even tried"
    assert rig.breaker.state is BreakerState.OPEN
    assert rig.node.count("write") == 3


async def test_a_node_that_is_out_is_not_written_to(rigs: list[WriterRig]) -> None:
    rig = make_rig(rigs)
    for _ in range(10):
        rig.breaker.record(Outcome.FAILED, 0.1, anyio.current_time())
    with rig.turns.reading():
        rig.post(write(1, 0, 1))
        begun = anyio.current_time()
        await run_to_end(rig)
        assert anyio.current_time() == begun, "nor is its turn waited for"
    assert rig.answer().failed == (0, 1)
    assert rig.node.calls == []


# ---------------------------------------------------------------- slices, turns, bounds


async def test_big_batches_are_cut_and_go_in_order(rigs: list[WriterRig]) -> None:
    rig = make_rig(rigs, ranks=2)
    rig.post(write(1, *range(7)), write(2, 8))
    await run_to_end(rig, rig.actor(slice_bytes=2 * rig.slots.block_bytes + 100, slices=1))
    assert [len(call.names) for call in rig.node.calls] == [4, 4, 4, 2, 2]
    assert [name for call in rig.node.calls for name in call.names] == [rig.name(i, rank) for i in (*range(7), 8) for rank in (0, 1)]
    assert rig.answers() == [WriteFinished(1, NODE, tuple(range(7)), ()), WriteFinished(2, NODE, (8,), ())]


@pytest.mark.parametrize(
    ("settings", "most"), [({"slices": 3}, 3), ({"slices": 8, "inflight_bytes": 2 * 3064}, 2), ({"inflight_bytes": 1}, 1)]
)
async def test_slices_under_way_are_bounded(rigs: list[WriterRig], settings: dict[str, int], most: int) -> None:
    rig = make_rig(rigs)
    assert rig.slots.block_bytes == 3064
    rig.node.hold("write")
    rig.post(write(1, *range(10)))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.actor(**one_block_slices(rig), **settings).run)
        await rig.node.wait_held("write", most)
        await anyio.wait_all_tasks_blocked()
        rig.node.release()
        rig.sender.close()
    assert rig.node.most_at_once["write"] == most
    assert sorted(rig.answer().stored) == list(range(10))


async def test_reads_go_first_but_not_for_ever(rigs: list[WriterRig]) -> None:
    rig = make_rig(rigs)
    rig.post(write(1, 0, 1, 2))
    actor = rig.actor(slices=1, patience_s=10.0, **one_block_slices(rig))
    async with anyio.create_task_group() as tasks:
        begun = anyio.current_time()
        with rig.turns.reading():
            tasks.start_soon(actor.run)
            await anyio.sleep(9)
            assert rig.node.calls == []
            await anyio.sleep(2)
            assert rig.node.count("write") == 1, "out of patience"
        rig.sender.close()
    assert anyio.current_time() - begun == pytest.approx(11, abs=0.5), "the others did not wait once the read was over"
    assert rig.answer().stored == (0, 1, 2)
    assert actor.statistics.impatient == 1


async def test_what_finds_the_queue_full_is_dropped_newest_first(rigs: list[WriterRig]) -> None:
    rig = make_rig(rigs)
    rig.node.hold("write")
    rig.post(write(1, 0))
    actor = rig.actor(slices=1, queue_blocks=4)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(actor.run)
        await rig.node.wait_held("write")
        rig.post(write(2, 1, 2, 3), write(3, 4, 5), write(4, 6))
        await rig.until(lambda: bool(rig.out))
        assert rig.out == [WriteFinished(3, NODE, (), (4, 5))]
        rig.node.release()
        rig.sender.close()
    assert [(answer.batch, answer.stored) for answer in rig.answers()[1:]] == [(1, (0,)), (2, (1, 2, 3)), (4, (6,))]  # type: ignore[union-attr]
    assert (actor.statistics.dropped, actor.statistics.failed) == (2, 2)


# ---------------------------------------------------------------- unsettled, flush, drain


async def test_unsettled_slots_are_reported_twice(rigs: list[WriterRig]) -> None:
    rig = make_rig(rigs)
    rig.node.fail_name("write", rig.name(1), NodeFault.UNSETTLED)
    flush: Reply[bool] = Reply()
    rig.post(write(1, 0, 1, 2), Flush(flush))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.actor(slices=1, **one_block_slices(rig)).run)
        await rig.until(lambda: bool(rig.out))
        assert rig.answer() == WriteFinished(1, NODE, (0, 2), (), (1,))
        await anyio.sleep(100)
        assert rig.settled() == [], "a timeout is no proof"
        assert flush.is_open
        rig.node.settle_now()
        assert await flush.wait()
        assert rig.out[-1] == TransfersSettled(1, NODE, (1,))
        rig.sender.close()


async def test_a_flush_waits_for_what_came_before_it(rigs: list[WriterRig]) -> None:
    rig = make_rig(rigs)
    rig.node.hold("write")
    first: Reply[bool] = Reply()
    flush: Reply[bool] = Reply()
    rig.post(Flush(first), write(1, 0), Flush(flush))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.actor().run)
        assert await first.wait()
        await rig.node.wait_held("write")
        assert flush.is_open
        rig.node.release()
        assert await flush.wait()
        assert rig.answer().stored == (0,)
        rig.sender.close()


async def test_a_drain_writes_what_was_queued_and_refuses_the_rest(rigs: list[WriterRig]) -> None:
    rig = make_rig(rigs)
    drain: Reply[bool] = Reply()
    rig.post(write(1, 0, 1, 2), write(2, 3), Drain(FAR, drain), write(3, 4))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.actor(slices=1, **one_block_slices(rig)).run)
        assert await drain.wait()
        rig.sender.close()
    rig.check_answered_once({1: (0, 1, 2), 2: (3,), 3: (4,)})
    assert {answer.batch: answer.stored for answer in rig.answers()} == {1: (0, 1, 2), 2: (3,), 3: ()}  # type: ignore[union-attr]


async def test_at_a_drains_deadline_what_waits_is_dropped(rigs: list[WriterRig]) -> None:
    rig = make_rig(rigs)
    rig.node.settle_s = 0.0
    rig.node.fail_next("write", NodeFault.UNSETTLED)
    drain: Reply[bool] = Reply()
    rig.post(write(1, 0, 1, 2), write(2, 3))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.actor(slices=1, timeout_s=FAR, **one_block_slices(rig)).run)
        await anyio.sleep(1)
        assert rig.node.count("write") == 4
        rig.sender.close()
    rig.check_answered_once({1: (0, 1, 2), 2: (3,)})

    rig = make_rig(rigs)
    rig.node.settle_s = 0.0
    rig.node.fail_next("write", NodeFault.UNSETTLED)
    rig.node.fail_next("write", NodeFault.NEVER)
    rig.post(write(1, 0, 1, 2), write(2, 3))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.actor(slices=1, timeout_s=100.0, **one_block_slices(rig)).run)
        begun = anyio.current_time()
        await anyio.sleep(1)
        rig.post(Drain(begun + 60, drain))
        assert not await drain.wait()
        assert anyio.current_time() - begun == pytest.approx(60, abs=0.5)
        await rig.until(lambda: len(rig.answers()) == 2)
        assert rig.out[0] == WriteFinished(2, NODE, (), (3,))
        rig.sender.close()
    rig.check_answered_once({1: (0, 1, 2), 2: (3,)})
    assert rig.node.count("write") == 2
    assert anyio.current_time() - begun == pytest.approx(100, abs=0.5), "what is under way has its own timeout"


# ---------------------------------------------------------------- ends


async def together(*runs: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async with anyio.create_task_group() as tasks:
        for run in runs:
            tasks.start_soon(run)


async def test_a_node_that_raises_ends_it_with_every_batch_answered(rigs: list[WriterRig]) -> None:
    rig = make_rig(rigs)
    rig.node.fail_next("write", NodeFault.UNSETTLED)
    rig.node.fail_next("write", NodeFault.NONE)
    rig.node.fail_next("write", NodeFault.RAISE)
    rig.node.settle_s = 0.0
    flush: Reply[bool] = Reply()
    rig.post(write(1, 0, 1, 2, 3), write(2, 4), Flush(flush))
    with pytest.raises(ExceptionGroup) as caught:
        await together(rig.actor(slices=1, **one_block_slices(rig)).run)
    assert caught.group_contains(InjectedNodeCrash)
    assert rig.answers() == [WriteFinished(1, NODE, (1,), (3,), (0, 2)), WriteFinished(2, NODE, (), (4,))]
    rig.check_answered_once({1: (0, 1, 2, 3), 2: (4,)})
    assert not await flush.wait()
    assert not rig.sender.offer(write(9, 0)), "the next one has a mailbox of its own"
    assert rig.breaker.statistics().state is BreakerState.CLOSED, "one error is not enough"


async def test_an_end_waits_for_the_node_to_settle_but_not_for_ever(rigs: list[WriterRig]) -> None:
    rig = make_rig(rigs)
    rig.node.fail_next("write", NodeFault.UNSETTLED)
    rig.post(write(1, 0))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.actor(settle_timeout_s=3.0).run)
        await rig.until(lambda: bool(rig.out))
        begun = anyio.current_time()
        tasks.cancel_scope.cancel()
    assert anyio.current_time() - begun == pytest.approx(3, abs=0.2)
    assert rig.answer().unsettled == (0,)
    assert rig.settled() == []


@pytest.mark.parametrize("wrong", [write(1, 1), WriteBlocks(2, (1, 2), keys(1))])
async def test_messages_that_make_no_sense_are_bugs(rigs: list[WriterRig], wrong: WriteBlocks) -> None:
    rig = make_rig(rigs)
    rig.post(write(1, 0), wrong)
    with pytest.raises(ExceptionGroup) as caught:
        await run_to_end(rig)
    assert caught.group_contains(InternalError, match=f"batch {wrong.batch}")
    assert [answer for answer in rig.answers() if answer.batch == 1] == [WriteFinished(1, NODE, (), (0,))]


BATCHES = {1: (0, 1, 2, 3), 2: (4, 5), 3: (6,)}


def scenario(rigs: list[WriterRig]) -> WriterRig:
    """A bit of everything: stored, failed, unsettled, waiting for its turn."""
    rig = make_rig(rigs)
    rig.node.settle_s = 0.0
    rig.node.fail_name("write", rig.name(1), NodeFault.UNSETTLED)
    rig.node.fail_name("write", rig.name(4), NodeFault.ERROR)
    rig.post(*(write(batch, *blocks) for batch, blocks in BATCHES.items()))
    return rig


def check_scenario(rig: WriterRig) -> None:
    rig.check_answered_once(BATCHES)
    for answer in rig.answers():
        assert isinstance(answer, WriteFinished)
        assert all(rig.node.store.values[rig.name(slot)] == rig.value(slot) for slot in answer.stored)
    assert all(rig.holds(slot, slot) for slot in range(16)), "whatever happens, no payload changes"


async def test_cancelled_at_any_checkpoint_every_batch_is_answered(rigs: list[WriterRig]) -> None:
    replies: list[Reply[bool]] = []

    def make_run() -> Coroutine[Any, Any, None]:
        rig = scenario(rigs)
        replies[:] = [Reply(), Reply()]
        rig.post(Flush(replies[0]), Drain(FAR, replies[1]))
        rig.sender.close()
        return rig.actor(slices=2, **one_block_slices(rig)).run()

    async def check(nth: int) -> None:
        check_scenario(rigs[-1])
        for reply in replies:
            assert not reply.is_open, "somebody waits for ever"
            await reply.wait()
        rigs.pop().close()

    assert await cancel_at_every_checkpoint(make_run, check) >= 2


async def test_cancelled_with_all_its_tasks_anywhere_every_batch_is_answered(rigs: list[WriterRig]) -> None:
    def make() -> Any:
        rig = scenario(rigs)
        rig.sender.close()
        return rig.actor(slices=2, **one_block_slices(rig)).run

    def check() -> None:
        check_scenario(rigs[-1])
        rigs.pop().close()

    assert await cancel_everywhere(make, check) >= 5
