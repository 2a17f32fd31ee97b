"""Copies held past every deadline, parts that die, loops that hang, hooks with a bug: vLLM, in one process, says what it always says."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.vllm.connectors import faulty_config
from tests.vllm.harness import Engine, engine
from tests.vllm.insides import DEADLINES, PAIR_TIMEOUT_S, START_DEADLINE_S, HookTimes, Insides, hanging, until
from tests.vllm.outputs import assert_same
from tests.vllm.plain import Plain
from tests.vllm.prompts import prompt, prompts
from tests.vllm.roundtrip import check_hits

BLOCKS = 40
"""Of the engine: one of the prompts below takes 11, so four of them take all."""

seeds = itertools.count()


@pytest.fixture(scope="module")
def served(plain: Plain) -> Iterator[Engine]:
    with engine(transfer=faulty_config(**DEADLINES), num_gpu_blocks_override=BLOCKS) as started:
        yield started


@pytest.fixture
def insides(served: Engine) -> Iterator[Insides]:
    """A connector of its own for each test, which may break it."""
    if served.scheduler.has_requests():
        served.idle_steps(5)
    served.assert_nothing_leaked()
    served.drop_engine_cache()
    found = Insides(served)
    found.renew()
    yield found
    served.copies.release()


def new_prompt() -> list[int]:
    return prompt(330, ("fault", next(seeds)))


def takers() -> list[list[int]]:
    """More than the engine's whole cache."""
    seed = next(seeds)
    return prompts([400, 400, 330], ("takers", seed))


def settle(served: Engine) -> None:
    """vLLM is told of all that has ended."""
    for _ in range(2000):
        if not served.scheduler.requests:
            break
        served.idle_steps(1)
    served.assert_nothing_leaked()


def same(served: Engine, plain: Plain, asked: list[list[int]], tokens: int = 8) -> None:
    assert_same(plain.generate(asked, tokens), served.generate(asked, tokens))


def in_l1(served: Engine, plain: Plain, *asked: list[int]) -> None:
    """Of these the engine has nothing, and L1 all."""
    assert_same(plain.generate(asked), served.generate(asked))
    served.forget()


def ready(insides: Insides) -> int:
    from kvoffload.l1.states import State

    statistics = insides.hub.statistics()
    assert statistics is not None
    return statistics.slots[State.READY]


# ---------------------------------------------------------------- what dies


def crash_actor(insides: Insides) -> None:
    nonsense: Any = object()
    insides.worker.loop.call_soon(lambda: insides.worker.runtime._grants.owe(nonsense))


def crash_l1(insides: Insides) -> None:
    nonsense: Any = object()
    insides.hub.owe(nonsense)


def end_loop(insides: Insides) -> None:
    insides.worker.loop.stop(10)


Die = Callable[[Insides], None]
DEATHS: list[Die] = [crash_actor, crash_l1, end_loop]


# ---------------------------------------------------------------- copies that are held (Done means 4)


@pytest.mark.parametrize("die", [None, *DEATHS])
def test_a_save_held_past_every_deadline(served: Engine, insides: Insides, plain: Plain, die: Die | None) -> None:
    """Its request is aborted and others have its blocks when it goes on: what it reads then is nobody's prompt."""
    asked = new_prompt()
    served.copies.hold_saves()
    name = served.submit(asked, 60)
    served.step_until(lambda: served.copies.wait_held("save", 0.0))
    blocks = served.copies.calls[-1].blocks
    ledger = insides.connector.scheduler_half.ledger  # type: ignore[union-attr]
    epochs = ledger.epochs(blocks)
    held_since = time.monotonic()
    if die is not None:
        die(insides)
    served.abort([name])
    same(served, plain, takers(), 30)
    until(lambda: time.monotonic() > held_since + PAIR_TIMEOUT_S + 0.2, "all deadlines are over")
    assert all(new > old for old, new in zip(epochs, ledger.epochs(blocks), strict=True)), "others had its blocks, all of them"
    assert served.copies.wait_held("save", 0.0)
    served.copies.release()
    assert insides.worker.runtime.hands.wait_idle(20)
    if die is None:
        served.flush()
    else:
        assert ready(insides) == 0
    served.drop_engine_cache()
    served.noise()
    [again] = served.generate([asked])
    assert_same(plain.generate([asked]), [again])
    assert again.cached == 0
    if die is None:
        served.forget()
        check_hits(served, plain, [asked])


