"""Matches that nodes can make longer: who is asked, what is fetched, who waits for it and how long."""

from __future__ import annotations

from typing import Any

import pytest
from tests.l1.remote_rig import TOKENS, Judge, RemoteRig, TestRing
from tests.l1.rig import chain

from kvoffload.errors import InternalError
from kvoffload.l1 import L1Config, L1Core, RemoteConfig, State
from kvoffload.messages import (
    BlocksFound,
    DropReason,
    ForgetRequest,
    HitReason,
    LoadOutcome,
    MatchPrefix,
    NodesChanged,
    RankLost,
    ReleaseHit,
    ResetCache,
)

A, B = chain("a", 6), chain("b", 6)


def test_what_the_nodes_have_is_fetched_and_then_a_hit() -> None:
    rig = RemoteRig(16)
    rig.ask(A)
    assert [(node, find.keys) for node, find in rig.finds] == [("n0", A[0::3]), ("n1", A[1::3]), ("n2", A[2::3])]
    assert {find.deadline for _, find in rig.finds} == {6.0}
    rig.answer_finds()
    assert [(node, fetch.keys) for node, fetch in rig.fetches] == [("n0", A[0::3]), ("n1", A[1::3]), ("n2", A[2::3])]
    assert not rig.hits
    rig.finish_fetches("n2")
    rig.finish_fetches("n0")
    assert not rig.hits, "the blocks of n1 are between"
    assert rig.slots_in(State.FILLED) == 3
    rig.finish_fetches("n1")
    (hit,) = rig.hits
    assert (hit.reason, len(hit.slots), hit.pending, hit.request) == (HitReason.HIT, 6, 0, "r")
    assert rig.statistics().protected == 6
    totals = rig.remote.totals
    assert (totals.lookups, totals.asked, totals.found, totals.fetched) == (1, 6, 6, 6)
    assert (totals.hits, totals.hit_blocks, totals.hit_tokens) == (1, 6, 6 * TOKENS)
    assert rig.match(A, "other").slots == hit.slots
    assert not rig.finds, "L1 has it now"
    assert rig.statistics().committed == 0, "nothing was saved"


def test_the_hit_ends_where_the_nodes_have_a_hole_and_nothing_behind_it_is_fetched() -> None:
    rig = RemoteRig(16)
    rig.ask(A)
    rig.answer_finds(lambda key: key != A[4], node="n1")
    assert not rig.fetches, "n0 might lack an earlier one"
    rig.answer_finds(node="n0")
    rig.answer_finds(node="n2")
    assert sorted(key for _, fetch in rig.fetches for key in fetch.keys) == sorted(A[:4])
    rig.finish_fetches()
    assert len(rig.hits[0].slots) == 4


def test_nobody_waits_for_a_node_behind_the_first_hole() -> None:
    rig = RemoteRig(16)
    rig.ask(A)
    rig.answer_finds(lambda key: False, node="n0")
    assert rig.hits[0].reason == HitReason.MISS
    rig.answer_finds(node="n1")
    assert (len(rig.hits), rig.fetches) == (1, []), "too late, and of no use"


def test_a_node_that_could_not_be_asked_has_nothing() -> None:
    rig = RemoteRig(16)
    rig.ask(A)
    node, find = rig.finds.pop(1)
    rig.send(BlocksFound(find.batch, node, ()))
    rig.answer_finds()
    assert sum(len(fetch.keys) for _, fetch in rig.fetches) == 1


def test_the_ready_part_is_leased_while_the_rest_is_looked_for() -> None:
    rig = RemoteRig(12)
    slots = rig.save(A[:3])
    rig.finish_writes()
    rig.ask(A)
    assert [find.keys for _, find in rig.finds] == [A[3:4], A[4:5], A[5:6]]
    assert (rig.statistics().protected, rig.statistics().leases) == (3, 1)
    rig.save(chain("c", 9))
    rig.finish_writes()
    rig.save(chain("d", 9))
    rig.finish_writes()
    assert rig.slots_in(State.READY) == 12
    rig.answer_finds()
    rig.finish_fetches()
    assert rig.hits[0].slots[:3] == slots
    assert len(rig.hits[0].slots) == 6
    assert rig.remote.totals.hit_blocks == 3


