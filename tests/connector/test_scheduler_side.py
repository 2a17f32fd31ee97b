"""The scheduler's hooks one by one: what is bumped, planned, promised and given back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tests.connector.ports import BLOCK_SIZE, NAMESPACE, Clock, FakeHub, FakeLedger, blocks_of, hit_for, make_output, make_request

from kvoffload.connector.matcher import MatchSettings
from kvoffload.connector.record import Phase
from kvoffload.connector.scheduler_side import SchedulerSettings, SchedulerSide, opt_outs
from kvoffload.keys import Extras
from kvoffload.messages import (
    ConnectorOff,
    ForgetRequest,
    MatchPrefix,
    ParentMissing,
    ReleaseHit,
    ReserveSlots,
    ResetCache,
    StartLoad,
)


class Bench:
    def __init__(self, extras: Extras = b"", *, save: bool = True, max_loads: int = 4) -> None:
        self.clock = Clock()
        self.hub = FakeHub(self.clock)
        self.ledger = FakeLedger()
        settings = SchedulerSettings(BLOCK_SIZE, NAMESPACE, MatchSettings(max_loads=max_loads), save)
        self.side = SchedulerSide(self.hub, self.ledger, settings, lambda request: extras, self.clock)

    def new(self, name: str = "r", tokens: int = 17, **changes: Any) -> Any:
        request = make_request(name, tokens, **changes)
        self.side.on_new_request(request)
        return request

    def match(self, request: Any, computed: int = 0, *, slots: int | None = None) -> tuple[int | None, bool]:
        """The match hook, with an answer of ``slots`` blocks coming while it waits."""
        record = self.side.records[request.request_id]

        def answer(timeout_s: float) -> None:
            if slots is not None and record.phase is Phase.ASKED:
                self.hub.inbox.append(hit_for(record, slots, generation=self.side.matcher.generation))

        self.hub.on_wait = answer
        told = self.side.get_num_new_matched_tokens(request, computed)
        self.hub.on_wait = lambda timeout_s: None
        return told

    def admit(self, request: Any, ids: tuple[int, ...], external: int = 0, *, local: int = 0) -> None:
        """The allocation hook, and what vLLM does after it."""
        self.side.update_state_after_alloc(request, blocks_of(*ids), external)
        if not request.num_computed_tokens:
            request.num_computed_tokens = local + external

    def report(self, *names: str, invalid: tuple[int, ...] = ()) -> None:
        self.side.update_connector_output(SimpleNamespace(finished_recving=set(names), invalid_block_ids=set(invalid)))

    def load(self, name: str = "r") -> Any:
        """A request whose 4 blocks are being loaded, into blocks 11 to 14."""
        request = self.new(name)
        assert self.match(request, slots=4) == (16, True)
        self.admit(request, (11, 12, 13, 14), 16)
        self.side.build_connector_meta(make_output())
        return request

    def preempt(self, request: Any) -> None:
        request.num_preemptions += 1
        request.num_computed_tokens = 0


# ---------------------------------------------------------------- the ledger


@pytest.mark.parametrize(("local", "external", "bumped"), [(0, 0, [1, 2, 3, 4]), (8, 0, [3, 4]), (0, 8, [1, 2, 3, 4]), (4, 8, [2, 3, 4])])
def test_blocks_of_an_admitted_request_are_bumped_but_not_its_prefix_hits(local: int, external: int, bumped: list[int]) -> None:
    bench = Bench()
    request = bench.new()
    bench.match(request, local, slots=(local + external) // BLOCK_SIZE)
    bench.admit(request, (1, 2, 3, 4), external, local=local)
    assert bench.ledger.bumped == bumped


def test_after_a_load_only_what_lies_behind_it_is_new() -> None:
    bench = Bench()
    request = bench.load()
    bench.report("r")
    bench.ledger.bumped.clear()
    bench.admit(request, (11, 12, 13, 14, 15))
    assert bench.ledger.bumped == [15]


def test_new_blocks_of_running_requests_and_copies_are_bumped() -> None:
    bench = Bench()
    bench.side.build_connector_meta(make_output(running={"a": [5, 6], "b": None, "c": [7, 8, 9]}, resumed=["c"], copies=[(3, 4)]))
    # What was resumed was bumped when it was admitted, but for its prefix hits.
    assert bench.ledger.bumped == [5, 6, 4]


@pytest.mark.parametrize("way", ["off", "not live", "unknown"])
def test_bumps_go_on_whatever_is_off(way: str) -> None:
    bench = Bench()
    request = bench.new()
    if way == "off":
        bench.side.turn_off("test")
    if way == "unknown":
        bench.side.records.clear()
    bench.hub.is_live = way != "not live"
    bench.side.get_num_new_matched_tokens(request, 0)
    bench.admit(request, (1, 2))
    bench.side.build_connector_meta(make_output({"r": 8}, {"r": [1, 2, 3]}, running={"r": [3]}))
    assert bench.ledger.bumped == [1, 2, 3]


# ---------------------------------------------------------------- loading


def test_a_load_is_planned_from_what_vllm_took() -> None:
    bench = Bench()
    request = bench.new()
    assert bench.match(request, 4, slots=4) == (12, True)
    bench.admit(request, (9, 11, 12, 13), 12, local=4)
    (load,) = bench.side.build_connector_meta(make_output()).loads
    assert (load.request, load.slots, load.blocks, load.withdrawn) == ("r", (51, 52, 53), (11, 12, 13), False)
    assert bench.hub.of(StartLoad) == [StartLoad(load.job, "r", 1, 1, 3)]
    assert bench.side.build_connector_meta(make_output()).loads == ()
    assert bench.side.has_pending_loads


def test_a_step_that_computes_nothing_is_idle() -> None:
    bench = Bench()
    assert bench.side.build_connector_meta(make_output()).idle
    assert not bench.side.build_connector_meta(make_output({"r": 1})).idle


def test_vllm_takes_nothing() -> None:
    bench = Bench()
    request = bench.new()
    bench.match(request, slots=4)
    bench.admit(request, (1, 2, 3, 4, 5))
    (start,) = bench.hub.of(StartLoad)
    assert (start.sequence, start.first, start.count) == (1, 0, 0)
    assert bench.side.matcher.credits == 4
    assert bench.side.build_connector_meta(make_output()).loads == ()


def test_a_load_keeps_its_credit_until_it_is_reported() -> None:
    bench = Bench()
    bench.load()
    assert bench.side.matcher.credits == 3
    bench.report("r")
    assert bench.side.matcher.credits == 4
    assert not bench.side.has_pending_loads
    bench.report("r")
    assert bench.side.matcher.credits == 4


def test_a_request_that_ends_during_its_load_gives_the_credit_back_with_the_report() -> None:
    bench = Bench()
    request = bench.load()
    bench.side.request_finished(request)
    assert bench.side.matcher.credits == 3
    assert bench.side.has_pending_loads
    bench.report("r")
    assert bench.side.matcher.credits == 4


def test_a_failed_load_is_the_last_one_and_its_blocks_are_saved() -> None:
    bench = Bench()
    request = bench.load()
    bench.report("r", invalid=(13, 14))
    assert bench.side.counters.failed_loads == 1
    request.num_computed_tokens = 8
    bench.admit(request, (11, 12, 13, 14, 15))
    bench.side.build_connector_meta(make_output({"r": 9}, {"r": [11, 12, 13, 14, 15]}))
    (message,) = bench.hub.of(ReserveSlots)
    assert message.runs[0].blocks == (11, 12, 13, 14)
    bench.preempt(request)
    assert bench.match(request) == (0, False)


def test_invalid_blocks_of_another_load_do_not_count() -> None:
    bench = Bench()
    bench.load()
    bench.report("r", invalid=(99,))
    assert not bench.side.counters.failed_loads


def test_a_loaded_request_saves_only_what_lies_behind() -> None:
    bench = Bench()
    request = bench.load()
    bench.report("r")
    request._all_token_ids.extend(range(500, 503))
    request.num_tokens = 20
    bench.admit(request, (11, 12, 13, 14, 15))
    bench.side.build_connector_meta(make_output({"r": 4}, {"r": [11, 12, 13, 14, 15]}))
    (message,) = bench.hub.of(ReserveSlots)
    assert message.runs[0].blocks == (15,)


def test_tokens_that_were_not_promised_are_reported_failed() -> None:
    bench = Bench()
    request = bench.new()
    bench.admit(request, (1, 2, 3), 8)
    (load,) = bench.side.build_connector_meta(make_output()).loads
    assert load.withdrawn
    assert load.slots == ()
    assert load.blocks == (2, 3)
    bench.report("r", invalid=load.blocks)
    assert bench.side.matcher.credits == 4


# ---------------------------------------------------------------- preemption, resets, ends


def test_preemption_forgets_the_answer_and_what_was_saved() -> None:
    bench = Bench()
    request = bench.load()
    bench.report("r")
    bench.admit(request, (11, 12, 13, 14, 15))
    bench.preempt(request)
    bench.side.build_connector_meta(make_output(preempted=["r"]))
    record = bench.side.records["r"]
    assert record.saved_blocks == 0
    assert bench.match(request, slots=4) == (16, True)
    assert [message.sequence for message in bench.hub.of(MatchPrefix)] == [1, 2]


def test_keys_of_before_a_preemption_are_not_those_of_after_it() -> None:
    """What is computed again may be another adapter's, under the same name: its keys rest on what is proven now."""
    adapters = iter([b"first", b"second"])
    bench = Bench()
    bench.side._identify = lambda request: next(adapters)
    request = bench.new(tokens=8)
    bench.match(request)
    before = list(bench.side.records["r"].chain.keys)
    bench.admit(request, (1, 2))
    bench.preempt(request)
    bench.match(request)
    after = bench.side.records["r"].chain.keys
    assert before
    assert not set(before) & set(after)


