"""The same cases under AddressSanitizer and UndefinedBehaviorSanitizer, with red zones right at the ends of the memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cuda.kernels.shim import SANITIZERS, build_shim

pytestmark = pytest.mark.cuda

TREE = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shim(tmp_path_factory.mktemp("sanitized"), flags=SANITIZERS)


def drive(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.cuda.kernels.driver", str(library), *arguments]
    return subprocess.run(command, cwd=TREE, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("guard", ["0", "4096"])
def test_nothing_is_found(library: Path, guard: str) -> None:
    run = drive(library, "--guard", guard)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {"": None}


@pytest.mark.parametrize(("what", "finding"), [("beyond", "heap-buffer-overflow"), ("misaligned", "misaligned address")])
def test_what_no_plan_may_ask_for_is_found(library: Path, what: str, finding: str) -> None:
    """That the sanitizers see the kernels' accesses."""
    run = drive(library, "--offend", what)
    assert run.returncode != 0
    assert finding in run.stderr
