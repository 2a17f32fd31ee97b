"""L2Prefetcher: nothing unproven is fetched, every batch is answered once, bytes and deadlines are kept."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import anyio
import pytest
from tests.actors.l2_rigs import FAR, NODE, PrefetcherRig, cancel_everywhere, key, keys

from kvoffload.actors.l2_prefetcher import L2Prefetcher
from kvoffload.envelope import Fault
from kvoffload.errors import InternalError, PeerError
from kvoffload.l2.node import Outcome
from kvoffload.l2.values import SlotBuffers
from kvoffload.mailbox import Reply
from kvoffload.messages import BlocksFound, Drain, FetchBlocks, FetchFinished, FindBlocks, TransfersSettled
from kvoffload.testing.cancel import cancel_at_every_checkpoint
from kvoffload.testing.clock import virtual_backend
from kvoffload.testing.fake_node import InjectedNodeCrash, NodeFault

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """Hashing is done in threads: they get some real time before the clock jumps."""
    return virtual_backend(request.param, grace_s=0.1)


@pytest.fixture
def rigs() -> Iterator[list[PrefetcherRig]]:
    made: list[PrefetcherRig] = []
    yield made
    for rig in made:
        rig.close()


def make_rig(rigs: list[PrefetcherRig], ranks: int = 1, secret: bytes | None = None) -> PrefetcherRig:
    rigs.append(PrefetcherRig(ranks, secret))
    return rigs[-1]


def fetch(batch: int, *blocks: int, first: int = 0, deadline: float = FAR) -> FetchBlocks:
    """Block ``blocks[i]`` into slot ``first + i``."""
    return FetchBlocks(batch, tuple(range(first, first + len(blocks))), keys(*blocks), deadline)


async def run_to_end(rig: PrefetcherRig, actor: L2Prefetcher | None = None) -> L2Prefetcher:
    actor = actor or rig.actor()
    rig.sender.close()
    await actor.run()
    return actor


async def together(*runs: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async with anyio.create_task_group() as tasks:
        for run in runs:
            tasks.start_soon(run)


# ---------------------------------------------------------------- finding


async def test_a_block_is_found_when_every_rank_has_its_part(rigs: list[PrefetcherRig]) -> None:
    rig = make_rig(rigs, ranks=2)
    rig.store(0, 1, 2)
    del rig.node.store.values[rig.name(1, rank=1)]
    rig.post(FindBlocks(1, keys(0, 1, 2, 3), FAR))
    actor = await run_to_end(rig)
    assert rig.out == [BlocksFound(1, NODE, (True, False, True, False))]
    assert (actor.statistics.asked, actor.statistics.found) == (4, 2)


@pytest.mark.parametrize("fault", [NodeFault.ERROR, NodeFault.NEVER, NodeFault.REFUSE])
async def test_a_node_that_cannot_be_asked_has_nothing(rigs: list[PrefetcherRig], fault: NodeFault) -> None:
    rig = make_rig(rigs)
    rig.store(0)
    rig.node.fail_next("find", fault)
    rig.post(FindBlocks(1, keys(0), anyio.current_time() + 5))
    await run_to_end(rig)
    assert rig.out == [BlocksFound(1, NODE, ())]


async def test_a_node_that_is_out_is_not_asked(rigs: list[PrefetcherRig]) -> None:
    rig = make_rig(rigs)
    rig.store(0)
    for _ in range(10):
        rig.breaker.record(Outcome.FAILED, 0.1, anyio.current_time())
    rig.mark(0)
    rig.post(FindBlocks(1, keys(0), FAR), fetch(2, 0))
    actor = await run_to_end(rig)
    assert rig.answers() == [BlocksFound(1, NODE, ()), FetchFinished(2, NODE, (), (), (0,))] or rig.answers() == [
        FetchFinished(2, NODE, (), (), (0,)),
        BlocksFound(1, NODE, ()),
    ]
    assert rig.node.calls == []
    assert rig.is_untouched(0)
    assert actor.statistics.refused == 2


async def test_failures_open_the_breaker_and_a_probe_closes_it(rigs: list[PrefetcherRig]) -> None:
    rig = make_rig(rigs)
    rig.store(0)
    rig.node.fail_next("find", NodeFault.ERROR, 5)
    actor = rig.actor()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(actor.run)
        for batch in range(7):
            rig.post(FindBlocks(batch, keys(0), FAR))
            await rig.until(lambda batch=batch: len(rig.out) == batch + 1)  # type: ignore[misc]
        assert rig.node.count("find") == 5, "two were not asked"
        await anyio.sleep(60)
        rig.post(FindBlocks(8, keys(0), FAR))
        rig.sender.close()
    assert rig.out[-1] == BlocksFound(8, NODE, (True,))


async def test_a_find_waits_for_no_fetch(rigs: list[PrefetcherRig]) -> None:
    rig = make_rig(rigs)
    rig.store(0)
    rig.node.hold("read")
    rig.post(fetch(1, 0), FindBlocks(2, keys(0), FAR))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.actor(inflight_bytes=1).run)
        await rig.until(lambda: bool(rig.out))
        assert rig.out == [BlocksFound(2, NODE, (True,))]
        rig.node.release()
        rig.sender.close()


# ---------------------------------------------------------------- fetching


@pytest.mark.parametrize("secret", [None, b"sixteen bytes or more"])
async def test_what_is_there_is_fetched(rigs: list[PrefetcherRig], secret: bytes | None) -> None:
    rig = make_rig(rigs, ranks=2, secret=secret)
    for index in (0, 1, 2):
        for rank in (0, 1):
            rig.node.store.values[rig.name(index, rank)] = rig.value(index, rank, secret)
    rig.mark(0, 1, 2, 3)
    rig.post(fetch(1, 0, 1, 7, 2))
    actor = await run_to_end(rig)
    assert rig.answer() == FetchFinished(1, NODE, (0, 1, 3), (2,), ())
    assert rig.holds(0, 0)
    assert rig.holds(1, 1)
    assert rig.holds(3, 2)
    assert rig.is_clear(2)
    assert rig.node.count("read") == 1, "one batch"
    counted = actor.statistics
    assert (counted.fetched, counted.absent, counted.failed) == (3, 1, 0)
    assert counted.fetched_bytes == 3 * rig.slots.block_bytes
    assert counted.outcomes == {Outcome.DONE: 6, Outcome.ABSENT: 2}


async def test_an_empty_fetch_is_answered(rigs: list[PrefetcherRig]) -> None:
    rig = make_rig(rigs)
    rig.post(fetch(1), FindBlocks(2, (), FAR))
    await run_to_end(rig)
    assert sorted(rig.out, key=lambda message: message.batch) == [FetchFinished(1, NODE, (), (), ()), BlocksFound(2, NODE, ())]


def other_rank(rig: PrefetcherRig) -> None:
    rig.node.store.values[rig.name(1, 0)] = rig.value(1, rank=1)


def last_rank(rig: PrefetcherRig) -> None:
    rig.node.store.values[rig.name(1, 1)] = rig.value(1, rank=0)


def other_secret(rig: PrefetcherRig) -> None:
    rig.node.store.values[rig.name(1, 0)] = rig.value(1, secret=b"forged")


def never_sealed(rig: PrefetcherRig) -> None:
    rig.node.store.values[rig.name(1, 0)] = bytes(len(rig.value(1)))


FAULTS: dict[str, tuple[Callable[[PrefetcherRig], None], Fault | None]] = {
    "one bit is wrong": (lambda rig: rig.node.fail_name("read", rig.name(1), NodeFault.FLIPPED), None),
    "half of it came": (lambda rig: rig.node.fail_name("read", rig.name(1), NodeFault.TRUNCATED), Fault.TAG),
    "another key's value": (lambda rig: rig.node.fail_name("read", rig.name(1), NodeFault.OTHER_KEY), Fault.KEY),
    "another rank's part": (other_rank, Fault.RANK),
    "another rank's part, of the last rank": (last_rank, Fault.RANK),
    "sealed with a secret": (other_secret, Fault.FLAGS),
    "never sealed": (never_sealed, Fault.MAGIC),
}


@pytest.mark.parametrize("what", FAULTS)
async def test_what_is_not_proven_is_not_fetched(rigs: list[PrefetcherRig], what: str) -> None:
    rig = make_rig(rigs, ranks=2)
    rig.store(0, 1, 2)
    spoil, fault = FAULTS[what]
    spoil(rig)
    rig.post(fetch(1, 0, 1, 2))
    actor = await run_to_end(rig)
    assert rig.answer() == FetchFinished(1, NODE, (0, 2), (), (1,))
    assert rig.unclear == []
    assert rig.is_clear(1), "of both ranks, the good part as well"
    assert rig.holds(0, 0)
    assert sum(actor.statistics.faults.values()) == 1
    assert fault is None or actor.statistics.faults == {fault: 1}
    [(wrong,)] = [call.names for call in rig.node.calls if call.kind == "discard"]
    assert wrong in (rig.name(1), rig.name(1, rank=1))
    assert wrong not in rig.node.store.values, "it can be written again"
    assert rig.node.count("find") + rig.node.count("read") == 1


async def test_what_is_right_is_not_discarded(rigs: list[PrefetcherRig]) -> None:
    rig = make_rig(rigs, ranks=2)
    rig.store(0, 1)
    rig.node.fail_name("read", rig.name(1), NodeFault.ERROR)
    rig.post(fetch(1, 0, 1, 2))
    await run_to_end(rig)
    assert rig.answer() == FetchFinished(1, NODE, (0,), (2,), (1,))
    assert rig.node.count("discard") == 0


async def test_a_value_of_another_length_is_discarded(rigs: list[PrefetcherRig]) -> None:
    rig = make_rig(rigs)
    rig.store(0)
    rig.node.fail_next("read", NodeFault.MALFORMED)
    rig.post(fetch(1, 0))
    await run_to_end(rig)
    assert rig.answer() == FetchFinished(1, NODE, (), (), (0,))
    assert rig.name(0) not in rig.node.store.values


async def test_a_node_that_does_not_discard_holds_up_nobody(rigs: list[PrefetcherRig]) -> None:
    rig = make_rig(rigs)
    rig.store(0)
    rig.node.fail_next("read", NodeFault.FLIPPED)
    rig.node.fail_always("discard", NodeFault.NEVER)
    rig.post(fetch(1, 0))
    begun = anyio.current_time()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.actor().run)
        await rig.until(lambda: bool(rig.out))
        assert anyio.current_time() - begun < 0.5
        rig.sender.close()
    assert rig.answer() == FetchFinished(1, NODE, (), (), (0,))
    assert anyio.current_time() - begun < 5


@pytest.mark.parametrize("fault", [NodeFault.ERROR, NodeFault.MALFORMED, NodeFault.FULL])
async def test_a_part_that_fails_fails_its_block_alone(rigs: list[PrefetcherRig], fault: NodeFault) -> None:
    rig = make_rig(rigs, ranks=2)
    rig.store(0, 1, 2)
    del rig.node.store.values[rig.name(1, 0)]
    rig.node.fail_name("read", rig.name(1, 1), fault)
    rig.post(fetch(1, 0, 1, 2))
    await run_to_end(rig)
    assert rig.answer() == FetchFinished(1, NODE, (0, 2), (), (1,)), "failed beats absent"
    assert rig.is_clear(1)


async def test_a_node_that_never_answers_costs_the_deadline(rigs: list[PrefetcherRig]) -> None:
    rig = make_rig(rigs)
    rig.node.fail_next("read", NodeFault.NEVER)
    rig.post(fetch(1, 0, deadline=anyio.current_time() + 5))
    begun = anyio.current_time()
    await run_to_end(rig)
    assert rig.answer().failed == (0,)
    assert anyio.current_time() - begun == pytest.approx(5, abs=0.1)


async def test_unsettled_slots_are_reported_twice_and_pass_for_nothing(rigs: list[PrefetcherRig]) -> None:
    """The late writer."""
    rig = make_rig(rigs, ranks=2)
    rig.store(0, 1, 2)
    rig.node.fail_name("read", rig.name(1, 1), NodeFault.UNSETTLED)
    rig.post(fetch(1, 0, 1, 2))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.actor().run)
        await rig.until(lambda: bool(rig.out))
        assert rig.answer() == FetchFinished(1, NODE, (0, 2), (), (), (1,))
        await anyio.sleep(100)
        assert rig.settled() == [], "a timeout is no proof"
        rig.node.scribble()
        rig.node.settle_now()
        await rig.until(lambda: bool(rig.settled()))
        assert rig.out[-1] == TransfersSettled(1, NODE, (1,))
        assert rig.is_clear(1)
        assert rig.unclear == [], "and it was when that was said"
        rig.sender.close()
    assert rig.holds(0, 0)
    assert rig.holds(2, 2)


async def test_bytes_under_way_are_bounded_and_go_in_order(rigs: list[PrefetcherRig]) -> None:
    rig = make_rig(rigs)
    rig.store(*range(8))
    rig.node.hold("read")
    rig.post(fetch(1, 0, 1), fetch(2, 2, first=2), fetch(3, 3, 4, first=3), fetch(4, 5, first=5), fetch(5, 6, first=6))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.actor(inflight_bytes=3 * rig.slots.block_bytes).run)
        await rig.node.wait_held("read", 2)
        await anyio.wait_all_tasks_blocked()
        assert rig.node.count("read") == 2, "the small ones behind the third do not overtake it"
        rig.node.release()
        rig.sender.close()
    assert rig.node.most_at_once["read"] <= 3
    rig.check_answered_once({1: (0, 1), 2: (2,), 3: (3, 4), 4: (5,), 5: (6,)})
    assert all(answer.fetched for answer in rig.answers())  # type: ignore[union-attr]


async def test_fetches_go_in_the_order_in_which_they_came(rigs: list[PrefetcherRig]) -> None:
    rig = make_rig(rigs)
    rig.store(*range(8))
    rig.post(*(fetch(index, index, first=index) for index in range(8)))
    await run_to_end(rig, rig.actor(inflight_bytes=1))
    assert [call.names for call in rig.node.calls] == [(rig.name(index),) for index in range(8)]
    assert rig.node.most_at_once["read"] == 1


async def test_a_fetch_larger_than_all_that_may_be_under_way_goes_in_slices(rigs: list[PrefetcherRig]) -> None:
    rig = make_rig(rigs, ranks=2)
    rig.store(*range(5))
    rig.post(fetch(1, *range(5)))
    await run_to_end(rig, rig.actor(inflight_bytes=4 * rig.slots.value_bytes))
    assert [len(call.names) for call in rig.node.calls] == [4, 4, 2]
    assert rig.answer().fetched == (0, 1, 2, 3, 4)


async def test_what_cannot_begin_in_time_fails_untouched(rigs: list[PrefetcherRig]) -> None:
    rig = make_rig(rigs)
    rig.store(0, 1, 2)
    rig.mark(1, 2)
    rig.node.hold("read")
    now = anyio.current_time()
    rig.post(fetch(1, 0), fetch(2, 1, first=1, deadline=now + 5), fetch(3, 2, first=2, deadline=now - 1), FindBlocks(4, keys(0), now - 1))
    actor = rig.actor(inflight_bytes=1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(actor.run)
        await rig.until(lambda: len(rig.out) == 3)
        assert anyio.current_time() - now == pytest.approx(5, abs=0.1)
        rig.node.release()
        rig.sender.close()
    rig.check_answered_once({1: (0,), 2: (1,), 3: (2,)})
    assert rig.is_untouched(1)
    assert rig.is_untouched(2)
    assert rig.node.count("read") == 1
    assert rig.node.count("find") == 0
    assert actor.statistics.late == 3


async def test_seconds_are_the_nodes_and_leave_out_the_queue(rigs: list[PrefetcherRig]) -> None:
    rig = make_rig(rigs)
    rig.store(0, 1)
    rig.node.latency_s = 2.0
    rig.post(fetch(1, 0), fetch(2, 1, first=1))
    begun = anyio.current_time()
    await run_to_end(rig, rig.actor(inflight_bytes=1))
    assert anyio.current_time() - begun == pytest.approx(4.0, abs=0.1)
    assert [answer.seconds for answer in rig.answers()] == pytest.approx([2.0, 2.0], abs=0.1)  # type: ignore[union-attr]


async def test_writes_are_told_of_reads(rigs: list[PrefetcherRig]) -> None:
    rig = make_rig(rigs)
    rig.node.hold("read")
    rig.post(fetch(1, 0))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.actor().run)
        await rig.node.wait_held("read")
        assert not await rig.turns.wait_to_write(1.0)
        rig.node.release()
        rig.sender.close()
    assert await rig.turns.wait_to_write(0.0)


async def test_too_many_at_once_are_refused(rigs: list[PrefetcherRig]) -> None:
    rig = make_rig(rigs)
    rig.node.hold("find")
    rig.post(*(FindBlocks(batch, keys(0), FAR) for batch in range(5)))
    actor = rig.actor(batches=3)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(actor.run)
        await rig.node.wait_held("find", 3)
        assert [message.batch for message in rig.out] == [3, 4]
        rig.node.release()
        rig.sender.close()
    assert sorted(message.batch for message in rig.out) == [0, 1, 2, 3, 4]
    assert actor.statistics.refused == 2


# ---------------------------------------------------------------- ends


async def test_a_drain_finishes_what_was_begun_and_refuses_the_rest(rigs: list[PrefetcherRig]) -> None:
    rig = make_rig(rigs)
    rig.store(0, 1, 2)
    rig.node.hold("read")
    drain: Reply[bool] = Reply()
    rig.post(fetch(1, 0), fetch(2, 1, first=1))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.actor(inflight_bytes=1).run)
        await rig.node.wait_held("read")
        rig.post(Drain(anyio.current_time() + 60, drain), fetch(3, 2, first=2), FindBlocks(4, keys(0), FAR))
        await rig.until(lambda: len(rig.out) == 3)
        assert drain.is_open
        rig.node.release()
        assert await drain.wait()
        rig.sender.close()
    rig.check_answered_once({1: (0,), 2: (1,), 3: (2,)})
    assert [answer.fetched for answer in rig.answers() if answer.batch == 1] == [(0,)]  # type: ignore[union-attr]
    assert rig.node.count("read") == 1


async def test_a_drain_is_answered_false_at_its_deadline(rigs: list[PrefetcherRig]) -> None:
    rig = make_rig(rigs)
    rig.node.hold("read")
    drain: Reply[bool] = Reply()
    rig.post(fetch(1, 0))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.actor().run)
        await rig.node.wait_held("read")
        begun = anyio.current_time()
        rig.post(Drain(begun + 60, drain))
        assert not await drain.wait()
        assert anyio.current_time() - begun == pytest.approx(60, abs=0.1)
        rig.node.release()
        rig.sender.close()
    rig.check_answered_once({1: (0,)})


async def test_a_drain_waits_for_what_is_not_settled(rigs: list[PrefetcherRig]) -> None:
    rig = make_rig(rigs)
    rig.node.fail_next("read", NodeFault.UNSETTLED)
    drain: Reply[bool] = Reply()
    rig.post(fetch(1, 0), Drain(FAR, drain))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.actor().run)
        await rig.until(lambda: bool(rig.out))
        await anyio.wait_all_tasks_blocked()
        assert drain.is_open
        rig.node.settle_now()
        assert await drain.wait()
        rig.sender.close()
    rig.check_answered_once({1: (0,)})


@pytest.mark.parametrize("kind", ["find", "read"])
async def test_a_node_that_raises_ends_it_with_every_batch_answered(rigs: list[PrefetcherRig], kind: str) -> None:
    rig = make_rig(rigs)
    rig.store(0, 1, 2)
    rig.node.hold("find" if kind == "read" else "read")
    drain: Reply[bool] = Reply()
    rig.post(fetch(1, 0) if kind == "find" else FindBlocks(1, keys(0), FAR))

    async def crash() -> None:
        await rig.node.wait_held("read" if kind == "find" else "find")
        rig.node.fail_next(kind, NodeFault.RAISE)  # type: ignore[arg-type]
        rig.post(FindBlocks(2, keys(0), FAR) if kind == "find" else fetch(2, 1, 2, first=1), Drain(FAR, drain))

    with pytest.raises(ExceptionGroup) as caught:
        await together(rig.actor().run, crash)
    assert caught.group_contains(InjectedNodeCrash)
    assert sorted(answer.batch for answer in rig.answers()) == [1, 2]
    assert not await drain.wait()
    assert not rig.sender.offer(fetch(9, 0)), "the next one has a mailbox of its own"
    if kind == "read":
        (answer,) = [answer for answer in rig.answers() if answer.batch == 2]
        assert answer == FetchFinished(2, NODE, (), (), (), (1, 2)), "what a call that raised left behind, nobody knows"
        assert rig.settled() == [(2, (1, 2))]
        assert rig.is_clear(1)


async def test_an_end_waits_for_the_node_to_settle_but_not_for_ever(rigs: list[PrefetcherRig]) -> None:
    rig = make_rig(rigs)
    rig.node.fail_next("read", NodeFault.UNSETTLED)
    rig.post(fetch(1, 0))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.actor(settle_timeout_s=3.0).run)
        await rig.until(lambda: bool(rig.out))
        begun = anyio.current_time()
        tasks.cancel_scope.cancel()
    assert anyio.current_time() - begun == pytest.approx(3, abs=0.1)
    assert rig.answer().unsettled == (0,)
    assert rig.settled() == []


async def test_the_same_batch_twice_is_a_bug(rigs: list[PrefetcherRig]) -> None:
    rig = make_rig(rigs)
    rig.post(fetch(1, 0), fetch(1, 1))
    with pytest.raises(ExceptionGroup) as caught:
        await run_to_end(rig)
    assert caught.group_contains(InternalError, match="batch 1")
    rig.check_answered_once({1: (0,)})


async def test_a_segment_that_is_gone_is_no_miss(rigs: list[PrefetcherRig]) -> None:
    rig = make_rig(rigs)
    rig.store(0)
    rig.slots = SlotBuffers(rig.segments, payload_bytes=1 << 20)
    rig.post(fetch(1, 0))
    with pytest.raises(ExceptionGroup) as caught:
        await run_to_end(rig)
    assert caught.group_contains(InternalError, match="segment")
    rig.check_answered_once({1: (0,)})


async def test_cancelled_at_any_checkpoint_every_batch_is_answered(rigs: list[PrefetcherRig]) -> None:
    replies: list[Reply[bool]] = []

    def make_run() -> Coroutine[Any, Any, None]:
        rig = scenario(rigs)
        replies[:] = [Reply()]
        rig.post(Drain(FAR, replies[0]))
        rig.sender.close()
        return rig.actor(inflight_bytes=3 * rig.slots.block_bytes).run()

    async def check(nth: int) -> None:
        rigs[-1].check_answered_once(BATCHES)
        try:
            await replies[0].wait()
        except PeerError:
            pytest.fail("the drain was dropped")
        rigs.pop().close()

    assert await cancel_at_every_checkpoint(make_run, check) >= 2


async def test_cancelled_with_all_its_tasks_anywhere_every_batch_is_answered(rigs: list[PrefetcherRig]) -> None:
    def make() -> Any:
        rig = scenario(rigs)
        rig.sender.close()
        return rig.actor(inflight_bytes=3 * rig.slots.block_bytes).run

    def check() -> None:
        rig = rigs[-1]
        rig.check_answered_once(BATCHES)
        for answer in rig.answers():
            if isinstance(answer, FetchFinished):
                fetches = dict(zip(SLOTS_OF[answer.batch], BLOCKS_OF[answer.batch], strict=True))
                assert all(rig.holds(slot, fetches[slot]) for slot in answer.fetched)
                assert all(rig.is_untouched(slot) or rig.is_clear(slot) for slot in (*answer.failed, *answer.absent, *answer.unsettled))
        rigs.pop().close()

    assert await cancel_everywhere(make, check) >= 5


BLOCKS_OF = {1: (0, 1), 2: (2, 3), 3: (4, 5), 4: (6,)}
SLOTS_OF = {1: (0, 1), 2: (2, 3), 3: (4, 5), 4: (6,)}
BATCHES = SLOTS_OF


def scenario(rigs: list[PrefetcherRig]) -> PrefetcherRig:
    """A bit of everything: found, fetched, absent, wrong, unsettled, waiting for its turn."""
    rig = make_rig(rigs)
    rig.store(0, 1, 2, 5, 6)
    rig.mark(*range(8))
    rig.node.settle_s = 0.0
    rig.node.fail_name("read", rig.name(1), NodeFault.UNSETTLED)
    rig.node.fail_name("read", rig.name(5), NodeFault.FLIPPED)
    rig.post(fetch(1, 0, 1), FindBlocks(9, (key(0), key(3)), FAR), fetch(2, 2, 3, first=2), fetch(3, 4, 5, first=4), fetch(4, 6, first=6))
    return rig
