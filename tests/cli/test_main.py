"""The command line: what each command prints, and what it exits with."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

import kvoffload
from kvoffload.bench.figures import Figure, not_measured
from kvoffload.cli import main
from kvoffload.cli.bench import run_benches
from kvoffload.config import describe
from kvoffload.errors import PeerError

GOOD = Figure("a: fine", 3.14159, "us", "<= 5", True, "of 7")
BAD = Figure("b: slow", 1234.5, "ms", "<= 4", False)


def benches(*figures: Figure) -> dict[str, object]:
    return {"some": lambda quick: list(figures)}


def unmeasurable(quick: bool) -> list[Figure]:
    raise PeerError("the engine ended")


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"kvoffload {kvoffload.__version__}\n"


def test_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "kvoffload.cli", "version"], capture_output=True, text=True, timeout=50, check=True)
    assert done.stdout == f"kvoffload {kvoffload.__version__}\n"


def test_config_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    printed = capsys.readouterr().out
    for setting in describe():
        assert f"{setting.name}  (" in printed
        assert setting.variable in printed


@pytest.mark.parametrize("arguments", [[], ["bench"], ["bench", "nothing"], ["demo", "--l1-mb", "0"], ["demo", "--l1-mb", "nan"]])
def test_wrong_use_is_explained(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2
    assert "usage: kvoffload" in capsys.readouterr().err


def test_each_figure_has_its_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_benches(benches(GOOD, BAD), quick=False, as_json=False, strict=False) == 0  # type: ignore[arg-type]
    lines = capsys.readouterr().out.splitlines()
    good, bad = (next(line for line in lines if figure.name in line) for figure in (GOOD, BAD))
    assert good.split()[-4:] == ["us", "<=", "5", "pass"]
    assert "3.14 us" in good
    assert bad.endswith("falls short")
    assert "1,234 ms" in bad
    assert lines[lines.index(good) + 1].strip() == "of 7"
    assert lines[-1].strip() == "2 figures, 1 of them fall short"


def test_json_is_one_figure_per_line(capsys: pytest.CaptureFixture[str]) -> None:
    run_benches(benches(GOOD, BAD), quick=True, as_json=True, strict=False)  # type: ignore[arg-type]
    assert [Figure(**json.loads(line)) for line in capsys.readouterr().out.splitlines()] == [GOOD, BAD]


@pytest.mark.parametrize(("figures", "strict", "status"), [((GOOD,), True, 0), ((GOOD, BAD), True, 1), ((GOOD, BAD), False, 0)])
def test_strict_is_for_figures_that_fall_short(figures: tuple[Figure, ...], strict: bool, status: int) -> None:
    assert run_benches(benches(*figures), quick=False, as_json=True, strict=strict) == status  # type: ignore[arg-type]


def test_a_figure_that_was_not_measured_says_why_and_does_not_pass(capsys: pytest.CaptureFixture[str]) -> None:
    figures = (GOOD, not_measured("c: far", ">= 1", "it needs a server"))
    assert run_benches(benches(*figures), quick=False, as_json=False, strict=False) == 0  # type: ignore[arg-type]
    lines = capsys.readouterr().out.splitlines()
    far = next(line for line in lines if "c: far" in line)
    assert far.split()[-5:] == ["-", ">=", "1", "not", "measured"]
    assert lines[lines.index(far) + 1].strip() == "not measured: it needs a server"
    assert lines[-1].strip() == "2 figures, 0 of them fall short, 1 were not measured"
    assert run_benches(benches(*figures), quick=False, as_json=False, strict=True) == 1  # type: ignore[arg-type]


def test_what_was_measured_before_something_broke_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    def breaks(quick: bool) -> Iterator[Figure]:
        yield GOOD
        raise PeerError("the engine ended")

    assert run_benches({"breaks": breaks}, quick=False, as_json=True, strict=False) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["name"] == GOOD.name
    assert "breaks: could not be measured: the engine ended" in captured.err


def test_what_cannot_be_measured_fails_and_the_rest_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_benches({"broken": unmeasurable, "some": lambda quick: [GOOD]}, quick=False, as_json=True, strict=False) == 1
    captured = capsys.readouterr()
    assert "broken: could not be measured: the engine ended" in captured.err
    assert json.loads(captured.out)["name"] == GOOD.name
