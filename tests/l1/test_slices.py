"""Long messages are dealt with in slices, and what goes to nodes is cut into batches."""

from __future__ import annotations

import hashlib

import pytest
from tests.l1.remote_rig import TOKENS, Judge, RemoteRig, TestRing
from tests.l1.rig import chain, run

from kvoffload.errors import ConfigError
from kvoffload.l1 import Effect, L1Config, L1Core, RemoteConfig, State, ToPrefetcher
from kvoffload.l1.core import L1Message
from kvoffload.l1.remote import BATCH
from kvoffload.l2.ring import NodeAddress, RendezvousRing
from kvoffload.messages import (
    BlockKey,
    BlocksFilled,
    BlocksFound,
    FetchFinished,
    ForgetRequest,
    HitReason,
    MatchPrefix,
    NodesChanged,
    ReserveSlots,
    SegmentGrown,
)

LONG = chain("long", 2000)
ONE_NODE = TestRing(names=("n0",))


class Steps:
    """A core, and how many slices each message took."""

    def __init__(self, slots: int = 6000, slice_blocks: int = 100) -> None:
        remote = RemoteConfig(min_tokens=1, max_writing_share=1.0)
        self.core = L1Core(L1Config(slice_blocks=slice_blocks, max_waiting_share=1.0), slots, remote)
        self.slices: list[int] = []
        self.send(SegmentGrown(0, slots))
        self.send(NodesChanged(TestRing()))

    def send(self, message: L1Message) -> list[Effect]:
        effects = self.core.handle(message, 1.0)
        self.slices.append(1)
        while self.core.has_work:
            effects += self.core.go_on(1.0)
            self.slices[-1] += 1
        self.core.check()
        return effects


def test_nobody_is_sent_more_than_a_batch() -> None:
    rig = RemoteRig(6000, ONE_NODE, max_waiting_share=1.0)
    rig.ask(LONG)
    assert [key for _, find in rig.finds for key in find.keys] == list(LONG)
    assert max(len(find.keys) for _, find in rig.finds) == BATCH
    rig.answer_finds()
    assert [key for _, fetch in rig.fetches for key in fetch.keys] == list(LONG)
    assert max(len(fetch.keys) for _, fetch in rig.fetches) == BATCH
    rig.finish_fetches()
    assert len(rig.hits[0].slots) == len(LONG)
    rig.save(chain("other", 2000))
    assert sum(len(write.keys) for _, write in rig.writes) == 2000
    assert max(len(write.keys) for _, write in rig.writes) == BATCH


def test_a_long_match_its_fetch_and_its_answer_take_many_slices() -> None:
    steps = Steps()
    asked = steps.send(MatchPrefix("r", 1, LONG, 10.0, 0, 0.0, TOKENS))
    assert steps.slices[-1] >= 20
    fetches: list[Effect] = []
    for effect in asked:
        assert isinstance(effect, ToPrefetcher)
        fetches += steps.send(BlocksFound(effect.message.batch, effect.node, (True,) * len(effect.message.keys)))
    assert steps.slices[-1] >= 20, "the last answer decides"
    answers: list[Effect] = []
    for effect in (*fetches[1:], fetches[0]):
        assert isinstance(effect, ToPrefetcher)
        fetch = effect.message
        answers += steps.send(FetchFinished(fetch.batch, effect.node, fetch.slots, (), ()))  # type: ignore[union-attr]
    assert steps.slices[-1] >= 20, "the first block came last, and all others waited for it"
    assert [len(answer.message.slots) for answer in answers] == [2000]  # type: ignore[union-attr]
    steps.send(ForgetRequest("r"))
    assert steps.core.statistics().protected == 0


def test_a_long_save_takes_many_slices() -> None:
    steps = Steps()
    grant = steps.send(ReserveSlots(1, (run(LONG),)))[0].message
    assert steps.slices[-1] >= 20
    steps.send(BlocksFilled(1, 0, grant.slots, ()))  # type: ignore[union-attr]
    assert steps.slices[-1] >= 40, "commit, and write"
    steps.send(ReserveSlots(2, (run(LONG),)))
    assert steps.slices[-1] >= 20, "all of it is there"
    assert steps.core.statistics().shared == 2000