@pytest.mark.parametrize(
    ("keys", "how"),
    [
        (A[:1], {}),
        (A, {"local": 5}),
        (A, {"wait_s": 0.0}),
    ],
    ids=["too short", "the engine has most of it", "the deadline is now"],
)
def test_nodes_are_not_asked_for_what_is_not_worth_it(keys: tuple[bytes, ...], how: dict[str, Any]) -> None:
    rig = RemoteRig(16, remote={"min_tokens": 2 * TOKENS})
    assert rig.match(keys, **how).reason == HitReason.MISS
    assert not rig.finds


def test_a_chain_is_searched_up_to_the_first_block_without_a_node() -> None:
    rig = RemoteRig(16, TestRing(homeless=frozenset({A[2]})))
    rig.ask(A)
    assert [find.keys for _, find in rig.finds] == [A[:1], A[1:2]]
    none = RemoteRig(16, TestRing(names=()))
    assert none.match(A).reason == HitReason.MISS


def test_without_a_table_of_nodes_nothing_waits() -> None:
    core = L1Core(L1Config(), 16, RemoteConfig(min_tokens=0))
    assert len(core.handle(MatchPrefix("r", 1, A, 6.0, 0, 0.0, TOKENS), 5.0)) == 1
    assert core.next_deadline() is None


def test_at_the_deadline_the_answer_is_what_is_ready_and_the_fetch_goes_on() -> None:
    rig = RemoteRig(16)
    rig.ask(A)
    rig.answer_finds()
    rig.finish_fetches("n0")
    rig.advance(0.999)
    assert not rig.hits
    assert rig.core.next_deadline() == 6.0
    rig.advance(0.001)
    assert (len(rig.hits[0].slots), rig.hits[0].pending) == (1, 5)
    assert rig.core.next_deadline() is None
    rig.finish_fetches()
    assert len(rig.hits) == 1, "one answer to one question"
    assert len(rig.match(A, "later").slots) == 6
    assert rig.remote.totals.late == 1


def test_a_node_that_does_not_answer_costs_the_deadline_and_no_more() -> None:
    rig = RemoteRig(16)
    rig.save(A[:1])
    rig.ask(A)
    rig.answer_finds(node="n0")
    rig.answer_finds(node="n2")
    rig.advance(1.0)
    assert (len(rig.hits), len(rig.hits[0].slots)) == (1, 1)
    rig.answer_finds()
    assert (len(rig.hits), rig.fetches) == (1, [])


def test_two_requests_share_one_fetch_and_each_waits_by_its_own_deadline() -> None:
    rig = RemoteRig(16)
    rig.ask(A, "leader", wait_s=1.0)
    rig.answer_finds()
    rig.ask(A, "patient", wait_s=9.0)
    rig.ask(A, "hasty", wait_s=0.1)
    assert not rig.finds, "all of it is on its way"
    rig.advance(0.1)
    assert [hit.request for hit in rig.hits] == ["hasty"]
    rig.advance(0.9)
    assert [hit.request for hit in rig.hits] == ["hasty", "leader"]
    rig.finish_fetches()
    assert [(hit.request, len(hit.slots)) for hit in rig.hits[2:]] == [("patient", 6)]
    assert rig.remote.totals.fetched == 6


def test_two_requests_that_ask_at_once_fetch_what_they_share_once_and_each_the_rest() -> None:
    rig = RemoteRig(32)
    mine, yours = (*A[:3], *B[3:]), A
    rig.ask(mine, "x")
    rig.ask(yours, "y")
    rig.answer_finds()
    assert sorted(key for _, fetch in rig.fetches for key in fetch.keys) == sorted({*mine, *yours})
    rig.finish_fetches()
    assert sorted((hit.request, len(hit.slots)) for hit in rig.hits) == [("x", 6), ("y", 6)]


@pytest.mark.parametrize("leave", ["forget", "newer", "release"])
def test_a_fetch_goes_on_when_its_leader_goes_away(leave: str) -> None:
    rig = RemoteRig(16)
    rig.ask(A, "leader")
    first = rig.sequence
    rig.answer_finds()
    rig.ask(A, "follower")
    if leave == "forget":
        rig.send(ForgetRequest("leader"))
    elif leave == "release":
        rig.send(ReleaseHit("leader", first))
    else:
        rig.ask(B[:1], "leader", wait_s=0.0)
        assert rig.hits.pop().sequence == rig.sequence
    rig.finish_fetches()
    assert [hit.request for hit in rig.hits] == ["follower"]
    rig.send(ForgetRequest("follower"))
    assert rig.statistics().protected == 0


