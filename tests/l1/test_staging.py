"""L1 off: slots are lent to what is on its way to or from nodes, and free again with the last that needs them."""

from __future__ import annotations

import pytest
from tests.l1.remote_rig import RemoteRig
from tests.l1.rig import chain

from kvoffload.errors import ConfigError
from kvoffload.l1 import L1Config, L1Core, State
from kvoffload.l1.remote import ON_NODES_S
from kvoffload.messages import DropReason, ForgetRequest, HitReason, NodesChanged, RankLost, ResetCache

A, B = chain("a", 6), chain("b", 6)


def rig(slots: int = 32, **remote: object) -> RemoteRig:
    return RemoteRig(slots, remote=remote, keeps=False)


def all_free(which: RemoteRig) -> bool:
    return which.slots_in(State.FREE) == which.statistics().usable


@pytest.mark.parametrize("ingestion", ["all", "hot", "evicted"])
def test_what_is_saved_is_written_whatever_the_ingestion_and_its_slots_are_free_then(ingestion: str) -> None:
    only = rig(ingestion=ingestion)
    grant = only.reserve(A)
    assert (len(grant.slots), only.slots_in(State.STAGING)) == (6, 6)
    only.fill(grant)
    assert only.written() == set(A)
    assert only.slots_in(State.CONDEMNED) == 6
    assert only.statistics().committed == 6
    only.finish_writes(failed=A[:1])
    assert all_free(only)
    assert (only.remote.totals.written, only.remote.totals.write_failed) == (5, 1)


def test_a_run_needs_no_parent() -> None:
    only = rig()
    assert len(only.save(A, start=3)) == 3
    assert only.written() == set(A[3:])
    assert not only.missing


def test_what_a_node_has_or_is_being_sent_is_not_written_again_until_that_is_long_ago_or_was_wrong() -> None:
    only = rig()
    only.save(A)
    assert not only.save(A), "on its way"
    only.finish_writes(failed=A[1:2])
    assert len(only.save(A)) == 1, "the one that failed"
    only.finish_writes()
    assert only.statistics().shared == 11
    only.ask(A)
    only.answer_finds(lambda key: key != A[4])
    only.finish_fetches()
    only.send(ForgetRequest("r"))
    assert len(only.save(A)) == 1, "the one that its node has lost"
    only.finish_writes()
    only.advance(ON_NODES_S + 1)
    assert len(only.save(A)) == 6
    only.finish_writes()
    assert all_free(only)


def test_what_failed_to_be_copied_or_finds_no_writer_is_freed_and_may_be_saved_again() -> None:
    only = rig(write_queue_blocks=1)
    grant = only.reserve(A)
    only.fill(grant, 0, 5)
    assert only.slots_in(State.FREE) == 32 - 3, "each node takes one"
    assert only.statistics().drops == {DropReason.COPY_FAILED: 2}
    assert only.remote.totals.write_dropped == 1
    only.finish_writes()
    assert len(only.save(A)) == 3
    only.finish_writes()
    assert all_free(only)


def test_saves_leave_slots_to_loads() -> None:
    only = rig(12, max_writing_share=0.5)
    only.save(A)
    only.finish_writes()
    assert len(only.save(chain("long", 20))) == 6
    assert only.statistics().drops == {DropReason.NO_SLOT: 14}
    assert not only.save(chain("more", 2)), "there is no room until something was written"
    only.ask(B)
    only.answer_finds()
    only.finish_fetches()
    assert len(only.hits[-1].slots) == 6


def test_what_was_fetched_is_kept_by_its_readers_alone() -> None:
    only = rig()
    hit = only.put(A, "first")
    assert len(hit.slots) == 6
    assert only.match(A, "second").slots == hit.slots, "shared while it is there"
    job = only.load(hit)
    only.send(ForgetRequest("first"))
    only.send(ForgetRequest("second"))
    assert only.slots_in(State.READY) == 6
    only.loaded(job)
    assert all_free(only)
    only.ask(A)
    assert only.finds, "from the nodes again"


def test_of_a_load_that_takes_less_the_rest_is_free_at_once() -> None:
    only = rig()
    hit = only.put(A + chain("a", 8)[6:])
    assert len(hit.slots) == 8
    only.ask(A[:3], "other")
    only.send(ForgetRequest("r"))
    assert only.slots_in(State.READY) == 3


def test_who_waits_shares_what_is_being_fetched_and_what_comes_too_late_is_free_at_once() -> None:
    only = rig()
    only.ask(A, "first", wait_s=1.0)
    only.answer_finds()
    only.ask(A, "second", wait_s=3.0)
    assert not only.finds
    only.advance(1.5)
    assert [(hit.request, hit.reason) for hit in only.hits] == [("first", HitReason.MISS)]
    only.finish_fetches("n0")
    only.finish_fetches("n1")
    only.advance(2.0)
    assert len(only.hits[-1].slots) == 2, "what was there at the deadline"
    only.finish_fetches("n2")
    assert only.slots_in(State.READY) == 2
    only.send(ForgetRequest("second"))
    assert all_free(only)


def test_what_fails_to_load_or_to_come_leaves_nothing() -> None:
    only = rig()
    job = only.load(only.put(A))
    only.fail_load(job)
    assert all_free(only)
    only.now += 60
    only.ask(A)
    only.answer_finds()
    only.finish_fetches(failed=A[2:3])
    assert len(only.hits[-1].slots) == 2
    only.send(ForgetRequest("r"))
    assert all_free(only)


def test_a_reset_ends_it_all() -> None:
    only = rig()
    grant = only.reserve(A)
    only.put(B, "b")
    only.send(ResetCache(1))
    assert only.statistics().drops == {DropReason.RESET: 6}
    only.fill(grant)
    assert all_free(only)
    assert not only.save(A)
    assert only.statistics().drops[DropReason.OFF] == 6
    assert only.match(B, "b").reason == HitReason.MISS


def test_slots_of_a_lost_rank_stay_out_of_use_until_it_is_gone() -> None:
    only = rig()
    only.reserve(A)
    only.put(B)
    only.send(RankLost(0, "test"))
    assert only.slots_in(State.QUARANTINED) == 6
    only.core.rank_gone(0)
    only.send(ForgetRequest("r"))
    assert all_free(only)


def test_without_nodes_there_is_nothing_to_save_to() -> None:
    only = RemoteRig(8, keeps=False)
    only.core._parts.remote.ring = None  # type: ignore[union-attr]
    assert not only.save(A)
    only.send(NodesChanged(rig().core._parts.remote.ring))  # type: ignore[union-attr, arg-type]
    assert only.save(A)


def test_keeping_nothing_without_a_second_tier_is_refused() -> None:
    with pytest.raises(ConfigError, match="no second tier"):
        L1Core(L1Config(keeps=False), 8)
