"""What becomes of a fetch: what did not come is remembered, and a slot that may still be written into is never used."""

from __future__ import annotations

from typing import Any

import pytest
from tests.l1.remote_rig import RemoteRig
from tests.l1.rig import chain

from kvoffload.errors import InternalError
from kvoffload.l1 import State
from kvoffload.messages import DropReason, FetchFinished, HitReason, ResetCache, TransfersSettled

A, B = chain("a", 6), chain("b", 6)


def fetching(slots: int = 16, **remote: object) -> RemoteRig:
    rig = RemoteRig(slots, remote=remote)
    rig.ask(A)
    rig.answer_finds()
    return rig


@pytest.mark.parametrize("how", ["absent", "failed", "unsettled"])
def test_what_did_not_come_takes_its_descendants_along(how: str) -> None:
    rig = fetching()
    rig.finish_fetches("n0")
    bad: dict[str, Any] = {how: A[1:2]}
    rig.finish_fetches("n1", **bad)
    assert len(rig.hits[0].slots) == 1, "the hit ends there, whatever n2 does"
    assert rig.slots_in(State.DOOMED) == 2
    rig.finish_fetches("n2")
    assert (rig.slots_in(State.READY), rig.slots_in(State.DOOMED)) == (1, 0)
    assert rig.slots_in(State.QUARANTINED) == (how == "unsettled")
    assert rig.statistics().drops[DropReason.FETCH_FAILED] == 5
    totals = rig.remote.totals
    assert (totals.fetched, totals.absent, totals.failed) == (5, how == "absent", how != "absent")


def test_what_failed_is_not_asked_for_again_for_a_while() -> None:
    rig = fetching(retry_after_s=10.0)
    rig.finish_fetches(failed=A[2:3])
    assert len(rig.hits[0].slots) == 2
    assert rig.match(A, "soon").reason == HitReason.HIT
    assert not rig.finds, "the first block that L1 lacks is the one that failed"
    rig.advance(10.0)
    rig.ask(A, "late")
    assert rig.finds


def test_a_search_ends_before_a_block_that_failed() -> None:
    rig = fetching()
    rig.finish_fetches(failed=A[4:5])
    rig.send(ResetCache(1))
    other = RemoteRig(16)
    other.ask(A)
    other.answer_finds()
    other.finish_fetches(failed=A[4:5], absent=A[:1])
    other.advance(9.0)
    assert other.match(A, "s").reason == HitReason.MISS
    other.advance(1.5)
    other.ask(A, "t")
    assert {key for _, find in other.finds for key in find.keys} == set(A)


def test_a_late_writer_finds_its_slot_as_it_was_left_and_never_in_use() -> None:
    """A node that was given up on still writes into the slot of a fetch, until it says that it does not."""
    rig = fetching(8, retry_after_s=0.0)
    ((_, fetch),) = [entry for entry in rig.fetches if entry[0] == "n0"]
    late = fetch.slots[0]
    rig.finish_fetches("n0", unsettled=A[:1])
    rig.finish_fetches()
    assert rig.core.unsettled_jobs() == {-fetch.batch}
    assert (rig.remote.unsettled, rig.remote.fetching) == (1, 1)
    for name in "cdefghij":
        assert late not in rig.save(chain(name, 8)), "the late writer would have torn this block"
        rig.finish_writes()
    rig.send(ResetCache(1))
    assert late not in rig.save(chain("k", 8))
    assert rig.slots_in(State.QUARANTINED) == 1
    rig.settle(fetch.batch, "n0", late)
    assert (rig.slots_in(State.QUARANTINED), rig.core.open_jobs(), rig.remote.unsettled) == (0, frozenset(), 0)
    assert late in rig.save(chain("l", 8))


def test_transfers_settle_one_by_one_and_each_once() -> None:
    rig = RemoteRig(16)
    rig.ask(A)
    rig.answer_finds()
    node, fetch = rig.fetches[0]
    rig.finish_fetches(node, unsettled=A)
    first, second = fetch.slots
    rig.settle(fetch.batch, node, second)
    assert rig.slots_in(State.QUARANTINED) == 1
    for slots in ((second,), (first, second), (first, first), (99,)):
        with pytest.raises(InternalError, match="not unsettled"):
            rig.core.handle(TransfersSettled(fetch.batch, node, slots), 5.0)
    rig.settle(fetch.batch, node, first)
    assert rig.slots_in(State.QUARANTINED) == 0


def test_reports_that_cannot_be_are_bugs() -> None:
    for wrong in ("batch", "node", "short", "twice"):
        rig = fetching()
        node, fetch = rig.fetches[0]
        message = {
            "batch": FetchFinished(99, node, fetch.slots, (), ()),
            "node": FetchFinished(fetch.batch, "n2", fetch.slots, (), ()),
            "short": FetchFinished(fetch.batch, node, fetch.slots[:1], (), ()),
            "twice": FetchFinished(fetch.batch, node, fetch.slots, fetch.slots[:1], ()),
        }[wrong]
        with pytest.raises(InternalError, match="reported"):
            rig.core.handle(message, 5.0)


def test_a_flush_sees_fetches_and_what_is_not_settled() -> None:
    rig = fetching()
    assert rig.core.open_jobs() == {-fetch.batch for _, fetch in rig.fetches}
    assert rig.core.open_writes() == frozenset()


def test_a_fetch_makes_room_as_a_save_does_but_not_out_of_what_is_in_use() -> None:
    rig = RemoteRig(12, max_waiting_share=1.0)
    rig.save(B)
    kept = rig.match(B, "b")
    rig.save(chain("c", 6))
    rig.finish_writes()
    rig.ask(A)
    rig.answer_finds()
    assert sum(len(fetch.keys) for _, fetch in rig.fetches) == 6
    rig.finish_fetches()
    assert len(rig.hits[-1].slots) == 6
    assert not set(rig.hits[-1].slots) & set(kept.slots)


def test_blocks_that_came_are_not_written_back_and_stay_when_the_ring_changes() -> None:
    rig = RemoteRig(16)
    hit = rig.put(A)
    assert (len(hit.slots), rig.writes) == (6, [])


def test_what_the_engine_computed_while_a_fetch_was_late_is_asked_for_again() -> None:
    """It was not saved, because a node was to bring it; it did not, and without a word L1 would never have it."""
    rig = RemoteRig(32)
    keys = chain("late", 6)
    rig.ask(keys, wait_s=0.05)
    rig.answer_finds()
    rig.advance(0.05)  # the deadline: answered 0, and the engine computes
    assert rig.hits[-1].slots == ()
    assert rig.reserve(keys).slots == ()
    rig.finish_fetches(failed=keys)
    assert [request for missing in rig.missing for request in missing.requests]


def test_nobody_is_told_when_the_late_fetch_comes_after_all() -> None:
    rig = RemoteRig(32)
    keys = chain("late", 6)
    rig.ask(keys, wait_s=0.05)
    rig.answer_finds()
    rig.advance(0.05)
    assert rig.reserve(keys).slots == ()
    rig.finish_fetches()
    assert not rig.missing
