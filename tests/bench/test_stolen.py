"""What the hypervisor stole, by what the kernel counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvoffload.bench.stolen import machine_time, stolen_share


def test_stolen_time_is_a_share_of_what_was_asked_for(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 10 50 1000 200 5 5 30 90 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    before = machine_time(stat)
    stat.write_text("cpu  160 10 60 9000 900 5 5 60 90 0\n")
    assert stolen_share(before, machine_time(stat)) == pytest.approx(0.3)
    assert stolen_share(before, before) is None


@pytest.mark.parametrize("text", ["", "cpu  100 10 50\n", "intr 1 2 3 4 5 6 7 8 9\n"])
def test_stolen_time_is_unknown_where_the_kernel_does_not_tell(tmp_path: Path, text: str) -> None:
    assert machine_time(tmp_path / "nothing") is None
    (tmp_path / "stat").write_text(text)
    assert machine_time(tmp_path / "stat") is None
    assert stolen_share(None, None) is None
