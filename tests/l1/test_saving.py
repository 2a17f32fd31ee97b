"""Reserve, fill, commit: and what is dropped on the way, counted for its reason."""

from __future__ import annotations

import pytest
from tests.l1.rig import Rig, chain, run

from kvoffload.errors import InternalError
from kvoffload.l1 import State
from kvoffload.messages import BlocksFilled, DropReason, ReserveSlots, ResetCache, SaveRun, SegmentGrown

A, B = chain("a", 4), chain("b", 4)


def test_a_saved_prompt_is_found_in_order() -> None:
    rig = Rig(8)
    slots = rig.save(A)
    assert len(slots) == 4
    assert rig.match(A).slots == slots


def test_every_rank_gets_the_grant_with_blocks_and_epochs_as_planned() -> None:
    rig = Rig(8, ranks=3)
    grant, missing = rig.reserve(run(A))
    assert (grant.blocks, grant.epochs, missing) == ((0, 1, 2, 3), (1000, 1001, 1002, 1003), ())


def test_nothing_is_ready_before_the_last_rank_has_filled_it() -> None:
    rig = Rig(8, ranks=2)
    grant, _ = rig.reserve(run(A))
    rig.fill(grant, rank=1)
    assert not rig.match(A).slots
    assert rig.match(A).pending == 4
    rig.fill(grant, rank=0)
    assert len(rig.match(A).slots) == 4


def test_what_is_there_or_being_filled_is_shared_and_not_granted_again() -> None:
    rig = Rig(8)
    rig.save(A[:2])
    first, _ = rig.reserve(run(A))
    assert first.blocks == (2, 3)
    second, missing = rig.reserve(run(A, request="other"))
    assert (second.slots, missing) == ((), ())
    assert rig.core.statistics().shared == 6
    assert rig.core.open_jobs() == {first.job}


def test_two_requests_with_one_prefix_in_one_message_fill_it_once() -> None:
    rig = Rig(8)
    grant, missing = rig.reserve(run(A[:2], request="x"), run((*A[:2], *B[:1]), request="y"))
    assert (grant.blocks, missing) == ((0, 1, 2), ())
    rig.fill(grant)
    assert rig.match((*A[:2], *B[:1])).slots == grant.slots


def test_a_missing_parent_names_each_request_once_and_drops_its_blocks() -> None:
    rig = Rig(8)
    grant, missing = rig.reserve(run(A, 2, "x"), run(B, 1, "x"), run(B, 2, "y"))
    assert (grant.slots, missing) == ((), ("x", "y"))
    assert rig.drops(DropReason.PARENT_MISSING) == 7
    assert not rig.core.open_jobs()


def test_a_run_cut_for_want_of_slots_names_nobody() -> None:
    rig = Rig(3)
    grant, missing = rig.reserve(run(A, request="x"), run((*A, *B[:1]), 4, "x"))
    assert (grant.blocks, missing) == ((0, 1, 2), ())
    assert rig.drops(DropReason.NO_SLOT) == 2


def test_the_parent_of_a_new_block_is_not_evicted_for_it() -> None:
    for policy in ("lru", "s3fifo"):
        rig = Rig(2, policy=policy, max_waiting_share=1.0)
        rig.save(A[:2])
        grant, missing = rig.reserve(run(A[:3], 2))
        assert (grant.slots, missing) == ((), ()), "its parents were all there was to evict"
        assert len(rig.match(A).slots) == 2


def test_a_run_that_repeats_a_key_is_cut_there() -> None:
    rig = Rig(8)
    grant, _ = rig.reserve(SaveRun("r", b"", (A[0], A[1], A[0], A[2]), (0, 1, 2, 3), (0, 0, 0, 0)))
    assert grant.blocks == (0, 1)
    rig.fill(grant)
    assert rig.slots_in(State.FREE) == 6


def test_a_child_waits_for_a_parent_of_another_job() -> None:
    rig = Rig(8)
    parent, _ = rig.reserve(run(A[:2]))
    child, _ = rig.reserve(run(A, 2))
    rig.fill(child)
    assert rig.slots_in(State.FILLED) == 2
    assert rig.match(A).pending == 4
    rig.fill(parent)
    assert rig.match(A).slots == parent.slots + child.slots


