"""What is written to nodes, when, and that its slots are kept until nothing reads them."""

from __future__ import annotations

import pytest
from tests.l1.remote_rig import RemoteRig, TestRing
from tests.l1.rig import chain

from kvoffload.errors import ConfigError, InternalError
from kvoffload.l1 import RemoteConfig, State
from kvoffload.messages import ForgetRequest, LoadOutcome, NodesChanged, ResetCache, WriteFinished

A, B = chain("a", 6), chain("b", 6)
POLICIES = ["lru", "s3fifo"]


def test_all_that_is_committed_is_written_a_batch_per_node() -> None:
    rig = RemoteRig(16)
    slots = rig.save(A)
    assert [(node, write.keys, write.slots) for node, write in rig.writes] == [
        ("n0", A[0::3], slots[0::3]),
        ("n1", A[1::3], slots[1::3]),
        ("n2", A[2::3], slots[2::3]),
    ]
    assert rig.core.open_writes() == rig.core.open_jobs() == {-write.batch for _, write in rig.writes}
    rig.finish_writes()
    assert (rig.remote.totals.offered, rig.remote.totals.written, rig.remote.writing) == (6, 6, 0)
    assert not rig.core.open_jobs()
    assert rig.match(A).slots == slots
    rig.save(A)
    assert not rig.writes, "once"


def test_every_block_that_comes_into_a_full_cache_is_written_whatever_its_slot_held_before() -> None:
    rig = RemoteRig(6, max_waiting_share=1.0)
    rig.put(A)
    rig.send(ForgetRequest("r"))
    for name in "cde":
        rig.save(chain(name, 6))
        assert rig.written() == set(chain(name, 6))
        rig.finish_writes()


def test_a_block_is_written_when_it_is_ready_and_not_before() -> None:
    rig = RemoteRig(16)
    parent = rig.reserve(A[:2])
    child = rig.reserve(A, 2)
    rig.fill(child)
    assert not rig.writes
    rig.fill(parent, 1)
    assert rig.written() == set(A[:1]), "what fell is not written"


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_being_written_is_not_evicted(policy: str) -> None:
    rig = RemoteRig(12, policy=policy)
    slots = rig.save(A)
    rig.finish_writes("n1")
    kept = {slot for _, write in rig.writes for slot in write.slots}
    for name in "cdefgh":
        assert not kept & set(rig.save(chain(name, 6))), "a writer still reads these"
        held, rig.writes = rig.writes, []
        rig.writes = [entry for entry in held if not set(entry[1].keys) & set(A)]
        rig.finish_writes()
        rig.writes = [entry for entry in held if set(entry[1].keys) & set(A)]
    assert rig.match(A[:5]).slots == slots[:5], "no hole in the prefix either: the parents of what is written stay"
    rig.send(ForgetRequest("r"))
    rig.finish_writes()
    assert len(rig.save(chain("i", 12))) == 12, "now they may go like any other"


def test_a_late_reader_keeps_its_slot_until_it_says_that_it_is_done() -> None:
    """A write that was given up on, and whose bytes may still be on their way out of the slot."""
    rig = RemoteRig(6)
    slots = rig.save(A)
    ((_, write),) = [entry for entry in rig.writes if entry[0] == "n2"]
    late = write.slots[-1]
    rig.finish_writes(unsettled=A[5:])
    assert rig.core.unsettled_jobs() == {-write.batch}
    assert late == slots[5]
    for name in "cdef":
        assert late not in rig.save(chain(name, 6)), "the late reader would have sent this block's bytes as its own"
        rig.finish_writes()
    rig.send(ResetCache(1))
    assert rig.slots_in(State.CONDEMNED) == 1
    assert late not in rig.save(chain("g", 6))
    rig.settle(write.batch, "n2", late)
    assert rig.slots_in(State.CONDEMNED) == 0
    assert late in rig.save(chain("h", 6))


def test_a_reset_keeps_what_is_being_written_until_that_ends() -> None:
    rig = RemoteRig(12)
    rig.save(A)
    job = rig.load(rig.match(A[:2]))
    rig.send(ResetCache(1))
    assert rig.slots_in(State.CONDEMNED) == 6
    rig.finish_writes("n0")
    assert rig.slots_in(State.CONDEMNED) == 5, "block 0 is still being loaded"
    rig.loaded(job)
    assert rig.slots_in(State.CONDEMNED) == 4
    rig.finish_writes()
    assert rig.slots_in(State.FREE) == 12


