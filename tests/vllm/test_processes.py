"""The engine in two and in three processes (vLLM's default on CPU), engines side by side, and the name that vLLM knows us by."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.vllm import environment
from tests.vllm.connectors import faulty_config, transfer_config
from tests.vllm.harness import Engine, engine
from tests.vllm.outputs import assert_same
from tests.vllm.plain import Plain
from tests.vllm.prompts import prompt, prompts
from tests.vllm.roundtrip import check_roundtrip


def _exercise(served: Engine, plain: Plain) -> None:
    """The main things, briefly: lengths, sharing, the next turn, preemption, abort, reset."""
    asked = prompts([1, 32, 33, 97, 200], "processes")
    check_roundtrip(served, plain, asked, tokens=12)
    served.forget()
    [shared] = served.generate([[*asked[4][:100], *prompt(50, "tail")]])
    assert shared.cached == 96
    crowd = prompts([180, 150, 210, 120, 160, 140], "crowd")
    assert_same(plain.generate(crowd, 60), served.generate(crowd, 60))
    assert served.preemptions() > 0
    served.forget()
    found = served.generate(crowd, 60)
    assert_same(plain.generate(crowd, 60), found)
    assert sum(output.cached for output in found) > 0
    served.forget()
    names = [served.submit(one, 12) for one in crowd]
    served.step()
    served.abort(names[::2])
    served.run()
    assert_same(plain.generate(crowd[1::2], 12), [served.take(name) for name in names[1::2]])
    served.flush()
    assert served.reset()
    served.noise(5)
    found = served.generate(asked)
    assert_same(plain.generate(asked), found)
    assert [output.cached for output in found] == [0] * len(asked)
    served.forget()
    assert served.generate(asked)[4].cached == 192


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long), 3])
def test_engine_in_so_many_processes(plain: Plain, processes: int) -> None:
    with engine(processes=processes, transfer=faulty_config(), num_gpu_blocks_override=30, max_model_len=512) as served:
        _exercise(served, plain)


@pytest.mark.long
def test_two_engines_given_one_engine_id(plain: Plain) -> None:
    """One in this process, one in three of its own; each has its own L1, and neither knows of the other."""
    here, there = ({**faulty_config(), "engine_id": "twin"} for _ in range(2))
    mine, theirs, both = prompt(200, "mine"), prompt(300, "theirs"), prompt(250, "both")
    with engine(processes=3, transfer=there) as second, engine(transfer=here) as first:
        for served, own in ((first, mine), (second, theirs)):
            check_roundtrip(served, plain, [own, both])
        for served, other in ((first, theirs), (second, mine)):
            served.forget()
            [unknown, known] = served.generate([other, both])
            assert_same(plain.generate([other, both]), [unknown, known])
            assert (unknown.cached, known.cached) == (0, 224)
        second.close()
        first.forget()
        assert first.generate([mine])[0].cached == 192


def test_nothing_is_left_of_an_engine(plain: Plain) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with engine(transfer=transfer_config()) as served:
        check_roundtrip(served, plain, [prompt(100, "left")])
        assert any(thread.name.startswith("kvoffload") for thread in threading.enumerate())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvoffload")]
    left = {_target(number) for number in set(os.listdir("/proc/self/fd")) - before}
    assert not [target for target in left if "memfd" in target and "kvoffload" in target]


def _target(number: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return ""


_BY_NAME = """
from tests.vllm.harness import Engine
from tests.vllm.prompts import prompt
if __name__ == "__main__":
    transfer = {"kv_connector": "KVOffloadConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"l1": {"capacity_gb": 0.25}}}
    with Engine(transfer=transfer) as served:
        cold = served.generate([prompt(100, "by name")])
        served.forget()
        hit = served.generate([prompt(100, "by name")])
        assert hit[0].tokens == cold[0].tokens and hit[0].cached == 96, hit
    print("served by name")
"""


@pytest.mark.long
def test_by_name(tmp_path: Path) -> None:
    """As installed, vLLM finds the connector through its plugin entry point; here the entry point is all that is installed."""
    info = tmp_path / "kvoffload_by_name-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvoffload-by-name\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nkvoffload = kvoffload.connector.plugin:register\n")
    (tmp_path / "program.py").write_text(_BY_NAME)
    path = os.pathsep.join([str(environment.ROOT / "src"), str(environment.ROOT), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=200
    )
    assert "served by name" in done.stdout, done.stdout + done.stderr
