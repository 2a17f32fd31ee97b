"""What is offered to L1, and when."""

from __future__ import annotations

import itertools

import pytest
from tests.connector.ports import BLOCK_SIZE, NAMESPACE, Clock, FakeHub, FakeLedger, generate, make_output, make_record

from kvoffload.connector.record import RequestRecord
from kvoffload.connector.saver import REOFFER_STEPS, Saver, cut
from kvoffload.keys import KeyChain
from kvoffload.messages import ROOT, DropReason, ReserveSlots, SaveRun


class Bench:
    def __init__(self) -> None:
        self.hub = FakeHub(Clock())
        jobs = itertools.count(1)
        self.saver = Saver(self.hub, FakeLedger(), lambda: next(jobs), block_size=BLOCK_SIZE)
        self.records: dict[str, RequestRecord] = {}

    def record(self, name: str, tokens: int, *, may_save: bool = True) -> RequestRecord:
        record = self.records[name] = make_record(name, tokens, may_save=may_save)
        record.set_saved(0)
        return record

    def step(self, scheduled: dict[str, int], tables: dict[str, list[int]]) -> list[SaveRun]:
        """Plan a step, then let vLLM count its tokens; the runs offered."""
        before = len(self.hub.posted)
        jobs = self.saver.plan(make_output(scheduled, tables), self.records)
        posted = [message for message in self.hub.posted[before:] if isinstance(message, ReserveSlots)]
        assert tuple(message.job for message in posted) == jobs
        for name, tokens in scheduled.items():
            self.records[name].request.num_computed_tokens += tokens
        return [run for message in posted for run in message.runs]


def keys_of(record: RequestRecord, blocks: int) -> list[bytes]:
    chain = KeyChain(NAMESPACE, BLOCK_SIZE)
    chain.extend(record.request._all_token_ids, b"", blocks * BLOCK_SIZE)
    return list(chain.keys)


@pytest.mark.parametrize(("tokens", "full"), [(1, 0), (3, 0), (4, 1), (5, 1), (7, 1), (8, 2), (9, 2)])
def test_full_blocks_of_a_prompt(tokens: int, full: int) -> None:
    bench = Bench()
    record = bench.record("r", tokens)
    runs = bench.step({"r": tokens}, {"r": [11, 12, 13]})
    if not full:
        assert runs == []
        return
    expected = SaveRun("r", ROOT, tuple(keys_of(record, full)), (11, 12, 13)[:full], (111, 112, 113)[:full])
    assert runs == [expected]
    assert bench.saver.offered_blocks == full


def test_chunked_prefill_offers_each_block_once_with_its_parent() -> None:
    bench = Bench()
    record = bench.record("r", 16)
    offered = [bench.step({"r": tokens}, {"r": [11, 12, 13, 14]}) for tokens in (3, 3, 6, 4)]
    keys = keys_of(record, 4)
    assert [[run.blocks for run in runs] for runs in offered] == [[], [(11,)], [(12, 13)], [(14,)]]
    assert [run.parent for runs in offered for run in runs] == [ROOT, keys[0], keys[2]]
    assert [run.keys for runs in offered for run in runs] == [(keys[0],), (keys[1], keys[2]), (keys[3],)]


def test_generated_tokens_are_offered_when_they_are_known_and_computed() -> None:
    bench = Bench()
    record = bench.record("r", 4)
    assert len(bench.step({"r": 4}, {"r": [11]})) == 1
    for _ in range(3):
        generate(record.request, 1)
        assert bench.step({"r": 1}, {"r": [11, 12]}) == []
    generate(record.request, 1)
    (run,) = bench.step({"r": 1}, {"r": [11, 12]})
    assert run.blocks == (12,)


def test_drafts_and_placeholders_do_not_make_a_block_full() -> None:
    bench = Bench()
    record = bench.record("r", 6)
    assert [run.blocks for run in bench.step({"r": 6}, {"r": [11, 12]})] == [(11,)]
    # One known token and three drafts fill the second block, for now.
    generate(record.request, 1)
    assert bench.step({"r": 4}, {"r": [11, 12, 13]}) == []
    # vLLM takes back what was rejected.
    record.request.num_computed_tokens = 7
    generate(record.request, 1)
    (run,) = bench.step({"r": 1}, {"r": [11, 12]})
    assert run.keys == (keys_of(record, 2)[1],)


def test_blocks_that_the_engine_had_are_offered_the_first_time() -> None:
    bench = Bench()
    record = bench.record("r", 12)
    record.request.num_computed_tokens = 8
    (run,) = bench.step({"r": 4}, {"r": [11, 12, 13]})
    assert run.blocks == (11, 12, 13)


def test_blocks_that_came_from_l1_are_not_offered() -> None:
    bench = Bench()
    record = bench.record("r", 12)
    record.request.num_computed_tokens = 8
    record.set_saved(2)
    (run,) = bench.step({"r": 4}, {"r": [11, 12, 13]})
    assert run.blocks == (13,)
    assert run.parent == keys_of(record, 3)[1]


def test_opting_out_and_unknown_requests() -> None:
    bench = Bench()
    bench.record("out", 8, may_save=False)
    output = make_output({"out": 8, "nobody": 8}, {"out": [11, 12], "nobody": [13, 14]})
    assert bench.saver.plan(output, bench.records) == ()
    assert not bench.hub.posted