@pytest.mark.parametrize("die", [None, *DEATHS])
def test_a_load_held_past_every_deadline(served: Engine, insides: Insides, plain: Plain, die: Die | None) -> None:
    """Its request is aborted: its blocks go to nobody until it has ended, and then it is reported, once (vLLM dies of a second time)."""
    asked = new_prompt()
    in_l1(served, plain, asked)
    served.copies.hold_loads()
    name = served.submit(asked)
    served.step_until(lambda: served.copies.wait_held("load", 0.0))
    held = served.copies.calls[-1].blocks
    ledger = insides.connector.scheduler_half.ledger  # type: ignore[union-attr]
    epochs = ledger.epochs(held)
    held_since = time.monotonic()
    if die is not None:
        die(insides)
    served.abort([name])
    while time.monotonic() < held_since + START_DEADLINE_S + 0.2:
        same(served, plain, [*takers(), new_prompt()], 30)
    assert served.copies.wait_held("load", 0.0)
    assert ledger.epochs(held) == epochs, "its blocks went to nobody"
    assert served.scheduler.requests, "and it is not reported"
    served.copies.release()
    settle(served)
    same(served, plain, takers(), 30)
    if die is None:
        served.forget()
        check_hits(served, plain, [asked])


@pytest.mark.parametrize("kind", ["save", "load"])
def test_a_copy_thread_crashes(served: Engine, insides: Insides, plain: Plain, kind: str) -> None:
    """Held past its deadline first, with its request aborted meanwhile."""
    asked = new_prompt()
    if kind == "load":
        in_l1(served, plain, asked)
        served.copies.hold_loads()
    else:
        served.copies.hold_saves()
    served.copies.crash_next(kind)
    name = served.submit(asked, 40)
    served.step_until(lambda: served.copies.wait_held(kind, 0.0))
    held_since = time.monotonic()
    served.abort([name])
    others = takers()
    same(served, plain, others, 30)
    until(lambda: time.monotonic() > held_since + 1.2, "all deadlines are over")
    served.copies.release()
    until(lambda: insides.hub.off_reason, "the connector goes off")
    settle(served)
    same(served, plain, [asked, *others])
    assert insides.side.off_reason is not None
    settle(served)


# ---------------------------------------------------------------- the runtime is dead (Done means 5)


@pytest.mark.parametrize("die", DEATHS)
@pytest.mark.parametrize("when", ["from the start", "while a request runs", "while a load is queued"])
def test_dead(served: Engine, insides: Insides, plain: Plain, die: Die, when: str) -> None:
    asked, running = new_prompt(), prompt(200, next(seeds))
    if when == "from the start":
        die(insides)
        until(lambda: not insides.hub.is_live, "it is noticed")
    else:
        in_l1(served, plain, asked)
    times = HookTimes.start(insides)
    names = [served.submit(running, 40)]
    for _ in range(4):
        served.step()
    if when == "while a load is queued":
        served.copies.hold_loads()
        names.append(served.submit(asked, 40))
        served.step_until(lambda: served.copies.wait_held("load", 0.0))
        names.append(served.submit(asked, 40))
        served.step_until(lambda: insides.worker_side.has_pending_loads)
        served.step()
        die(insides)
        served.step_until(lambda: len(insides.worker_side._pending) == 1)
        served.copies.release()
    else:
        die(insides)
        names += [served.submit(asked, 40), served.submit(asked, 40)]
    begun = time.monotonic()
    served.run()
    found = [served.take(name) for name in names]
    assert_same(plain.generate([running, asked, asked], 40), found)
    same(served, plain, [*takers(), asked])
    assert time.monotonic() - begun < 30
    times.check()
    settle(served)
    assert not insides.hub.is_live


