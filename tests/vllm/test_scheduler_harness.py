"""Random lives of an engine: vLLM's real scheduler, both halves of the connector and L1, with copies and messages coming when they like."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

pytest.importorskip("vllm")

from kvoffload.messages import DropReason
from kvoffload.testing.harness import OracleError, Outcome, draw_settings, run
from kvoffload.testing.sim.engine import make_request
from kvoffload.testing.sim.settings import BLOCK_SIZE, SimSettings
from kvoffload.testing.sim.simulation import Simulation

pytestmark = pytest.mark.vllm

CALM = SimSettings(
    seed=1, blocks=45, slots=400, max_batched_tokens=64, max_requests=4, max_loads=8, prompt=True, faults=False, wait_finds_share=1.0
)
"""Copies and answers come at once, and L1 has room for all: nothing has a reason to be lost."""


def live(seeds: Iterable[int], **changes: object) -> Outcome:
    total = Outcome()
    for seed in seeds:
        total += run(draw_settings(seed).with_(**changes))
    return total


def test_nothing_is_ever_wrong_or_left_behind() -> None:
    total = live(range(150))
    # A life without loads, failures, preemptions and churn would show nothing.
    assert total.loads["LOADED"] > 50
    assert total.preemptions > 50
    assert total.evictions > 200
    assert total.aborts > 50
    happened = [total.resets, total.sessions, total.failed_hooks, total.loads["FAILED"], total.loads["WITHDRAWN"]]
    happened += [total.drops[reason] for reason in ("no_slot", "parent_missing", "unpaired", "copy_failed", "overwritten", "reset")]
    happened += [total.zeros[reason] for reason in ("off", "late", "busy", "no_room")]
    assert min(happened) > 0, total


@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_l1_that_churns_under_slow_copies(policy: str, asynchronous: bool) -> None:
    total = live(range(1000, 1006), policy=policy, async_scheduling=asynchronous, slots=16, blocks=22, save_ticks=5.0, hub_ticks=8.0)
    assert total.evictions > 40
    assert total.drops["overwritten"] > 0


def test_both_model_runners_and_both_queues() -> None:
    for v2_runner in (False, True):
        for priority in (False, True):
            assert live(range(2000, 2005), v2_runner=v2_runner, priority=priority).preemptions > 0


@pytest.mark.parametrize("share", [0.003, 0.03, 1.0])
def test_hooks_that_fail_leave_the_engine_alone(share: float) -> None:
    total = live(range(3000, 3020), hook_fail_share=share)
    assert total.failed_hooks > 5


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_many_more_lives() -> None:
    assert live(range(10_000, 20_000)).loads["LOADED"] > 5000


# ---------------------------------------------------------------- what is not lost without a reason


def run_to_end(simulation: Simulation, *names: str) -> None:
    for _ in range(500):
        if not any(name in simulation.scheduler.requests for name in names):
            return
        simulation.step()
    pytest.fail(f"{names} did not end")


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("length", [BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 5 * BLOCK_SIZE - 1, 5 * BLOCK_SIZE, 5 * BLOCK_SIZE + 1])
def test_all_full_blocks_come_back(length: int, asynchronous: bool) -> None:
    simulation = Simulation(CALM.with_(async_scheduling=asynchronous))
    tokens = list(range(100, 100 + length))
    simulation.add(make_request("first", tokens, 3 * BLOCK_SIZE))
    run_to_end(simulation, "first")
    simulation.drain_pipeline()
    simulation.progress()
    assert simulation.reset(running=False, connector=False)
    whole = simulation.ended[-1]
    simulation.add(make_request("again", tokens, 1))
    run_to_end(simulation, "again")
    assert simulation.oracle.answers_in_tokens == (length - 1) // BLOCK_SIZE * BLOCK_SIZE
    # The next turn of the conversation: generated tokens come back too, save for the last one, which nobody has computed. With
    # asynchronous scheduling the last token computed was not known yet when its step was planned: its block is not offered.
    simulation.drain_pipeline()
    assert simulation.reset(running=False, connector=False)
    simulation.oracle.answers_in_tokens = 0
    simulation.add(make_request("next turn", [*whole, 7, 7, 7], 1))
    run_to_end(simulation, "next turn")
    assert simulation.oracle.answers_in_tokens == (len(whole) - 1 - asynchronous) // BLOCK_SIZE * BLOCK_SIZE
    simulation.finish()


def test_what_the_engine_has_is_not_loaded() -> None:
    simulation = Simulation(CALM)
    tokens = list(range(100, 100 + 6 * BLOCK_SIZE))
    simulation.add(make_request("first", tokens, 1))
    run_to_end(simulation, "first")
    assert simulation.reset(running=False, connector=False)
    simulation.add(make_request("half", tokens[: 3 * BLOCK_SIZE], 1))
    run_to_end(simulation, "half")
    before = simulation.oracle.answers_in_tokens
    simulation.add(make_request("again", tokens, 1))
    run_to_end(simulation, "again")
    assert before == 2 * BLOCK_SIZE
    assert simulation.oracle.answers_in_tokens - before == 2 * BLOCK_SIZE
    simulation.finish()


def test_salts_do_not_share() -> None:
    simulation = Simulation(CALM)
    tokens = list(range(100, 100 + 4 * BLOCK_SIZE))
    for name, salt in (("a", "a"), ("b", "b"), ("none", None)):
        simulation.add(make_request(name, tokens, 1, salt=salt))
        run_to_end(simulation, name)
    assert not simulation.oracle.answers_in_tokens
    simulation.finish()


def test_opting_out() -> None:
    simulation = Simulation(CALM)
    tokens = list(range(100, 100 + 4 * BLOCK_SIZE))
    promised = []
    requests: dict[str, dict[str, object] | None] = {"unsaved": {"save": False}, "first": None, "unloaded": {"load": False}, "last": None}
    for name, opt_outs in requests.items():
        simulation.add(make_request(name, tokens, 1, kvoffload=opt_outs))
        run_to_end(simulation, name)
        promised.append(simulation.oracle.answers_in_tokens)
        assert simulation.reset(running=False, connector=False)
    assert promised == [0, 0, 0, 3 * BLOCK_SIZE]
    simulation.finish()


def test_weights_change() -> None:
    simulation = Simulation(CALM)
    tokens = list(range(100, 100 + 4 * BLOCK_SIZE))
    for name in ("old", "new"):
        simulation.add(make_request(name, tokens, 1))
        run_to_end(simulation, name)
        assert not simulation.oracle.answers_in_tokens
        assert simulation.reset(running=False, connector=True)
    simulation.finish()


# ---------------------------------------------------------------- holding a copy past everything


@pytest.mark.parametrize("crash", [False, True])
def test_a_load_held_past_every_deadline_keeps_its_blocks(crash: bool) -> None:
    simulation = Simulation(CALM.with_(blocks=24))
    tokens = list(range(100, 100 + 8 * BLOCK_SIZE))
    simulation.add(make_request("first", tokens, 1))
    run_to_end(simulation, "first")
    assert simulation.reset(running=False, connector=False)
    simulation.copies.hold_at = 5
    simulation.add(make_request("held", tokens, 1))
    simulation.step()
    assert simulation.copies.is_loading
    simulation.abort("held")
    if crash:
        simulation.crash_copies()
    for turn in range(6):
        # Others want blocks, and take all there are.
        simulation.add(make_request(f"other {turn}", list(range(turn, turn + 12 * BLOCK_SIZE)), 20))
        for _ in range(20):
            simulation.step()
        simulation.clock.advance(10)
        assert simulation.oracle.loading == {"held": 7}
    simulation.finish()


@pytest.mark.parametrize("crash", [False, True])
def test_a_save_held_past_every_deadline_is_not_kept(crash: bool) -> None:
    simulation = Simulation(CALM.with_(blocks=22))
    tokens = list(range(100, 100 + 8 * BLOCK_SIZE))
    simulation.copies.hold_at = 5
    simulation.add(make_request("held", tokens, 40))
    simulation.step()
    assert simulation.copies.is_saving
    simulation.abort("held")
    if crash:
        simulation.crash_copies()
    for turn in range(4):
        simulation.add(make_request(f"other {turn}", list(range(turn, turn + 16 * BLOCK_SIZE)), 20, kvoffload={"save": False}))
        for _ in range(40):
            simulation.step()
        simulation.clock.advance(10)
    simulation.copies.hold_at = None
    simulation.progress()
    # Two blocks and a half were read in time. What came after was others'.
    assert simulation.core.statistics().drops[DropReason.OVERWRITTEN] == 2
    simulation.add(make_request("again", tokens, 1))
    simulation.finish()
    assert simulation.oracle.answers_in_tokens == (0 if crash else 2 * BLOCK_SIZE)


# ---------------------------------------------------------------- reading a failure


def test_a_failure_tells_its_story() -> None:
    def spoil(simulation: Simulation) -> None:
        simulation.copies.sabotage.claim_loads = True

    def live_on() -> None:
        for seed in range(50):
            run(seed, prepare=spoil)

    with pytest.raises(OracleError) as caught:
        live_on()
    story = "\n".join(caught.value.__notes__)
    assert "seed" in story
    assert "ReserveSlots job" in story
    assert "PrefixHit" in story


def test_a_seed_always_lives_the_same_life() -> None:
    assert run(7) == run(7)
