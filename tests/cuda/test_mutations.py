"""Tests that cannot fail prove nothing: every line of `mutations` is broken in a copy of the package, and its test has to notice."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet
from tests.cuda.mutations import MUTATIONS, Mutation

pytestmark = pytest.mark.cuda

TREE = Path(__file__).parents[2]
AT_THE_CORE = ("cuda/sequence.py", "cuda/lane.py", "cuda/batch.py", "cuda/kernels.py", "copy/cuda.py")
ABOUT_COPIES = ("cuda/test_engine_order.py", "cuda/test_batch.py", "cuda/test_engine_errors.py", "cuda/test_kernels.py", "contracts/")
SOME_FAILED = 1
"""Of pytest: tests ran, and some failed or broke a rule of the stand-in. Everything else, errors while collecting among it, is no proof."""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of src that may be spoilt."""
    copy = tmp_path_factory.mktemp("mutants") / "src"
    shutil.copytree(TREE / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def run(source: Path, test: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-o", f"pythonpath={source} .", f"tests/{test}"]
    return subprocess.run(command, cwd=TREE, capture_output=True, text=True, check=False, timeout=55)


def cases() -> list[ParameterSet]:
    """What copies wait for, read and check is tried each time; the others take minutes, and wait for who asks for `long` ones."""
    found = []
    for mutation in MUTATIONS:
        is_core = mutation.file.startswith(AT_THE_CORE) and mutation.test.startswith(ABOUT_COPIES)
        found.append(pytest.param(mutation, id=mutation.what.replace(" ", "_"), marks=[] if is_core else [pytest.mark.long]))
    return found


@pytest.mark.parametrize("mutation", cases())
def test_a_broken_line_is_noticed(mutation: Mutation, package: Path) -> None:
    path = package / "kvoffload" / mutation.file
    text = path.read_text()
    assert text.count(mutation.old) == 1, f"{mutation.file} has this {text.count(mutation.old)} times: {mutation.old}"
    path.write_text(text.replace(mutation.old, mutation.new))
    try:
        done = run(package, mutation.test)
    finally:
        path.write_text(text)
    assert done.returncode == SOME_FAILED, f"{mutation.what}: {mutation.test} passes without it\n{done.stdout[-3000:]}{done.stderr[-1000:]}"


def test_what_is_not_broken_passes(package: Path) -> None:
    """The copy itself is what the tests above run on."""
    done = run(package, MUTATIONS[0].test)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "passed" in done.stdout
