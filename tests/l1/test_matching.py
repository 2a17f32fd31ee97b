"""Matches, leases, loads; and what happens to them on reset, failure and the loss of a rank."""

from __future__ import annotations

import pytest
from tests.l1.rig import Rig, chain, run

from kvoffload.errors import InternalError
from kvoffload.l1 import State
from kvoffload.messages import (
    DropReason,
    ForgetRequest,
    HitReason,
    LoadFinished,
    LoadOutcome,
    MatchPrefix,
    RankLost,
    ReleaseHit,
    ResetCache,
    StartLoad,
)

A, B, C = chain("a", 4), chain("b", 4), chain("c", 4)


def loaded(rig: Rig, job: int, outcome: LoadOutcome = LoadOutcome.LOADED, rank: int = 0) -> None:
    rig.send(LoadFinished(job, rank, outcome))


@pytest.mark.parametrize("saved", range(8))
@pytest.mark.parametrize("asked", range(8))
def test_the_hit_is_the_longest_common_prefix(saved: int, asked: int) -> None:
    keys = chain("k", 8)
    rig = Rig(16, max_waiting_share=1.0)
    rig.save(keys[:saved])
    hit = rig.match(keys[:asked])
    assert len(hit.slots) == min(saved, asked)
    assert hit.reason == (HitReason.HIT if hit.slots else HitReason.MISS)
    assert hit.expires == 5.0 + 10.0


def test_a_lease_keeps_its_blocks_from_eviction_until_it_is_released() -> None:
    rig = Rig(8)
    slots = rig.save(A)
    hit = rig.match(A)
    for name in "cde":
        rig.save(chain(name, 4))
    assert rig.match(A, "other").slots == slots
    rig.send(ReleaseHit("r", hit.sequence))
    rig.send(ForgetRequest("other"))
    assert rig.core.statistics().protected == 0
    for name in "fghij":
        rig.save(chain(name, 8))
    assert rig.match(A).slots == ()


def test_a_newer_match_takes_the_place_of_the_older_and_an_older_release_is_void() -> None:
    rig = Rig(16)
    rig.save(A)
    rig.save(B)
    old = rig.match(A)
    rig.match(B)
    assert rig.core.statistics().protected == 4
    rig.send(ReleaseHit("r", old.sequence))
    assert rig.core.statistics().leases == 1
    with pytest.raises(InternalError, match="asked for match"):
        rig.core.handle(MatchPrefix("r", old.sequence, A, 0.0), 0.0)


def test_a_request_may_ask_again_after_it_was_forgotten() -> None:
    rig = Rig(16)
    rig.save(A)
    rig.match(A)
    rig.send(ForgetRequest("r"))
    rig.sequence = 0
    assert len(rig.match(A).slots) == 4


def test_waiting_requests_protect_at_most_their_share() -> None:
    rig = Rig(12, max_waiting_share=0.5)
    rig.save(A)
    rig.save(B)
    rig.save(C)
    assert rig.match(A, "x").reason == HitReason.HIT
    short = rig.match(B, "y")
    assert (short.reason, len(short.slots)) == (HitReason.NO_ROOM, 2), "as much as there is room for"
    assert rig.core.statistics().protected == 6
    assert rig.match(A[:3], "z").reason == HitReason.HIT, "what is protected already costs nothing"
    assert rig.match(B[:2], "u").reason == HitReason.HIT
    none = rig.match(C, "w")
    assert (none.reason, none.slots) == (HitReason.NO_ROOM, ())
    rig.send(ForgetRequest("u"))
    rig.send(ForgetRequest("x"))
    rig.send(ForgetRequest("z"))
    assert rig.match(B, "y").reason == HitReason.HIT


def test_a_load_takes_the_pin_over_for_what_it_reads() -> None:
    rig = Rig(16)
    rig.save(A)
    hit = rig.match(A)
    rig.send(StartLoad(100, "r", hit.sequence, 1, 2))
    rig.send(ForgetRequest("r"))
    assert (rig.core.statistics().leases, rig.core.statistics().protected) == (0, 3)
    assert rig.core.open_jobs() == {100}
    loaded(rig, 100)
    assert rig.core.statistics().protected == 0


def test_a_load_of_nothing_releases_the_hit() -> None:
    rig = Rig(16)
    rig.save(A)
    rig.send(StartLoad(100, "r", rig.match(A).sequence, 2, 0))
    assert (rig.core.statistics().protected, rig.core.open_jobs()) == (0, frozenset())


def test_a_load_ends_with_the_last_rank() -> None:
    rig = Rig(16, ranks=2)
    rig.save(A)
    rig.send(StartLoad(100, "r", rig.match(A).sequence, 0, 4))
    loaded(rig, 100, rank=1)
    assert rig.core.statistics().protected == 4
    loaded(rig, 100, rank=0)
    assert rig.core.statistics().protected == 0
    with pytest.raises(InternalError, match="unknown"):
        rig.core.handle(LoadFinished(100, 0, LoadOutcome.LOADED), 0.0)


def test_a_load_longer_than_its_hit_is_a_bug() -> None:
    rig = Rig(16)
    rig.save(A)
    hit = rig.match(A)
    with pytest.raises(InternalError, match="loads 5 blocks"):
        rig.core.handle(StartLoad(100, "r", hit.sequence, 2, 3), 0.0)


