"""Each change to the kernels that changes what they do is noticed by a case."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.cuda.kernels.mutants import MUTANTS, Mutant, one_source
from tests.cuda.kernels.shim import SOURCE, build_shim

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(300)]

TREE = Path(__file__).parents[3]
AT_ONCE = 2


def fates(directory: Path, mutants: Sequence[Mutant]) -> dict[Mutant, str | None]:
    """What killed each of the mutants; None where nothing did. One compilation, one process that forks for each."""
    directory.mkdir()
    source = directory / "mutants.cu"
    source.write_text(one_source([mutant.apply(SOURCE.read_text()) for mutant in mutants]))
    library = build_shim(directory, source=source, flags=("-Og", "-w"))
    prefixes = [f"m{index}_" for index in range(len(mutants))]
    command = [sys.executable, "-m", "tests.cuda.kernels.driver", str(library), "--prefix", *prefixes]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=TREE, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    answers = json.loads(run.stdout)
    return {mutant: answers[prefix] for mutant, prefix in zip(mutants, prefixes, strict=True)}


@pytest.fixture(scope="module")
def fate(tmp_path_factory: pytest.TempPathFactory) -> dict[Mutant, str | None]:
    directory = tmp_path_factory.mktemp("mutants")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        parts = pool.map(lambda part: fates(directory / str(part), MUTANTS[part::AT_ONCE]), range(AT_ONCE))
        return {mutant: killer for part in parts for mutant, killer in part.items()}


def test_every_mutant_is_killed(fate: dict[Mutant, str | None]) -> None:
    assert [str(mutant) for mutant in MUTANTS if not mutant.equivalent and fate[mutant] is None] == []


def test_those_said_to_be_equivalent_are(fate: dict[Mutant, str | None]) -> None:
    """One that a case can tell from the kernel is no equivalent one: the reason given for it is wrong."""
    assert {str(mutant): fate[mutant] for mutant in MUTANTS if mutant.equivalent and fate[mutant] is not None} == {}


def test_the_source_unchanged_survives(tmp_path: Path) -> None:
    """Or every mutant would be killed by a broken rig."""
    unchanged = Mutant("kv_copy", "kv_copy")
    assert fates(tmp_path / "unchanged", [unchanged]) == {unchanged: None}


def test_no_mutant_is_listed_twice() -> None:
    changed = [mutant.apply(SOURCE.read_text()) for mutant in MUTANTS]
    assert len(set(changed)) == len(MUTANTS)
    assert SOURCE.read_text() not in changed


def test_a_mutant_that_no_longer_applies_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not hold"):
        Mutant("no such line", "").apply(SOURCE.read_text())