@pytest.mark.parametrize("may_load", [False, True])
def test_preempted_by_a_reset_and_admitted_again_at_once(may_load: bool) -> None:
    """vLLM names the request as preempted after it was admitted again, in the same step: it is alive, and the next reset must know."""
    bench = Bench()
    request = bench.new(params={"kvoffload": {"load": may_load}})
    bench.match(request)
    bench.admit(request, (1, 2, 3, 4, 5))
    bench.preempt(request)
    bench.match(request)
    bench.admit(request, (6, 7, 8, 9, 10))
    bench.side.build_connector_meta(make_output({"r": 8}, {"r": [6, 7, 8, 9, 10]}, preempted=["r"]))
    request.num_computed_tokens = 8
    assert len(bench.hub.of(ReserveSlots)) == 1
    bench.side.reset_cache()
    bench.side.build_connector_meta(make_output({"r": 8}, {"r": [6, 7, 8, 9, 10]}))
    assert len(bench.hub.of(ReserveSlots)) == 1


def test_a_reset_is_told_and_answers_are_asked_again() -> None:
    bench = Bench()
    request = bench.new()
    assert bench.match(request, slots=4) == (16, True)
    bench.side.reset_cache()
    assert bench.hub.of(ResetCache) == [ResetCache(1)]
    assert bench.side.matcher.credits == 4
    assert bench.match(request, slots=0) == (0, False)
    assert len(bench.hub.of(MatchPrefix)) == 2


