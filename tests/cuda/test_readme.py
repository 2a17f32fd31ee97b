"""cuda/README.md answers each pitfall with tests: they must exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.cuda

TREE = Path(__file__).parents[2]
README = (TREE / "cuda" / "README.md").read_text()


def test_every_test_that_is_named_exists() -> None:
    written = {name for path in (TREE / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    named = set(re.findall(r"`(test_\w+)`", README))
    assert len(named) > 30
    assert named - written == set()


def test_every_file_that_is_named_exists() -> None:
    named = {name for name in re.findall(r"`((?:src|tests|cuda)/[\w/.]+\.\w+)`", README)}
    links = {link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link}
    assert [name for name in named if not (TREE / name).exists()] == []
    assert [link for link in links if not (TREE / "cuda" / link).exists()] == []


def test_all_fourteen_are_answered() -> None:
    assert re.findall(r"(?m)^\| (\d+) \|", README) == [str(number) for number in range(1, 15)]
