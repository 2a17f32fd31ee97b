"""The hub's loop and the worker's are two here: either hangs, or both, and at last the link between them is cut."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tests.vllm.connectors import faulty_config
from tests.vllm.harness import Engine, engine
from tests.vllm.insides import DEADLINES, HookTimes, Insides, hanging, until
from tests.vllm.outputs import assert_same
from tests.vllm.plain import Plain
from tests.vllm.prompts import prompt, prompts
from tests.vllm.roundtrip import check_hits

seeds = itertools.count()


@pytest.fixture(scope="module")
def served(plain: Plain) -> Iterator[Engine]:
    extension = "tests.vllm.insides.FaultAccess"
    with engine(processes=2, transfer=faulty_config(**DEADLINES), num_gpu_blocks_override=40, worker_extension_cls=extension) as started:
        Insides(started).wait_live()
        yield started


def fault(served: Engine, what: str) -> str | None:
    """In the worker's process."""
    [said] = served.llm.collective_rpc("fault", args=(what,))
    return None if said is None else str(said)


@contextmanager
def hung(served: Engine, which: str) -> Iterator[None]:
    if which != "hub":
        fault(served, "hang")
    with hanging(*([Insides(served).hub_loop] if which != "worker" else [])):
        yield
    if which != "hub":
        fault(served, "go on")


@pytest.mark.parametrize("which", ["worker", "hub", "both"])
def test_a_hang(served: Engine, plain: Plain, which: str) -> None:
    """Outputs are plain vLLM's, nobody waits, what was torn is not READY, a started load ends; and all goes on when the hang ends."""
    insides = Insides(served)
    until(lambda: insides.hub.is_live, "all is well")
    asked, loading, torn = (prompt(330, ("two", next(seeds))) for _ in range(3))
    takers = prompts([400, 400, 330], ("two", next(seeds)))
    served.generate([asked, loading])
    served.forget()
    fault(served, "hold loads")
    name = served.submit(loading)
    served.step_until(lambda: fault(served, "held load") is not None)
    fault(served, "hold saves")
    torn_name = served.submit(torn, 60)
    served.step_until(lambda: fault(served, "held save") is not None)
    times = HookTimes.start(insides)
    with hung(served, which):
        served.abort([torn_name])
        other = [served.submit(one) for one in (asked, *takers, *takers)]
        served.step_until(lambda: all(served.is_finished(one) for one in other), 200_000)
        assert not served.is_finished(name)
        found = [served.take(one) for one in other]
        assert_same(plain.generate([asked, *takers, *takers]), found)
        fault(served, "release")
        served.run()
        loaded = served.take(name)
        assert_same(plain.generate([loading]), [loaded])
        assert loaded.cached == 320
        until(lambda: not insides.hub.is_live, "the missing heartbeat is noticed")
        assert_same(plain.generate([asked]), served.generate([asked]))
    times.check()
    until(lambda: insides.hub.is_live, "the heartbeats are back")
    served.forget()
    [again] = served.generate([torn])
    assert_same(plain.generate([torn]), [again])
    assert again.cached == 0
    check_hits(served, plain, [asked])
    served.forget()
    check_hits(served, plain, [torn])


def test_the_link_is_cut(served: Engine, plain: Plain) -> None:
    """Last: there is no way back from it. One load has started and ends, the one behind it is withdrawn."""
    insides = Insides(served)
    until(lambda: insides.hub.is_live, "all is well")
    asked = [prompt(200, ("cut", number)) for number in range(2)]
    served.generate(asked)
    served.forget()
    fault(served, "hold loads")
    names = [served.submit(one) for one in asked]
    served.step_until(lambda: fault(served, "held load") is not None)
    assert insides.hub_host._link is not None
    insides.hub_host._link._connection._socket.shutdown(socket.SHUT_RDWR)
    served.step_until(lambda: served.is_finished(names[1]), 200_000)
    assert not served.is_finished(names[0])
    fault(served, "release")
    served.run()
    found = [served.take(name) for name in names]
    assert_same(plain.generate(asked), found)
    assert found[0].cached == 192
    until(lambda: fault(served, "off"), "the worker's half is off")
    assert insides.hub.off_reason is not None
    assert_same(plain.generate(asked), served.generate(asked))