def test_nothing_is_offered_to_a_hub_that_is_not_live_and_all_of_it_later() -> None:
    bench = Bench()
    bench.record("r", 12)
    bench.hub.is_live = False
    assert bench.step({"r": 8}, {"r": [11, 12, 13]}) == []
    bench.hub.is_live = True
    (run,) = bench.step({"r": 4}, {"r": [11, 12, 13]})
    assert run.blocks == (11, 12, 13)


def test_a_refused_reservation_is_counted_and_its_job_is_not_told() -> None:
    bench = Bench()
    bench.record("r", 12)
    bench.hub.refuses = True
    assert bench.step({"r": 8}, {"r": [11, 12, 13]}) == []
    assert bench.saver.drops == {DropReason.POST_REFUSED: 2}
    assert bench.saver.offered_blocks == 0
    bench.hub.refuses = False
    # Its blocks are not offered again, unless L1 misses them.
    (run,) = bench.step({"r": 4}, {"r": [11, 12, 13]})
    assert run.blocks == (13,)


def test_the_whole_prefix_is_offered_again_at_most_once_in_so_many_steps() -> None:
    bench = Bench()
    record = bench.record("r", 12)
    record.set_saved(3)
    bench.saver.offer_again(record, step=10)
    assert record.saved_blocks == 0
    record.set_saved(3)
    bench.saver.offer_again(record, step=10 + REOFFER_STEPS - 1)
    assert record.saved_blocks == 3
    bench.saver.offer_again(record, step=10 + REOFFER_STEPS)
    assert record.saved_blocks == 0


def test_nothing_from_the_null_block_on() -> None:
    bench = Bench()
    bench.record("r", 16)
    (run,) = bench.step({"r": 16}, {"r": [11, 12, 0, 14]})
    assert run.blocks == (11, 12)
    assert len(run.keys) == len(run.epochs) == 2


def test_nothing_where_the_first_block_is_null() -> None:
    bench = Bench()
    bench.record("r", 8)
    assert bench.step({"r": 8}, {"r": [0, 12]}) == []


def test_nothing_from_where_the_tokens_cannot_be_identified() -> None:
    bench = Bench()
    record = bench.record("r", 16)
    record.extras = lambda start, end: b"" if start < 8 else None
    (run,) = bench.step({"r": 16}, {"r": [11, 12, 13, 14]})
    assert run.blocks == (11, 12)
    generate(record.request, 4)
    assert bench.step({"r": 4}, {"r": [11, 12, 13, 14, 15]}) == []


def test_all_requests_of_a_step_make_one_job() -> None:
    bench = Bench()
    for name in "abc":
        bench.record(name, 4)
    jobs = bench.saver.plan(make_output(dict.fromkeys("abc", 4), {"a": [11], "b": [12], "c": [13]}), bench.records)
    assert jobs == (1,)


def test_a_long_prompt_is_cut_into_jobs_of_500_blocks() -> None:
    bench = Bench()
    record = bench.record("r", 1203 * BLOCK_SIZE)
    bench.record("s", 2 * BLOCK_SIZE)
    tables = {"r": list(range(1, 1204)), "s": [2001, 2002]}
    jobs = bench.saver.plan(make_output({"r": 1203 * BLOCK_SIZE, "s": 2 * BLOCK_SIZE}, tables), bench.records)
    posted = bench.hub.of(ReserveSlots)
    assert jobs == (1, 2, 3)
    assert [[len(run.keys) for run in message.runs] for message in posted] == [[500], [500], [203, 2]]
    keys = keys_of(record, 1203)
    assert [message.runs[0].parent for message in posted] == [ROOT, keys[499], keys[999]]
    assert [run.blocks[0] for message in posted for run in message.runs] == [1, 501, 1001, 2001]


@pytest.mark.parametrize(
    ("lengths", "limit", "cuts"),
    [
        ([3], 3, [[3]]),
        ([4], 3, [[3], [1]]),
        ([2, 2], 3, [[2, 1], [1]]),
        ([3, 3], 3, [[3], [3]]),
        ([7], 3, [[3], [3], [1]]),
        ([1, 1, 1], 3, [[1, 1, 1]]),
        ([], 3, []),
    ],
)
def test_cut(lengths: list[int], limit: int, cuts: list[list[int]]) -> None:
    runs = []
    for number, length in enumerate(lengths):
        keys = tuple(f"{number} {index}".encode() for index in range(length))
        runs.append(SaveRun(str(number), ROOT, keys, tuple(range(length)), tuple(range(length))))
    batches = cut(runs, limit)
    assert [[len(run.keys) for run in batch] for batch in batches] == cuts
    # Put together again they are what they were, each with the key before it as its parent.
    for number in range(len(lengths)):
        pieces = [run for batch in batches for run in batch if run.request == str(number)]
        assert tuple(key for run in pieces for key in run.keys) == runs[number].keys
        assert tuple(block for run in pieces for block in run.blocks) == runs[number].blocks
        assert [run.parent for run in pieces] == [ROOT, *(run.keys[-1] for run in pieces[:-1])]