def test_an_answer_from_before_the_reset_is_ignored() -> None:
    bench = Bench()
    request = bench.new()
    assert bench.match(request) == (None, False)
    old = hit_for(bench.side.records["r"], 4, generation=0)
    bench.side.reset_cache()
    bench.hub.inbox.append(old)
    assert bench.match(request) == (None, False)
    assert not bench.hub.of(ReleaseHit)


def test_what_is_alive_at_a_reset_saves_nothing_more_and_what_waits_does() -> None:
    bench = Bench()
    alive, waiting = bench.new("alive"), bench.new("waiting")
    bench.match(alive)
    bench.admit(alive, (1, 2, 3, 4, 5))
    bench.side.reset_cache()
    bench.match(waiting)
    bench.admit(waiting, (6, 7, 8, 9, 10))
    tables = {"alive": [1, 2, 3, 4, 5], "waiting": [6, 7, 8, 9, 10]}
    bench.side.build_connector_meta(make_output({"alive": 17, "waiting": 17}, tables))
    assert [run.request for message in bench.hub.of(ReserveSlots) for run in message.runs] == ["waiting"]


def test_a_load_promised_and_not_sent_is_sent_withdrawn_after_a_reset() -> None:
    bench = Bench()
    request = bench.new()
    bench.match(request, slots=4)
    bench.admit(request, (11, 12, 13, 14), 16)
    bench.side.reset_cache()
    (load,) = bench.side.build_connector_meta(make_output()).loads
    assert load.withdrawn
    assert load.slots
    bench.report("r", invalid=load.blocks)
    assert bench.side.matcher.credits == 4