def test_a_request_that_forgot_its_question_is_not_answered() -> None:
    rig = RemoteRig(16)
    rig.save(A[:1])
    rig.ask(A)
    rig.send(ForgetRequest("r"))
    rig.answer_finds()
    rig.advance(2.0)
    assert (rig.hits, rig.fetches, rig.statistics().protected) == ([], [], 0)


def test_an_older_question_than_the_one_that_waits_is_a_bug() -> None:
    rig = RemoteRig(16)
    rig.ask(A)
    with pytest.raises(InternalError, match="asked for match"):
        rig.core.handle(MatchPrefix("r", rig.sequence, A, 9.0), 5.0)


def test_what_a_save_fills_is_not_waited_for() -> None:
    rig = RemoteRig(16)
    grant = rig.reserve(A)
    assert (rig.match(A).pending, rig.finds) == (6, [])
    rig.fill(grant)


def test_what_is_behind_a_save_is_fetched_and_ready_when_both_are_done() -> None:
    rig = RemoteRig(16)
    grant = rig.reserve(A[:2])
    rig.ask(A)
    rig.answer_finds()
    rig.finish_fetches()
    assert rig.slots_in(State.FILLED) == 4
    assert rig.hits[0].pending == 6, "the save is not waited for"
    rig.fill(grant)
    assert len(rig.match(A).slots) == 6
    assert (rig.statistics().committed, len(rig.written())) == (2, 2), "what came from nodes was neither saved nor is it written"


def test_a_save_may_follow_what_is_being_fetched() -> None:
    rig = RemoteRig(16)
    rig.ask(A[:4])
    rig.answer_finds()
    grant = rig.reserve(A)
    assert len(grant.slots) == 2
    rig.fill(grant)
    rig.finish_fetches()
    assert len(rig.match(A).slots) == 6
    assert rig.statistics().committed == 2
    assert rig.written() == set(A[4:])


def test_blocks_that_the_engine_has_and_l1_lacks_are_fetched_too_and_count_as_cost_only() -> None:
    judge = Judge()
    rig = RemoteRig(16, remote={"load_or_compute": judge, "block_bytes": 1000})
    rig.save(A[:1])
    rig.ask(A, local=4, speed=123.0)
    rig.answer_finds()
    assert judge.asked == [(2 * TOKENS, 123.0, {"n1": 2, "n2": 2, "n0": 1}, 1000)]
    rig.finish_fetches(seconds=0.25)
    assert len(rig.hits[0].slots) == 6
    assert sorted(judge.observed) == [("n0", 1, 1000, 0.25), ("n1", 2, 2000, 0.25), ("n2", 2, 2000, 0.25)]
    assert (rig.remote.totals.hit_blocks, rig.remote.totals.hit_tokens) == (5, 2 * TOKENS)


def test_what_is_faster_computed_is_not_loaded() -> None:
    rig = RemoteRig(16, remote={"load_or_compute": Judge(answer=False)})
    rig.ask(A)
    rig.answer_finds()
    assert (rig.hits[0].reason, rig.fetches, rig.remote.totals.skipped) == (HitReason.MISS, [], 6)


def test_too_little_found_is_not_loaded() -> None:
    rig = RemoteRig(16, remote={"min_tokens": 3 * TOKENS})
    rig.ask(A)
    rig.answer_finds(lambda key: key in A[:2])
    assert (rig.hits[0].reason, rig.fetches) == (HitReason.MISS, [])


def test_leases_and_fetches_hold_at_most_their_share() -> None:
    rig = RemoteRig(8, max_waiting_share=0.5)
    rig.ask(A, "x")
    rig.answer_finds()
    assert sum(len(fetch.keys) for _, fetch in rig.fetches) == 4
    rig.ask(B, "y")
    rig.answer_finds()
    assert rig.hits.pop().reason == HitReason.NO_ROOM
    rig.save(chain("c", 2))
    full = rig.match(chain("c", 2), "z")
    assert (full.reason, full.slots) == (HitReason.NO_ROOM, ()), "the fetch has all the room"
    rig.finish_fetches()
    assert (rig.hits[-1].reason, len(rig.hits[-1].slots)) == (HitReason.NO_ROOM, 4)
    rig.send(ForgetRequest("x"))
    assert rig.match(chain("c", 2), "z").reason == HitReason.HIT


