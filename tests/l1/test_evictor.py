"""Which slot goes in place of the one that was named: leaves only, nothing pinned, within bounds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.l1.rig import Rig, chain, run

from kvoffload.l1.eviction import evictor as rules
from kvoffload.messages import ForgetRequest, ReleaseHit

POLICIES = ["lru", "s3fifo"]


@pytest.mark.parametrize("policy", POLICIES)
def test_leaves_go_before_their_parents(policy: str) -> None:
    rig = Rig(8, policy=policy, max_waiting_share=1.0)
    keys = chain("a", 8)
    rig.save(keys)
    for gone in range(1, 8):
        rig.save(chain(f"new{gone}", 1))
        assert len(rig.match(keys[: 8 - gone]).slots) == 8 - gone, "the root was evicted, or a hole torn"
        rig.send(ForgetRequest("r"))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_named_parent_goes_back_eight_times_and_then_the_tail_goes(policy: str) -> None:
    """A prompt that was saved first and generated into later: its parents are older than its tail."""
    keys = chain("a", 30)
    rig = Rig(30, policy=policy, max_waiting_share=1.0)
    for block in range(30):
        rig.save(keys[: block + 1], block)
    order = rig.core._parts.policy.order()
    rig.save(chain("b", 1))
    assert rig.core._parts.policy.order()[:-1] == order[8:-1] + order[:8] if policy == "lru" else True
    assert [rig.core._parts.index.find(key) >= 0 for key in keys] == [True] * 29 + [False]
    rig.save(chain("c", 4))
    assert rig.core._parts.index.find(keys[24]) >= 0, "the tails went, one after another, and no more than needed"
    assert rig.core._parts.index.find(keys[25]) < 0


@pytest.mark.parametrize("policy", POLICIES)
def test_a_long_chain_is_walked_down_once_and_not_once_per_block(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few steps a reservation may take: what was walked is remembered, and a later reservation gets to the end."""
    monkeypatch.setattr(rules, "STEPS", 50)
    keys = chain("a", 400)
    rig = Rig(400, policy=policy)
    for start in range(0, 400, 4):
        rig.save(keys[: start + 4], start)
    got = [len(rig.save(chain(f"n{number}", 4))) for number in range(60)]
    assert got[-40:] == [4] * 40


@pytest.mark.parametrize("policy", POLICIES)
def test_pinned_blocks_are_skipped_and_the_rest_is_found(policy: str) -> None:
    rig = Rig(12, policy=policy, max_waiting_share=1.0)
    a, b = chain("a", 6), chain("b", 6)
    rig.save(a)
    rig.save(b)
    hit = rig.match(a)
    assert len(rig.save(chain("c", 6))) == 6
    assert rig.reserve(run(chain("d", 7)))[0].blocks == tuple(range(6))
    assert rig.match(a).slots == hit.slots


@pytest.mark.parametrize("policy", POLICIES)
def test_when_everything_is_pinned_nothing_is_granted_and_all_is_as_before(policy: str) -> None:
    rig = Rig(8, policy=policy, max_waiting_share=1.0)
    keys = chain("a", 8)
    rig.save(keys)
    hit = rig.match(keys)
    assert rig.reserve(run(chain("b", 3)))[0].slots == ()
    rig.send(ReleaseHit("r", hit.sequence))
    assert len(rig.save(chain("b", 3))) == 3


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=40, deadline=None)
@given(
    prompts=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 8), st.integers(0, 4)), min_size=1, max_size=12),
    pinned=st.lists(st.integers(0, 11), max_size=3),
    wanted=st.integers(1, 16),
)
def test_a_reservation_gets_all_there_is(policy: Any, prompts: list[tuple[int, int, int]], pinned: list[int], wanted: int) -> None:
    """Whatever the tree and the pins: free slots, and every READY one that nothing protects, can be had in one reservation."""
    rig = Rig(16, policy=policy, max_waiting_share=1.0)
    chains = []
    for number, (trunk, length, own) in enumerate(prompts):
        chains.append((*chain(f"t{trunk}", length), *chain(f"own{number}.{length}", own)))
        rig.save(chains[-1])
    for at in pinned:
        rig.match(chains[at % len(chains)], f"p{at}")
    free = 16 - rig.core.statistics().protected
    grant, _ = rig.reserve(run(chain("new", wanted)))
    assert len(grant.slots) == min(wanted, free)