def test_a_load_already_sent_goes_on_through_a_reset() -> None:
    bench = Bench()
    request = bench.load()
    bench.side.reset_cache()
    assert bench.side.build_connector_meta(make_output()).loads == ()
    bench.report("r")
    bench.admit(request, (11, 12, 13, 14, 15))
    bench.side.build_connector_meta(make_output({"r": 1}, {"r": [11, 12, 13, 14, 15]}))
    assert not bench.hub.of(ReserveSlots)


def test_the_end_of_a_request() -> None:
    bench = Bench()
    request = bench.new()
    bench.match(request, slots=4)
    bench.side.request_finished(request)
    bench.side.request_finished(request)
    assert bench.hub.of(ForgetRequest) == [ForgetRequest("r")]
    assert bench.side.matcher.credits == 4
    assert not bench.side.records


def test_a_sessions_next_input() -> None:
    bench = Bench()
    request = bench.new(tokens=8)
    bench.match(request)
    bench.admit(request, (1, 2))
    bench.side.build_connector_meta(make_output({"r": 8}, {"r": [1, 2]}))
    # It sampled a token, which vLLM drops for what is put in next.
    request.num_computed_tokens = 8
    request._all_token_ids.extend([700, 701, 702, 703])
    request.num_prompt_tokens = request.num_tokens = 12
    bench.ledger.bumped.clear()
    bench.admit(request, (1, 2, 3))
    assert bench.ledger.bumped == [3]
    bench.side.build_connector_meta(make_output({"r": 4}, {"r": [1, 2, 3]}))
    first, second = bench.hub.of(ReserveSlots)
    assert second.runs[0].blocks == (3,)
    assert second.runs[0].parent == first.runs[0].keys[-1]


# ---------------------------------------------------------------- idle, off, ParentMissing


def test_the_long_wait_is_for_when_nothing_else_runs() -> None:
    bench = Bench()
    bench.match(bench.new("first"))
    bench.side.build_connector_meta(make_output())
    assert bench.hub.waits == [pytest.approx(0.002)]
    running = bench.new("running", tokens=3)
    bench.match(running)
    bench.admit(running, (1,))
    bench.hub.waits.clear()
    bench.match(bench.new("second"))
    assert bench.hub.waits == [pytest.approx(0.0005)]
    bench.side.build_connector_meta(make_output())
    bench.side.request_finished(running)
    bench.hub.waits.clear()
    bench.match(bench.new("third"))
    assert bench.hub.waits == [pytest.approx(0.002)]


def test_parent_missing_offers_the_whole_prefix_once_more() -> None:
    bench = Bench()
    request = bench.new()
    bench.match(request, slots=0)
    bench.admit(request, (1, 2, 3, 4, 5))
    tables = {"r": [1, 2, 3, 4, 5]}
    bench.side.build_connector_meta(make_output({"r": 8}, tables))
    request.num_computed_tokens = 8
    bench.hub.inbox.append(ParentMissing(1, ("r", "gone")))
    bench.side.build_connector_meta(make_output({"r": 4}, tables))
    assert [run.blocks for message in bench.hub.of(ReserveSlots) for run in message.runs] == [(1, 2), (1, 2, 3)]


