"""What no file of the tree may hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TREE = Path(__file__).parent.parent
ROOTS = ("src", "tests", "examples", "cuda", ".ci", "noxfile.py", "pyproject.toml", "README.md", "CHANGELOG.md")
SUFFIXES = {".py", ".toml", ".md", ".yaml", ".yml", ".json", ".cu", ".cuh", ".h", ".cpp", ".sh", ""}


def files() -> list[Path]:
    found = [path for root in ROOTS for path in ([TREE / root] if (TREE / root).is_file() else (TREE / root).rglob("*"))]
    return [path for path in found if path.is_file() and path.suffix in SUFFIXES and "__pycache__" not in path.parts]


# Written in two halves, or this file would be the first to break its own rules.
FORBIDDEN = {
    "a path of somebody's machine": r"(?<![\w.<>}])/(?:wo" + r"rk|ro" + r"ot|ho" + r"me|tmp/w)/\w",
    "a patched module: pass a fake through a port": r"mock\." + r"patch|from unittest " + r"import mock",
    "a merge that was not finished": r"(?m)^(?:<{7} |>{7} )",
}


def lines_with(pattern: str) -> list[str]:
    found = []
    for path in files():
        text = path.read_text()
        found += [f"{path.relative_to(TREE)}:{text.count(chr(10), 0, match.start()) + 1}" for match in re.finditer(pattern, text)]
    return found


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what: str) -> None:
    assert lines_with(FORBIDDEN[what]) == []


def test_no_test_sleeps() -> None:
    """Virtual time, or a bounded wait for what is to happen."""
    pattern = r"\btime\." + r"sleep\("
    assert [line for line in lines_with(pattern) if line.startswith("tests")] == []


def test_no_file_of_ours_is_longer_than_it_should_be() -> None:
    long = {
        str(path.relative_to(TREE)): count for path in (TREE / "src").rglob("*.py") if (count := len(path.read_text().splitlines())) > 400
    }
    assert long == {}


def test_the_walk_sees_the_tree() -> None:
    names = {str(path.relative_to(TREE)) for path in files()}
    assert {"src/kvoffload/keys.py", "tests/test_tree.py", ".ci/run", "pyproject.toml"} <= names