def test_a_message_is_dealt_with_before_the_next_one_whoever_forgets_to_go_on() -> None:
    core = L1Core(L1Config(slice_blocks=100), 4000)
    core.handle(SegmentGrown(0, 4000), 1.0)
    assert not core.handle(ReserveSlots(1, (run(LONG),)), 1.0)
    assert core.has_work
    effects = core.handle(MatchPrefix("r", 1, LONG, 1.0), 1.0)
    assert [type(effect.message).__name__ for effect in effects] == ["SlotGrant", "PrefixHit"]
    assert not core.has_work
    core.check()


def test_keys_are_kept_as_they_are_whatever_they_end_in() -> None:
    keys = tuple(hashlib.blake2b(bytes([at]), digest_size=20).digest() + bytes(4) for at in range(100))
    rig = RemoteRig(200)
    rig.send(NodesChanged(RendezvousRing(1, [NodeAddress("n0", "redis://n0")])))
    rig.save(keys)
    assert [key for _, write in rig.writes for key in write.keys] == list(keys)


def test_what_is_learnt_of_batches_side_by_side_is_how_long_all_of_them_took() -> None:
    judge = Judge()
    rig = RemoteRig(3000, ONE_NODE, {"load_or_compute": judge}, max_waiting_share=1.0)
    rig.ask(LONG[:600], wait_s=100.0)
    rig.answer_finds()
    assert [len(fetch.keys) for _, fetch in rig.fetches] == [256, 256, 88]
    for seconds in (1.0, 2.0, 3.0):
        node, fetch = rig.fetches.pop(0)
        rig.now += 1.0
        assert not judge.observed
        rig.send(FetchFinished(fetch.batch, node, fetch.slots, (), (), (), seconds))
    assert judge.observed == [("n0", 600, 60_000, 3.0)]


def test_batches_that_took_turns_count_together() -> None:
    judge = Judge()
    rig = RemoteRig(3000, ONE_NODE, {"load_or_compute": judge}, max_waiting_share=1.0)
    rig.ask(LONG[:300], wait_s=100.0)
    rig.answer_finds()
    for _ in range(2):
        node, fetch = rig.fetches.pop(0)
        rig.now += 10.0  # most of it waiting for its turn
        rig.send(FetchFinished(fetch.batch, node, fetch.slots, (), (), (), 1.0))
    assert judge.observed == [("n0", 300, 30_000, 2.0)]


def test_who_waits_is_answered_at_once_when_the_chain_falls_through_something_else() -> None:
    a = chain("a", 8)
    rig = RemoteRig(32)
    rig.save(a[:2])
    rig.finish_writes()
    hit = rig.match(a[:2], "loading")
    job = rig.load(hit)
    rig.ask(a, "waiting")
    rig.answer_finds()
    assert len(rig.fetches) == 3
    rig.fail_load(job)
    assert (rig.hits[-1].request, rig.hits[-1].reason, rig.hits[-1].slots) == ("waiting", HitReason.MISS, ())
    rig.finish_fetches()
    assert rig.slots_in(State.FREE) == 32


def test_who_waits_for_nodes_to_say_what_they_have_is_too() -> None:
    a = chain("a", 8)
    rig = RemoteRig(32)
    rig.save(a[:2])
    rig.finish_writes()
    job = rig.load(rig.match(a[:2], "loading"))
    rig.ask(a, "waiting")
    rig.ask(chain("b", 4), "other")
    rig.fail_load(job)
    assert [hit.request for hit in rig.hits] == ["loading", "waiting"]
    rig.answer_finds()
    rig.finish_fetches()
    assert len(rig.hits[-1].slots) == 4


def test_who_can_still_be_served_waits_on() -> None:
    a: tuple[BlockKey, ...] = chain("a", 6)
    rig = RemoteRig(32)
    rig.save(a[:2])
    rig.finish_writes()
    job = rig.load(rig.match(a[:2], "loading"))
    b = chain("b", 6)
    rig.ask(b, "waiting")
    rig.answer_finds()
    rig.fail_load(job)
    assert [hit.request for hit in rig.hits] == ["loading"]
    rig.finish_fetches()
    assert len(rig.hits[-1].slots) == 6


def test_a_slice_is_of_a_block_at_least() -> None:
    with pytest.raises(ConfigError, match="slice_blocks"):
        L1Config(slice_blocks=0)
