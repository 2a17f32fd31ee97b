"""What L1 has and its node lacks is offered again: after a restart, an outage, another table; by and by, and never in others' way."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest
from tests.l1.remote_rig import Judge, RemoteRig, TestRing
from tests.l1.rig import chain, run

from kvoffload.errors import InternalError
from kvoffload.l1 import L1Config, L1Core, RemoteConfig, State
from kvoffload.l1.catching_up import IDLE_S, PACE_S, PAUSE_MOST_S, QUESTION_S
from kvoffload.l1.remote import BATCH
from kvoffload.l2.ring import NodeAddress, RendezvousRing
from kvoffload.messages import (
    BlockKey,
    BlocksFilled,
    BlocksFound,
    ForgetRequest,
    LoadOutcome,
    MatchPrefix,
    NodeBack,
    NodesChanged,
    ReserveSlots,
    ResetCache,
    SegmentGrown,
)

A, B = chain("a", 6), chain("b", 6)
ONE = TestRing(names=("n0",))
RETRY_S = 10.0


class Nodes:
    """What nodes have, by name: they answer what the rig kept for them."""

    def __init__(self, rig: RemoteRig) -> None:
        self.rig = rig
        self.has: dict[str, set[BlockKey]] = {}
        self.asked: list[BlockKey] = []
        self.out: set[str] = set()

    def answer(self) -> None:
        """Everything that they were sent so far."""
        rig = self.rig
        for name in {node for node, _ in (*rig.finds, *rig.writes)}:
            has = self.has.setdefault(name, set())
            if name in self.out:
                for node, find in rig._taken(rig.finds, name):
                    rig.send(BlocksFound(find.batch, node, ()))
                rig.finish_writes(name, failed=sorted(rig.written()))
                continue
            self.asked += [key for node, find in rig.finds if node == name for key in find.keys]
            rig.answer_finds(lambda key, has=has: key in has, name)  # type: ignore[misc]
            has |= {key for node, write in rig.writes if node == name for key in write.keys}
            rig.finish_writes(name)

    def rest(self, seconds: float = 5.0) -> None:
        """Until nothing happens any more, or so long."""
        until = self.rig.now + seconds
        self.answer()
        while (due := self.rig.core.next_deadline()) is not None and due <= until:
            self.rig.advance(max(0.0, due - self.rig.now))
            self.answer()
        self.rig.now = until

    def all(self) -> set[BlockKey]:
        return set().union(*self.has.values())


def caught_up(rig: RemoteRig) -> tuple[int, int, int]:
    totals = rig.remote.totals
    return totals.checked, totals.lacking, totals.offered_again


# ---------------------------------------------------------------- what it begins with


def test_what_a_node_that_was_restarted_has_lost_is_written_to_it_again() -> None:
    rig = RemoteRig(16)
    nodes = Nodes(rig)
    rig.save(A)
    nodes.rest()
    nodes.has["n1"].clear()
    rig.send(NodeBack("n1"))
    nodes.rest()
    assert nodes.all() == set(A)
    assert nodes.asked == list(A[1::3]), "nobody else is asked"
    assert caught_up(rig) == (2, 2, 2)
    assert rig.remote.catching_up == 0
    assert rig.core.next_deadline() is None


def test_what_it_still_has_is_not_written_again() -> None:
    rig = RemoteRig(16, ONE)
    nodes = Nodes(rig)
    rig.save(A)
    nodes.rest()
    nodes.has["n0"] -= {A[2], A[3]}
    rig.send(NodeBack("n0"))
    nodes.rest()
    assert nodes.all() == set(A)
    assert caught_up(rig) == (6, 2, 2)
    assert rig.remote.totals.written == 8


def test_what_was_saved_before_there_were_nodes_is_written_when_there_are() -> None:
    rig = RemoteRig(16, TestRing(names=()))
    core = L1Core(L1Config(), 16, RemoteConfig(min_tokens=1))
    rig.core = core
    rig.send(SegmentGrown(0, 16))
    nodes = Nodes(rig)
    rig.save(A)
    assert not rig.writes
    rig.send(NodesChanged(ONE))
    nodes.rest()
    assert nodes.all() == set(A)


def test_what_a_node_refused_is_offered_again_when_it_is_back() -> None:
    rig = RemoteRig(16, ONE)
    nodes = Nodes(rig)
    nodes.out.add("n0")
    rig.save(A)
    nodes.answer()
    assert rig.remote.totals.write_failed == 6
    nodes.out.clear()
    rig.advance(RETRY_S)
    rig.send(NodeBack("n0"))
    nodes.rest(1.0)
    assert nodes.all() == set(A)


def test_what_failed_is_offered_again_in_a_while_though_nobody_says_that_anything_is_back() -> None:
    rig = RemoteRig(16, ONE)
    nodes = Nodes(rig)
    nodes.out.add("n0")
    rig.save(A)
    nodes.answer()
    nodes.out.clear()
    nodes.rest(RETRY_S - 1)
    assert not nodes.all(), "what failed is left alone for a while"
    nodes.rest(2.0)
    assert nodes.all() == set(A)


def test_what_was_dropped_is_offered_again_in_a_while() -> None:
    rig = RemoteRig(64, ONE, {"write_queue_blocks": 8})
    nodes = Nodes(rig)
    rig.save(chain("c", 40))
    assert rig.remote.totals.write_dropped == 32
    nodes.rest(2 * RETRY_S)
    assert nodes.all() == set(chain("c", 40))
    assert rig.remote.totals.write_dropped == 32, "and none is dropped by that"


def test_another_table_and_what_belongs_to_another_node_now_is_written_there() -> None:
    old, new = (RendezvousRing(len(names), [NodeAddress(name, f"redis://{name}") for name in names]) for names in (("n0",), ("n0", "n1")))
    rig = RemoteRig(64)
    rig.send(NodesChanged(old))
    nodes = Nodes(rig)
    keys = tuple(bytes([at * 6]) * 24 for at in range(40))
    rig.save(keys)
    nodes.rest()
    rig.send(NodesChanged(new))
    nodes.rest()
    moved = {key for key in keys if new.node_of(key) == "n1"}
    assert nodes.has["n1"] == moved
    assert 0 < len(moved) < 40
    assert set(nodes.asked) == moved, "what stays where it was is not asked about"


def test_a_node_at_another_address_begins_empty_handed() -> None:
    class Moved(TestRing):
        __test__ = False

        @property
        def nodes(self) -> tuple[NodeAddress, ...]:
            return tuple(NodeAddress(name, f"redis://{name}" + (":7" if name == "n1" else "")) for name in self.names)

    judge = Judge()
    rig = RemoteRig(16, remote={"load_or_compute": judge})
    nodes = Nodes(rig)
    rig.save(A)
    nodes.rest()
    nodes.has["n1"].clear()
    rig.send(NodesChanged(Moved(version=2)))
    nodes.rest()
    assert nodes.all() == set(A)
    assert nodes.asked == list(A[1::3])
    assert judge.forgotten == ["n1"], "how fast it was says nothing any more"


def test_how_fast_a_node_was_is_forgotten_when_it_leaves() -> None:
    judge = Judge()
    rig = RemoteRig(16, remote={"load_or_compute": judge})
    rig.send(NodesChanged(TestRing(names=("n0",), version=2)))
    assert sorted(judge.forgotten) == ["n1", "n2"]


def test_the_same_table_again_begins_nothing() -> None:
    rig = RemoteRig(16)
    nodes = Nodes(rig)
    rig.save(A)
    nodes.rest()
    rig.send(NodesChanged(TestRing()))
    assert rig.core.next_deadline() is None
    assert not rig.remote.catching_up


def test_an_empty_l1_has_nothing_to_catch_up_with() -> None:
    rig = RemoteRig(16)
    rig.send(NodesChanged(TestRing(version=2)))
    rig.send(NodeBack("n0"))
    assert rig.core.next_deadline() is None


@pytest.mark.parametrize("settles", [False, True])
def test_what_was_on_its_way_to_another_node_when_the_table_changed_is_written_to_its_own(settles: bool) -> None:
    rig = RemoteRig(16, ONE)
    nodes = Nodes(rig)
    rig.save(A)
    rig.send(NodesChanged(TestRing(names=("n1",), version=2)))
    nodes_of_before, rig.writes = rig.writes, []
    nodes.rest()
    assert not nodes.all(), "it is being read"
    rig.writes = nodes_of_before
    (batch, slots) = next((write.batch, write.slots) for _, write in rig.writes)
    rig.finish_writes("n0", **({"unsettled": A[:1]} if settles else {}))
    if settles:
        nodes.rest()
        rig.settle(batch, "n0", slots[0])
        nodes.rest(2 * RETRY_S)
    nodes.rest()
    assert nodes.has["n1"] == set(A)


@pytest.mark.parametrize("was_found", [True, False])
def test_what_was_fetched_from_another_node_when_the_table_changed_is_written_to_its_own(was_found: bool) -> None:
    rig = RemoteRig(16, ONE)
    nodes = Nodes(rig)
    rig.ask(A)
    if was_found:
        rig.answer_finds()
    rig.send(NodesChanged(TestRing(names=("n1",), version=2)))
    rig.answer_finds()
    rig.advance(0.5)
    assert [node for node, _ in rig.fetches] == ["n0"]
    rig.finish_fetches()
    nodes.rest()
    assert nodes.all() == set(A)


def test_what_was_being_fetched_when_the_table_changed_again_and_again_is_written_to_its_own() -> None:
    rig = RemoteRig(16, ONE)
    nodes = Nodes(rig)
    rig.ask(A)
    rig.answer_finds()
    for version in (2, 3, 4):
        rig.send(NodesChanged(TestRing(names=("n1",), version=version)))
    nodes.rest(0.5)
    rig.finish_fetches()
    nodes.rest()
    assert nodes.all() == set(A)


def test_what_was_fetched_before_the_table_changed_and_waits_for_its_parent_is_written_to_its_own() -> None:
    rig = RemoteRig(16, ONE)
    nodes = Nodes(rig)
    grant = rig.reserve(A[:1])
    rig.ask(A)
    rig.answer_finds()
    rig.finish_fetches()
    assert rig.slots_in(State.FILLED) == 5
    rig.send(NodesChanged(TestRing(names=("n1",), version=2)))
    nodes.rest()
    assert not nodes.all()
    rig.fill(grant)
    nodes.rest()
    assert nodes.all() == set(A)
    assert rig.core.next_deadline() is None


# ---------------------------------------------------------------- what it does not do


@pytest.mark.parametrize("ingestion", ["hot", "evicted"])
def test_where_not_all_is_written_only_what_is_known_is_corrected(ingestion: str) -> None:
    rig = RemoteRig(16, ONE, {"ingestion": ingestion})
    nodes = Nodes(rig)
    rig.put(A)
    nodes.has["n0"] = {A[0]}
    rig.send(NodeBack("n0"))
    nodes.rest()
    assert caught_up(rig) == (6, 5, 0)
    assert not rig.remote.totals.offered
    if ingestion == "hot":
        rig.match(A)
        assert rig.written() == set(A[1:])


def test_what_changed_hands_while_the_node_was_asked_is_left_as_it_is() -> None:
    rig = RemoteRig(6, ONE)
    nodes = Nodes(rig)
    rig.save(A)
    nodes.rest()
    rig.send(NodeBack("n0"))
    rig.advance(PACE_S)
    rig.advance(PACE_S)
    assert [find.keys for _, find in rig.finds], "it was asked about A"
    rig.save(B)
    assert len(rig.written()) == 6
    rig.answer_finds(lambda key: False)
    assert len(rig.written()) == 6, "A is gone, and B is being written"
    nodes.rest()
    assert rig.slots_in(State.READY) == 6
    assert nodes.all() >= set(B)


def test_a_node_that_does_not_answer_is_asked_less_and_less() -> None:
    rig = RemoteRig(16, ONE)
    nodes = Nodes(rig)
    rig.save(A)
    nodes.rest()
    nodes.out.add("n0")
    nodes.has["n0"].clear()
    rig.send(NodeBack("n0"))
    asked: list[float] = []
    while rig.now < 5000:
        due = rig.core.next_deadline()
        assert due is not None
        rig.advance(max(0.0, due - rig.now))
        asked += [rig.now] * len(rig.finds)
        nodes.answer()
    pauses = [later - before for before, later in pairwise(asked)]
    assert pauses[0] == pytest.approx(RETRY_S, abs=1)
    assert pauses == sorted(pauses)
    assert pauses[-1] == pytest.approx(PAUSE_MOST_S, abs=1)
    nodes.out.clear()
    nodes.rest(PAUSE_MOST_S + 1)
    assert nodes.all() == set(A)


def test_nobody_is_written_more_at_once_than_leaves_room_for_what_is_being_saved() -> None:
    keys = chain("c", 300)
    rig = RemoteRig(600, ONE, {"write_queue_blocks": 200})
    nodes = Nodes(rig)
    for at in range(0, 300, 100):
        rig.save(keys[: at + 100], at)
        nodes.answer()
    nodes.rest()
    nodes.has["n0"].clear()
    rig.send(NodeBack("n0"))
    longest = 0
    for _ in range(2000):
        due = rig.core.next_deadline()
        if due is None:
            break
        rig.advance(max(0.0, due - rig.now))
        longest = max(longest, rig.remote.writing)
        assert len(rig.finds) <= 1
        nodes.answer()
    assert nodes.all() == set(keys)
    assert 0 < longest <= 200 // 8
    assert not rig.remote.totals.write_dropped


def test_it_waits_while_ordinary_writes_are_many() -> None:
    rig = RemoteRig(200, ONE, {"write_queue_blocks": 80})
    nodes = Nodes(rig)
    rig.save(A)
    nodes.rest()
    nodes.has["n0"].clear()
    rig.save(chain("c", 60))
    rig.send(NodeBack("n0"))
    for _ in range(20):
        rig.advance(IDLE_S)
    assert not rig.finds
    nodes.rest()
    assert nodes.all() == {*A, *chain("c", 60)}


def test_a_trigger_while_it_walks_begins_anew_for_that_node_and_no_other() -> None:
    rig = RemoteRig(16, TestRing(names=("n0", "n1")), slice_blocks=1)
    nodes = Nodes(rig)
    rig.save(A)
    nodes.rest()
    for name in ("n0", "n1"):
        nodes.has[name].clear()
        rig.send(NodeBack(name))
    for _ in range(200):
        rig.advance(PACE_S)
        nodes.answer()
        rig.send(NodeBack("n1"))
    assert nodes.has["n0"] == set(A[0::2]), "whoever is back again and again holds up nobody"
    nodes.rest()
    assert nodes.all() == set(A)


def test_an_older_answer_says_nothing_after_a_second_trigger() -> None:
    rig = RemoteRig(16, ONE)
    nodes = Nodes(rig)
    rig.save(A)
    nodes.rest()
    rig.send(NodeBack("n0"))
    rig.advance(PACE_S)
    rig.advance(PACE_S)
    assert len(rig.finds) == 1
    rig.send(NodeBack("n0"))
    rig.answer_finds(lambda key: False)
    assert caught_up(rig) == (0, 0, 0)
    nodes.rest()
    assert caught_up(rig) == (6, 0, 0)


@pytest.mark.parametrize("how", ["reset", "close", "no nodes"])
def test_it_ends_with_the_second_tier(how: str) -> None:
    rig = RemoteRig(16, ONE)
    nodes = Nodes(rig)
    rig.save(A)
    nodes.rest()
    rig.send(NodeBack("n0"))
    rig.advance(PACE_S)
    rig.advance(PACE_S)
    assert len(rig.finds) == 1
    if how == "reset":
        rig.send(ResetCache(1))
    elif how == "close":
        rig.close()
    else:
        rig.send(NodesChanged(TestRing(names=(), version=2)))
    assert rig.core.next_deadline() is None
    rig.answer_finds(lambda key: False)
    rig.send(NodeBack("n0"))
    assert rig.core.next_deadline() is None
    assert not rig.writes
    assert not rig.remote.catching_up


def test_a_node_that_is_not_in_the_table_is_not_asked() -> None:
    rig = RemoteRig(16, ONE)
    nodes = Nodes(rig)
    rig.save(A)
    nodes.rest()
    rig.send(NodeBack("n7"))
    assert rig.core.next_deadline() is None


def test_an_answer_about_something_else_is_a_bug() -> None:
    rig = RemoteRig(16, ONE)
    nodes = Nodes(rig)
    rig.save(A)
    nodes.rest()
    rig.send(NodeBack("n0"))
    rig.advance(PACE_S)
    rig.advance(PACE_S)
    [(_, find)] = rig.finds
    assert 0 < find.deadline - rig.now <= QUESTION_S
    with pytest.raises(InternalError, match="question"):
        rig.send(BlocksFound(find.batch, "n0", (True,)))


def test_what_is_being_loaded_when_its_node_is_back_is_caught_up_all_the_same_and_what_falls_is_not() -> None:
    rig = RemoteRig(16, ONE)
    nodes = Nodes(rig)
    rig.save(A)
    nodes.rest()
    nodes.has["n0"].clear()
    job = rig.load(rig.match(A[:3]))
    rig.send(NodeBack("n0"))
    rig.advance(PACE_S)
    rig.advance(PACE_S)
    rig.loaded(job, LoadOutcome.FAILED)
    nodes.rest()
    assert not nodes.all()
    assert rig.slots_in(State.FREE) == 16


# ---------------------------------------------------------------- its cost


def test_others_have_their_turn_between_pieces() -> None:
    """A message that comes in the middle of a long walk is handled at once."""
    slots = 20_000
    core = L1Core(L1Config(), slots, RemoteConfig(min_tokens=1, max_writing_share=1.0))
    core.handle(SegmentGrown(0, slots), 1.0)
    keys = chain("long", slots)
    for job, at in enumerate(range(0, slots, 500), start=1):
        messages = (ReserveSlots(job, (run(keys[: at + 500], at),)), BlocksFilled(job, 0, tuple(range(at, at + 500)), ()))
        for message in messages:
            core.handle(message, 1.0)
            while core.has_work:
                core.go_on(1.0)
    assert core.statistics().slots[State.READY] == slots
    core.handle(NodesChanged(RendezvousRing(1, [NodeAddress(f"n{at}", f"redis://n{at}") for at in range(3)])), 2.0)
    now, steps, asked = 2.0, 0, 0
    while (due := core.next_deadline()) is not None and steps < 300:
        assert due >= now
        now, steps = due, steps + 1
        effects, slices = core.tick(now), 1
        while core.has_work:
            effects, slices = effects + core.go_on(now), slices + 1
        assert slices <= 2
        assert len(effects) <= 1
        asked += sum([len(effect.message.keys) for effect in effects])  # type: ignore[union-attr,misc]
        assert not core.handle(MatchPrefix("r", steps, (b"x" * 24,), now - 1.0), now)[0].message.slots  # type: ignore[union-attr]
        core.handle(ForgetRequest("r"), now)
        due = core.next_deadline()
        assert due is None or due >= now + PACE_S, "then it is others' turn"
    assert steps >= slots // 512
    assert asked == 3 * BATCH, "and then they wait for answers"


# ---------------------------------------------------------------- where L1 keeps nothing


def saved(rig: RemoteRig, keys: Iterable[BlockKey]) -> int:
    return len(rig.save(tuple(keys)))


@pytest.mark.parametrize("how", [NodeBack("n0"), NodesChanged(TestRing(names=("n1",), version=2))], ids=["back", "changed"])
def test_where_l1_keeps_nothing_what_was_written_is_written_again(how: NodeBack | NodesChanged) -> None:
    rig = RemoteRig(16, ONE, keeps=False)
    assert saved(rig, A) == 6
    rig.finish_writes()
    assert saved(rig, A) == 0
    rig.send(how)
    assert rig.core.next_deadline() is None
    assert saved(rig, A) == 6
    rig.finish_writes()
    assert rig.slots_in(State.FREE) == 16