def test_what_failed_to_load_while_it_is_written_is_freed_after_both() -> None:
    rig = RemoteRig(12)
    rig.save(A)
    job = rig.load(rig.match(A[:4]))
    rig.loaded(job, LoadOutcome.FAILED)
    assert rig.slots_in(State.CONDEMNED) == 6
    rig.finish_writes("n2")
    assert rig.slots_in(State.CONDEMNED) == 4
    rig.finish_writes()
    assert rig.slots_in(State.FREE) == 12


def test_too_many_on_their_way_to_a_node_and_the_newest_are_dropped() -> None:
    rig = RemoteRig(32, TestRing(names=("n0",)), {"write_queue_blocks": 4})
    rig.save(A)
    assert (rig.written(), rig.remote.totals.write_dropped) == (set(A[:4]), 2)
    rig.save(B)
    assert rig.remote.totals.write_dropped == 8
    rig.finish_writes()
    rig.save(chain("c", 3))
    assert len(rig.written()) == 3


def test_writes_hold_at_most_their_share_of_l1() -> None:
    rig = RemoteRig(8, remote={"max_writing_share": 0.5})
    rig.save(A)
    assert (len(rig.written()), rig.remote.totals.write_dropped) == (4, 2)


def test_a_block_without_a_node_is_dropped() -> None:
    rig = RemoteRig(8, TestRing(homeless=frozenset({A[1]})))
    rig.save(A)
    assert (rig.written(), rig.remote.totals.write_dropped) == ({A[0], *A[2:]}, 1)


def test_hot_blocks_are_written_at_their_first_hit() -> None:
    rig = RemoteRig(16, remote={"ingestion": "hot"})
    rig.save(A)
    assert not rig.writes
    rig.match(A[:2])
    assert rig.written() == set(A[:2])
    rig.finish_writes()
    rig.match(A[:3])
    assert rig.written() == {A[2]}
    rig.finish_writes(failed=A[2:3])
    assert rig.remote.totals.write_failed == 1
    rig.reserve(A[:5])
    assert rig.written() == set(A[3:5]), "shared by a save; what failed is left alone for a while"
    rig.finish_writes()
    rig.advance(10.0)
    rig.match(A[:5])
    assert rig.written() == {A[2]}
    assert not rig.remote.totals.evicted_unwritten


@pytest.mark.parametrize("policy", POLICIES)
def test_evicted_blocks_are_written_shortly_before_they_leave(policy: str) -> None:
    rig = RemoteRig(100, remote={"ingestion": "evicted"}, policy=policy)
    gone: list[bytes] = []
    for number in range(20):
        rig.save(chain(f"p{number}", 10))
    assert rig.remote.totals.evicted_unwritten > 0, "nothing was written in time before the first evictions"
    before = rig.remote.totals.evicted_unwritten
    for number in range(20, 200):
        assert rig.remote.writing <= 5, "at most 5 % of the slots at a time"
        rig.finish_writes()
        rig.save(chain(f"p{number}", 3))
        gone += [key for _, write in rig.writes for key in write.keys]
    assert len(gone) == len(set(gone)), "each once"
    late = rig.remote.totals.evicted_unwritten - before
    assert rig.remote.totals.written >= 10 * late, f"{late} left before they were written"


def test_a_reservation_that_evicts_nothing_writes_nothing_ahead() -> None:
    rig = RemoteRig(100, remote={"ingestion": "evicted"})
    rig.save(chain("a", 100))
    assert not rig.writes
    rig.save(chain("b", 1))
    assert len(rig.written()) == 5


def test_nothing_is_written_once_closed_and_blocks_stay_where_they_are_when_the_ring_changes() -> None:
    rig = RemoteRig(32)
    rig.save(A)
    rig.finish_writes()
    rig.send(NodesChanged(TestRing(names=("n7",), version=2)))
    assert not rig.writes
    rig.save(B[:2])
    assert [node for node, _ in rig.writes] == ["n7"]
    grant = rig.reserve(chain("c", 3))
    rig.close()
    rig.finish_writes()
    rig.fill(grant)
    assert not rig.writes
    assert rig.slots_in(State.READY) == 11


def test_reports_that_cannot_be_are_bugs() -> None:
    rig = RemoteRig(8)
    rig.save(A[:1])
    ((node, write),) = rig.writes
    for wrong in (WriteFinished(99, node, write.slots, ()), WriteFinished(write.batch, "n2", write.slots, ())):
        with pytest.raises(InternalError, match="not under way"):
            rig.core.handle(wrong, 5.0)
    with pytest.raises(InternalError, match="which is of"):
        rig.core.handle(WriteFinished(write.batch, node, (), ()), 5.0)


@pytest.mark.parametrize("wrong", [{"ingestion": "some"}, {"write_queue_blocks": 0}, {"max_writing_share": 0.0}])
def test_settings_that_cannot_be(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        RemoteConfig(**wrong)  # type: ignore[arg-type]
