"""Tables and units."""

from __future__ import annotations

import pytest

from kvoffload.cli.table import human_bytes, human_seconds, table


def test_columns_align_and_headings_stand_at_the_bottom() -> None:
    assert table([("name", "in\nall"), ("one", "5"), ("three", "1,000")], indent=0) == [
        "          in",
        "name     all",
        "-----  -----",
        "one        5",
        "three  1,000",
    ]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (30 << 20, "30.0 MiB"), (5 << 30, "5.0 GiB")],
)
def test_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.0042, "4.2 ms"), (0.038, "38 ms"), (4.116, "4.12 s")])
def test_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text