def test_a_failed_block_takes_what_waits_for_it_along() -> None:
    rig = Rig(8)
    parent, _ = rig.reserve(run(A[:2]))
    filled, _ = rig.reserve(run(A[:3], 2))
    filling, _ = rig.reserve(run(A, 3))
    rig.fill(filled)
    rig.fill(parent, 1, reason=DropReason.OVERWRITTEN)
    assert (rig.drops(DropReason.OVERWRITTEN), rig.drops(DropReason.PARENT_FAILED)) == (1, 2)
    assert (rig.slots_in(State.READY), rig.slots_in(State.DOOMED), rig.slots_in(State.FREE)) == (1, 1, 6)
    rig.fill(filling)
    assert (rig.slots_in(State.READY), rig.slots_in(State.FREE)) == (1, 7)


def test_a_grant_that_failed_as_a_whole_is_counted_for_its_own_reason() -> None:
    rig = Rig(8)
    grant, _ = rig.reserve(run(A))
    rig.fill(grant, 0, 1, 2, 3, reason=DropReason.UNPAIRED)
    assert (rig.drops(DropReason.UNPAIRED), rig.drops(DropReason.PARENT_FAILED)) == (4, 0)
    assert rig.slots_in(State.FREE) == 8


def test_a_block_that_failed_on_one_rank_is_free_when_the_other_has_reported() -> None:
    rig = Rig(8, ranks=2)
    grant, _ = rig.reserve(run(A))
    rig.fill(grant, 2, rank=0, reason=DropReason.COPY_FAILED)
    assert rig.slots_in(State.DOOMED) == 2
    again, _ = rig.reserve(run(A, 2))
    assert not set(again.slots) & set(grant.slots), "the other rank may still be writing those"
    rig.fill(grant, rank=1)
    assert (rig.slots_in(State.READY), rig.slots_in(State.DOOMED)) == (2, 0)


def test_reports_that_cannot_be_are_bugs() -> None:
    rig = Rig(8, ranks=2)
    grant, _ = rig.reserve(run(A))
    rig.fill(grant, rank=0)
    wrong = [
        BlocksFilled(grant.job, 0, grant.slots, ()),
        BlocksFilled(grant.job, 2, grant.slots, ()),
        BlocksFilled(99, 0, (), ()),
        BlocksFilled(grant.job, 1, grant.slots[:3], ()),
        BlocksFilled(grant.job, 1, grant.slots, grant.slots[:1]),
    ]
    for message in wrong[:3]:
        with pytest.raises(InternalError, match="reported"):
            rig.core.handle(message, 0.0)
    for message in wrong[3:]:
        other = Rig(8, ranks=2)
        other.reserve(run(A))
        with pytest.raises(InternalError, match="was granted"):
            other.core.handle(message, 0.0)


def test_a_job_number_is_used_once() -> None:
    rig = Rig(8)
    grant, _ = rig.reserve(run(A))
    with pytest.raises(InternalError, match="twice"):
        rig.core.handle(ReserveSlots(grant.job, (run(B),)), 0.0)


def test_slots_are_usable_when_every_rank_has_them_and_stay_so() -> None:
    rig = Rig(8, ranks=2)
    assert rig.core.statistics().usable == 8
    rig.send(SegmentGrown(0, 3))
    assert rig.core.statistics().usable == 8
    rig.send(SegmentGrown(0, 9))
    with pytest.raises(InternalError, match="segment"):
        rig.core.handle(SegmentGrown(1, 9), 0.0)


def test_without_slots_everything_is_dropped_and_the_grant_is_empty() -> None:
    fresh = Rig(0)
    grant, missing = fresh.reserve(run(A))
    assert (grant.slots, missing, fresh.drops(DropReason.NO_SLOT)) == ((), (), 4)
    assert not fresh.core.open_jobs()


def test_a_reset_dooms_what_is_being_filled() -> None:
    rig = Rig(8)
    rig.save(B)
    grant, _ = rig.reserve(run(A))
    rig.send(ResetCache(1))
    assert (rig.slots_in(State.DOOMED), rig.slots_in(State.FREE), rig.drops(DropReason.RESET)) == (4, 4, 4)
    fresh, _ = rig.reserve(run(A))
    assert not set(fresh.slots) & set(grant.slots)
    rig.fill(grant)
    assert rig.match(A).slots == ()
    rig.fill(fresh)
    assert rig.match(A).slots == fresh.slots
    assert rig.match(A).generation == 1


def test_a_full_cache_goes_on_with_what_is_new() -> None:
    for policy in ("lru", "s3fifo"):
        rig = Rig(8, policy=policy)
        for name in "cdefgh":
            assert len(rig.save(chain(name, 4))) == 4
        assert len(rig.match(chain("h", 4)).slots) == 4
        assert rig.core.statistics().evictions == 16