def test_nobody_takes_the_room_of_what_came_while_the_rest_is_on_its_way() -> None:
    rig = RemoteRig(12)
    rig.save(B[:1])
    rig.finish_writes()
    rig.ask(A)
    rig.answer_finds()
    rig.finish_fetches("n0")
    assert (rig.slots_in(State.FILLED), rig.statistics().protected, rig.remote.fetching) == (1, 1, 4)
    assert rig.match(B[:1], "other").reason == HitReason.NO_ROOM
    rig.finish_fetches()
    assert (rig.hits[-1].reason, len(rig.hits[-1].slots)) == (HitReason.HIT, 6)


def test_a_reset_drops_who_waits_and_l2_is_not_used_again() -> None:
    rig = RemoteRig(16)
    rig.save(B[:2])
    rig.ask(A, "fetching")
    rig.answer_finds()
    rig.ask(B, "asking")
    rig.send(ResetCache(3))
    assert (rig.hits, rig.statistics().protected, rig.core.next_deadline()) == ([], 0, None)
    assert rig.slots_in(State.DOOMED) == 6
    assert rig.statistics().drops[DropReason.RESET] == 0, "nothing that was being saved was lost"
    rig.answer_finds()
    before = rig.save(chain("c", 6))
    assert rig.slots_in(State.DOOMED) == 6, "the nodes may still write there"
    rig.finish_fetches()
    assert rig.slots_in(State.DOOMED) == 0
    rig.finish_writes()
    assert rig.match(A).reason == HitReason.MISS
    assert rig.match(chain("c", 6)).slots == before
    assert (rig.finds, rig.writes, rig.remote.totals.resets) == ([], [], 1)
    assert "generation 3" in (rig.statistics().remote_off_reason or "")
    rig.send(NodesChanged(TestRing(version=2)))
    assert rig.match(A).reason == HitReason.MISS
    assert not rig.finds


@pytest.mark.parametrize("how", ["closed", "rank lost"])
def test_who_waits_when_l1_goes_off_is_told_so_and_what_is_under_way_ends(how: str) -> None:
    rig = RemoteRig(16)
    rig.save(B[:2])
    rig.ask(A, "fetching")
    rig.answer_finds()
    rig.ask(B, "asking")
    if how == "closed":
        rig.close()
    else:
        rig.send(RankLost(0, "test"))
    assert sorted((hit.request, hit.reason) for hit in rig.hits) == [("asking", HitReason.OFF), ("fetching", HitReason.OFF)]
    assert rig.statistics().protected == 0
    rig.answer_finds()
    rig.finish_fetches()
    rig.finish_writes()
    rig.advance(10.0)
    assert (len(rig.hits), rig.slots_in(State.READY), rig.core.open_jobs()) == (2, 8, frozenset())


def test_a_load_that_failed_while_others_wait_for_more_of_it() -> None:
    rig = RemoteRig(32)
    rig.save(A[:2])
    job = rig.load(rig.match(A[:2], "loading"))
    rig.ask(A, "waiting")
    rig.answer_finds()
    rig.loaded(job, LoadOutcome.FAILED)
    assert rig.slots_in(State.DOOMED) == 4
    rig.finish_fetches()
    assert (rig.hits[-1].request, rig.hits[-1].reason) == ("waiting", HitReason.MISS)
    rig.finish_writes()
    assert rig.slots_in(State.FREE) == 32


def test_an_answer_that_nobody_asked_for_is_a_bug() -> None:
    rig = RemoteRig(16)
    rig.ask(A)
    node, find = rig.finds[0]
    for wrong in (BlocksFound(99, node, ()), BlocksFound(find.batch, "n1", ()), BlocksFound(find.batch, node, (True,))):
        other = RemoteRig(16)
        other.ask(A)
        with pytest.raises(InternalError, match="question"):
            other.core.handle(wrong, 5.0)
    with pytest.raises(InternalError, match="no second tier"):
        L1Core(L1Config(), 8).handle(BlocksFound(1, "n0", ()), 5.0)
