"""The demo's report; and the demo itself, with real vLLM."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from tests.infinistore.server import InfiniStoreServer

from kvoffload.cli.demo import is_success, report_lines, second_engine_lines, summary
from kvoffload.cli.demo_engine import Outcome
from kvoffload.cli.demo_prompts import SHARED_WORDS, demo_prompts

PROMPTS = demo_prompts()
LOADED = [Outcome(prompt, 3470, 1280, 2048, 3.2, 0.09, "a b", "a b", 33 << 20, True) for prompt in PROMPTS]
L1 = {
    "capacity": 100,
    "ready": 40,
    "slot_bytes": 1 << 20,
    "block_size": 128,
    "committed": 55,
    "shared": 7,
    "evictions": 15,
    "refused": {"no_slot": 12},
    "unanswered": {"late": 2},
}


def test_prompts_are_long_and_some_share_their_opening() -> None:
    assert all(1500 <= len(prompt.text.split()) <= 3500 for prompt in PROMPTS)
    openings = {tuple(prompt.text.split()[:SHARED_WORDS]) for prompt in PROMPTS if prompt.shares_opening}
    assert len(openings) == 1
    assert sum(prompt.shares_opening for prompt in PROMPTS) == 3
    assert len({prompt.text for prompt in PROMPTS}) == len(PROMPTS)


def test_the_report_fits_a_terminal_and_says_where_tokens_came_from() -> None:
    lines = report_lines(LOADED, L1, [])
    assert max(len(line) for line in lines) <= 100
    row = next(line for line in lines if "a long report" in line).split()
    assert row == ["a", "long", "report", "3,470", "1,280", "2,048", "142", "3.20", "s", "90", "ms", "36x", "33.0", "MiB", "yes"]


def test_the_report_says_what_was_refused_and_why() -> None:
    text = "\n".join(report_lines(LOADED, L1, []))
    assert "40 of 100 slots hold a block (40 %)" in text
    assert "12 blocks: L1 was full" in text
    assert "2 requests were not answered from L1: late" in text
    nothing = {**L1, "refused": {}, "unanswered": {}}
    assert "Refused: nothing." in "\n".join(report_lines(LOADED, nothing, []))


def test_a_different_answer_is_a_failure() -> None:
    wrong = [*LOADED[1:], replace(LOADED[0], second_text="a c", is_same=False)]
    assert is_success(LOADED)
    assert not is_success(wrong)
    assert summary(wrong).startswith("FAILED: 1 of 5 answers differ")
    assert 'then "a c ..."' in "\n".join(report_lines(wrong, L1, []))


def test_nothing_loaded_is_a_failure() -> None:
    computed = [replace(outcome, from_l1=0) for outcome in LOADED]
    assert not is_success(computed)
    assert summary(computed) == "FAILED: nothing came from host memory."
    assert summary(computed, "the node") == "FAILED: nothing came from the node."


def test_the_second_engine_s_part_says_where_blocks_were() -> None:
    lines = second_engine_lines(LOADED, {"backend": "infinistore", "nodes": ["10.0.0.1:12345", "10.0.0.2:12345"]})
    assert max(len(line) for line in lines) <= 100
    assert "InfiniStore, 10.0.0.1:12345, 10.0.0.2:12345" in lines[1]
    assert any("from L2" in line for line in lines)


@pytest.mark.vllm
@pytest.mark.timeout(400)
def test_the_demo_with_real_vllm() -> None:
    done = subprocess.run([sys.executable, "-m", "kvoffload.cli", "demo"], capture_output=True, text=True, timeout=380, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "came back from the node" in done.stdout
    assert done.stdout.rstrip().endswith("every answer was the same.")
    assert done.stderr == ""
    assert max(len(line) for line in done.stdout.splitlines()) <= 100


@pytest.mark.vllm
@pytest.mark.timeout(400)
def test_the_demo_with_the_real_infinistore(infinistore_server: InfiniStoreServer) -> None:
    command = [sys.executable, "-m", "kvoffload.cli", "demo", "--infinistore", infinistore_server.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=380, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrote to InfiniStore" in done.stdout
    assert infinistore_server.stored() > 0
