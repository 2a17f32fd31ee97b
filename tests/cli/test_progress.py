"""The line that says what is waited for."""

from __future__ import annotations

import io

import pytest

from kvoffload.cli.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_away_from_a_terminal_it_is_one_line() -> None:
    stream = io.StringIO()
    with Progress("working", stream=stream) as progress:
        progress.done("fine")
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().startswith("working ...")
    assert "... fine (0.0 s)\n" in stream.getvalue()


def test_a_failure_is_said_and_goes_on() -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError, match="no"), Progress("working", stream=stream):
        raise ValueError("no")
    assert "failed (" in stream.getvalue()


def test_on_a_terminal_the_last_line_covers_the_counting_ones() -> None:
    stream = Terminal()
    with Progress("working", stream=stream):
        pass
    lines = stream.getvalue().rstrip("\n").split("\r")
    assert lines[-1].startswith("working ...")
    assert all(len(line) <= len(lines[-1]) for line in lines)


def test_one_that_is_not_kept_leaves_nothing() -> None:
    stream = io.StringIO()
    with Progress("working", stream=stream, keep=False):
        pass
    assert stream.getvalue() == ""
    terminal = Terminal()
    with Progress("working", stream=terminal, keep=False):
        pass
    assert terminal.getvalue().endswith("\r")
    assert "\n" not in terminal.getvalue()