def test_a_load_of_a_hit_that_is_gone_is_harmless() -> None:
    rig = Rig(16)
    rig.save(A)
    hit = rig.match(A)
    rig.send(ResetCache(1))
    rig.send(StartLoad(100, "r", hit.sequence, 0, 4))
    assert not rig.core.open_jobs()
    loaded(rig, 100, LoadOutcome.WITHDRAWN)
    with pytest.raises(InternalError, match="unknown"):
        rig.core.handle(LoadFinished(100, 0, LoadOutcome.WITHDRAWN), 0.0)


def test_what_failed_to_load_is_not_offered_again_nor_what_follows_it() -> None:
    rig = Rig(16, ranks=2)
    rig.save(A)
    waiting, _ = rig.reserve(run((*A, *B[:1]), 4))
    rig.send(StartLoad(100, "r", rig.match(A).sequence, 1, 2))
    loaded(rig, 100, LoadOutcome.FAILED, rank=1)
    assert len(rig.match(A, "x").slots) == 1
    assert (rig.slots_in(State.CONDEMNED), rig.slots_in(State.DOOMED)) == (2, 1)
    assert rig.drops(DropReason.PARENT_FAILED) == 1
    again = rig.save(A)
    loaded(rig, 100, LoadOutcome.FAILED, rank=0)
    assert rig.slots_in(State.CONDEMNED) == 0
    assert rig.match(A, "x").slots[1:] == again, "what was saved since is another copy"
    for rank in range(2):
        rig.fill(waiting, rank=rank)
    assert rig.slots_in(State.DOOMED) == 0


def test_a_withdrawn_load_keeps_its_slots() -> None:
    rig = Rig(16)
    slots = rig.save(A)
    rig.send(StartLoad(100, "r", rig.match(A).sequence, 0, 4))
    loaded(rig, 100, LoadOutcome.WITHDRAWN)
    assert rig.match(A).slots == slots


def test_a_reset_ends_leases_and_keeps_what_a_load_reads() -> None:
    rig = Rig(16)
    slots = rig.save(A)
    rig.save((*A[:2], *B[:2]))
    rig.save(chain("c", 4))
    rig.match(chain("c", 4), "waiting")
    rig.send(StartLoad(100, "r", rig.match(A).sequence, 1, 2))
    rig.send(ResetCache(7))
    assert (rig.slots_in(State.CONDEMNED), rig.slots_in(State.FREE), rig.core.statistics().leases) == (3, 13, 0)
    assert not rig.match(A).slots
    for name in "defg":
        assert not set(rig.save(chain(name, 4))) & set(slots[:3]), "a load still reads these"
    loaded(rig, 100)
    assert rig.slots_in(State.CONDEMNED) == 0


def test_two_loads_of_a_condemned_chain_free_it_children_first() -> None:
    rig = Rig(16)
    rig.save(A)
    rig.send(StartLoad(100, "x", rig.match(A, "x").sequence, 0, 4))
    rig.send(StartLoad(101, "y", rig.match(A, "y").sequence, 0, 2))
    rig.send(ResetCache(1))
    loaded(rig, 100)
    assert rig.slots_in(State.CONDEMNED) == 2
    loaded(rig, 101)
    assert rig.slots_in(State.FREE) == 16


def test_a_lost_rank_turns_l1_off_and_keeps_its_slots_until_it_is_gone() -> None:
    rig = Rig(16, ranks=2)
    rig.save(A)
    rig.send(StartLoad(100, "r", rig.match(A).sequence, 0, 4))
    grant, _ = rig.reserve(run(B))
    child, _ = rig.reserve(run((*B, *chain("c", 1)), 4))
    rig.fill(grant, rank=1)
    rig.fill(child, rank=1)
    rig.send(RankLost(1, "test"))
    assert rig.slots_in(State.QUARANTINED) == 0, "it had reported all it had"
    rig.send(RankLost(0, "test"))
    assert rig.slots_in(State.QUARANTINED) == 5
    assert rig.match(A, "x").reason == HitReason.OFF
    rig.core.rank_gone(0)
    rig.core.check()
    assert rig.slots_in(State.QUARANTINED) == 0
    assert rig.core.statistics().protected == 4, "rank 1 has not reported the load"
    rig.core.rank_gone(1)
    rig.core.check()
    assert (rig.slots_in(State.FREE), rig.core.open_jobs()) == (12, frozenset())


def test_nothing_is_granted_once_a_rank_is_lost_and_a_late_report_counts() -> None:
    rig = Rig(16)
    late, _ = rig.reserve(run(A))
    rig.send(RankLost(0, "test"))
    rig.job += 1
    assert rig.slots_in(State.QUARANTINED) == 4
    rig.fill(late)
    assert rig.slots_in(State.FREE) == 16


def test_a_closed_core_refuses_new_work_and_finishes_the_old() -> None:
    rig = Rig(16)
    grant, _ = rig.reserve(run(A))
    rig.core.close()
    empty, missing = rig.reserve(run(B))
    assert (empty.slots, missing, rig.drops(DropReason.OFF)) == ((), (), 4)
    assert rig.match(A).reason == HitReason.OFF
    rig.fill(grant)
    assert rig.slots_in(State.READY) == 4