def test_off_means_no_promise_and_no_save_but_loads_go_on() -> None:
    bench = Bench()
    bench.load()
    other = bench.new("other")
    bench.hub.inbox.append(ConnectorOff("test"))
    bench.side.build_connector_meta(make_output({"other": 17}, {"other": [1, 2, 3, 4, 5]}))
    assert bench.side.off_reason == "test"
    assert not bench.hub.of(ReserveSlots)
    assert bench.match(other) == (0, False)
    bench.report("r")
    assert bench.side.matcher.credits == 4


def test_an_answer_given_before_it_went_off_is_still_loaded() -> None:
    bench = Bench()
    request = bench.new()
    assert bench.match(request, slots=4) == (16, True)
    bench.side.turn_off("test")
    bench.admit(request, (11, 12, 13, 14), 16)
    (load,) = bench.side.build_connector_meta(make_output()).loads
    assert not load.withdrawn
    assert len(load.slots) == 4


# ---------------------------------------------------------------- opt-outs


@pytest.mark.parametrize(
    ("params", "save", "load"),
    [
        (None, True, True),
        ({}, True, True),
        ({"other": 1}, True, True),
        ({"kvoffload": {}}, True, True),
        ({"kvoffload": {"save": False}}, False, True),
        ({"kvoffload": {"load": False}}, True, False),
        ({"kvoffload": {"save": False, "load": False}}, False, False),
        ({"kvoffload": {"save": "no"}}, True, True),
        ({"kvoffload": {"sav": False}}, True, True),
        ({"kvoffload": 3}, True, True),
    ],
)
def test_opt_outs(params: object, save: bool, load: bool) -> None:
    assert opt_outs(make_request("r", 4, params=params)) == (save, load)


@pytest.mark.parametrize(
    ("bench", "changes", "loads", "saves"),
    [
        (Bench(), {}, True, True),
        (Bench(extras=None), {}, False, False),
        (Bench(save=False), {}, True, False),
        (Bench(), {"skip_reading": True}, False, True),
        (Bench(), {"params": {"kvoffload": {"load": False}}}, False, True),
        (Bench(), {"params": {"kvoffload": {"save": False}}}, True, False),
    ],
    ids=["all", "unidentified", "saving off", "prompt logprobs", "no load", "no save"],
)
def test_who_loads_and_saves(bench: Bench, changes: dict[str, Any], loads: bool, saves: bool) -> None:
    request = bench.new(**changes)
    bench.match(request)
    assert bool(bench.hub.of(MatchPrefix)) == loads
    bench.admit(request, (1, 2, 3, 4, 5))
    metadata = bench.side.build_connector_meta(make_output({"r": 17}, {"r": [1, 2, 3, 4, 5]}))
    assert bool(bench.hub.of(ReserveSlots)) == bool(metadata.saves) == saves


def test_an_answer_to_a_request_that_ended_is_not_taken_for_one_of_the_same_name() -> None:
    bench = Bench()
    old = bench.new("r")
    assert bench.match(old) == (None, False)
    late = hit_for(bench.side.records["r"], 4)
    bench.side.request_finished(old)
    new = bench.new("r")
    new._all_token_ids = list(range(500, 517))
    bench.hub.inbox.append(late)
    assert bench.match(new) == (None, False)
    bench.side.build_connector_meta(make_output())
    assert bench.match(new, slots=2) == (8, True)


def test_hits_that_nobody_asks_for_are_given_back_in_time() -> None:
    bench = Bench()
    waiting = bench.new("waiting", 33)
    assert bench.match(waiting, slots=2) == (2 * BLOCK_SIZE, True)
    record = bench.side.records["waiting"]
    assert record.hit is not None
    bench.clock.now = record.hit.expires - 0.01
    bench.side.build_connector_meta(make_output())
    assert record.phase is Phase.HELD
    bench.clock.now += 2.0
    bench.side.build_connector_meta(make_output())
    assert (record.phase, record.has_credit, bench.side.matcher.credits) == (Phase.NEW, False, 4)
    assert bench.hub.posted[-1] == ReleaseHit("waiting", record.sequence)