def test_a_crash_of_l1_is_loud_once_and_ends_all_promises(
    served: Engine, insides: Insides, plain: Plain, caplog: pytest.LogCaptureFixture
) -> None:
    asked = new_prompt()
    in_l1(served, plain, asked)
    crash_l1(insides)
    until(lambda: insides.hub.off_reason, "it is off")
    same(served, plain, [asked])
    assert insides.side.off_reason is not None
    errors = [record for record in caplog.records if record.name.startswith("kvoffload") and "connector off" in record.getMessage()]
    assert len([record for record in errors if record.levelname == "ERROR"]) == 1, errors


# ---------------------------------------------------------------- the loop hangs


def test_a_hang_while_nothing_is_pending(served: Engine, insides: Insides, plain: Plain) -> None:
    asked, other = new_prompt(), new_prompt()
    in_l1(served, plain, asked)
    times = HookTimes.start(insides)
    with hanging(insides.worker.loop):
        # At first it is only late: each request is asked about for 50 ms, and no step waits more than once.
        first = served.generate([asked, *prompts([40] * 12, next(seeds)), other])
        assert_same(plain.generate([asked, other]), [first[0], first[-1]])
        assert [output.cached for output in first] == [0] * 14
        until(lambda: not insides.hub.is_live, "the missing heartbeat is noticed")
        asked_before = len(times.matching)
        same(served, plain, [*takers(), asked])
        late = list(times.matching.values())[asked_before:]
        assert sorted(late)[len(late) // 2] < 0.005, "nobody is asked any more"
        assert len(served.scheduler.requests) == 0
    times.check()
    until(lambda: insides.hub.is_live, "the heartbeat is back")
    served.forget()
    check_hits(served, plain, [asked])
    served.flush()
    statistics = insides.hub.statistics()
    assert statistics is not None
    assert statistics.leases == 0, "late hits are given back"


def test_a_hang_while_loads_are_pending(served: Engine, insides: Insides, plain: Plain) -> None:
    """One has started, and ends when it is let go; one waits behind it, for its start deadline; one comes when all hangs."""
    asked = [new_prompt() for _ in range(3)]
    for one in asked:
        in_l1(served, plain, one)
    served.copies.hold_loads()
    names = [served.submit(asked[0])]
    served.step_until(lambda: served.copies.wait_held("load", 0.0))
    names.append(served.submit(asked[1]))
    served.step_until(lambda: len(insides.worker_side._pending) == 2)
    queued_at = time.monotonic()
    times = HookTimes.start(insides)
    with hanging(insides.worker.loop):
        names.append(served.submit(asked[2]))
        served.step_until(lambda: served.is_finished(names[2]), 100_000)
        served.step_until(lambda: served.is_finished(names[1]), 100_000)
        assert time.monotonic() - queued_at < START_DEADLINE_S + 1.0
        assert not served.is_finished(names[0])
        served.copies.release()
        served.run()
        found = [served.take(name) for name in names]
        assert_same(plain.generate(asked), found)
        assert found[0].cached == 320
    times.check()
    settle(served)


@pytest.mark.parametrize("checked", [True, False])
def test_a_save_torn_in_a_hang_is_never_ready(served: Engine, insides: Insides, plain: Plain, checked: bool) -> None:
    """The ledger goes on without a loop. Without its check this test fails, so the bytes were torn."""
    asked = new_prompt()
    served.copies.ignore_ledger(not checked)
    served.copies.hold_saves()
    name = served.submit(asked, 60)
    served.step_until(lambda: served.copies.wait_held("save", 0.0))
    with hanging(insides.worker.loop):
        served.abort([name])
        same(served, plain, takers(), 30)
        served.copies.release()
        assert insides.worker.runtime.hands.wait_idle(20)
    until(lambda: insides.hub.is_live, "the heartbeat is back")
    served.forget()
    [again] = served.generate([asked])
    if checked:
        assert_same(plain.generate([asked]), [again])
    assert again.cached == (0 if checked else 320)


# ---------------------------------------------------------------- hooks with a bug


class Broken:
    """Stands for one of our parts; these of its attributes raise, the first ``times`` times that they are looked at."""

    def __init__(self, part: Any, names: str, times: int = 1 << 30) -> None:
        self._part, self._names, self._left = part, names.split(), times

    def __getattr__(self, name: str) -> Any:
        if name in self._names and self._left > 0:
            self._left -= 1
            raise RuntimeError(f"{name} is broken")
        return getattr(self._part, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._part)


def broken(place: str, names: str, times: int = 1 << 30) -> Callable[[Insides], None]:
    """``place``: the part, from `Insides` on."""

    def break_it(insides: Insides) -> None:
        owner: Any = insides
        *path, last = place.split(".")
        for step in path:
            owner = getattr(owner, step)
        setattr(owner, last, Broken(getattr(owner, last), names, times))

    return break_it


HOOKS = {
    "on_new_request": broken("connector.scheduler_half.side", "on_new_request"),
    "get_num_new_matched_tokens": broken("connector.scheduler_half.side", "get_num_new_matched_tokens"),
    "update_state_after_alloc": broken("connector.scheduler_half.side", "update_state_after_alloc"),
    "build_connector_meta": broken("connector.scheduler_half.side", "build_connector_meta"),
    "build_connector_meta, and once what makes up for it": broken("connector.scheduler_half.side", "take_planned build_connector_meta", 2),
    "update_connector_output": broken("connector.scheduler_half.side", "update_connector_output"),
    "request_finished": broken("connector.scheduler_half.side", "request_finished"),
    "turning off": broken("connector.scheduler_half.side", "request_finished turn_off"),
    "statistics": broken("connector.scheduler_half._statistics", "take"),
    "records": broken("side.records", "get pop"),
    "ledger.bump": broken("side._ledger", "bump"),
    "ledger.epochs": broken("side.saver._ledger", "epochs"),
    "hub.take": broken("side._hub", "take"),
    "hub.offer": broken("side.matcher._hub", "offer"),
    "hub.is_live": broken("side.matcher._hub", "is_live"),
    "hub.wait": broken("side.matcher._hub", "wait"),
    "hub.owe": broken("side._hub", "owe"),
    "hub, for saves": broken("side.saver._hub", "offer is_live"),
    "start_load_kv": broken("worker_connector.worker_half.side", "start_load_kv"),
    "wait_for_save": broken("worker_connector.worker_half.side", "wait_for_save"),
    "get_finished, once": broken("worker_connector.worker_half.side", "get_finished", 1),
    "copies.mark": broken("worker_side._copies", "mark"),
    "copies.load": broken("worker_side._copies", "load"),
    "copies.save": broken("worker_side._copies", "save"),
    "copies.take, once": broken("worker_side._copies", "take", 1),
    "copies.wait": broken("worker_side._copies", "wait"),
}


CORE = {"update_state_after_alloc", "build_connector_meta", "turning off", "records", "hub.owe", "copies.mark", "get_finished, once"}
"""The others are alike."""


@pytest.mark.parametrize("broken_part", [name if name in CORE else pytest.param(name, marks=pytest.mark.long) for name in HOOKS])
def test_no_exception_leaves_a_hook(
    served: Engine, insides: Insides, plain: Plain, broken_part: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever raises inside: the outputs are plain vLLM's, every request ends, nothing leaks, and it is said."""
    asked = new_prompt()
    in_l1(served, plain, asked)
    HOOKS[broken_part](insides)
    same(served, plain, [asked])
    same(served, plain, [asked, *takers()], 20)
    same(served, plain, [prompt(200, next(seeds)), asked])
    served.reset()
    settle(served)
    failed = [record.getMessage() for record in caplog.records if "a hook failed" in record.getMessage()]
    if broken_part not in ("hub.wait", "copies.wait"):  # whether anybody has to wait is a matter of luck
        assert failed, "it was not broken at all"
    assert len(failed) == len(set(failed)), "each hook says so once"


def test_a_save_under_way_when_a_hook_fails_does_not_count(served: Engine, insides: Insides, plain: Plain) -> None:
    """The blocks that vLLM handed out in the failed hook were not bumped by it."""
    asked = new_prompt()
    served.copies.hold_saves()
    name = served.submit(asked, 60)
    served.step_until(lambda: served.copies.wait_held("save", 0.0))
    broken("connector.scheduler_half.side", "update_state_after_alloc")(insides)
    served.abort([name])
    same(served, plain, takers(), 30)
    served.copies.release()
    assert insides.worker.runtime.hands.wait_idle(20)
    until(lambda: insides.hub.flush().wait_sync(20) is True, "all is reported")
    assert ready(insides) == 0
