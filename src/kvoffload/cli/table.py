"""Plain text tables."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,), gap: int = 2, indent: int = 2) -> list[str]:
    """Lines of ``rows``, the first being the heading, underlined. Columns align right, those in ``left`` left.

    A heading may have several lines; the other rows have one.
    """
    heading = [cell.split("\n") for cell in rows[0]]
    height = max(len(cell) for cell in heading)
    # Headings of fewer lines stand at the bottom, next to their figures.
    lines = [[*([""] * (height - len(cell))), *cell] for cell in heading]
    top = [[cell[line] for cell in lines] for line in range(height)]
    widths = [max(len(row[column]) for row in [*top, *rows[1:]]) for column in range(len(rows[0]))]
    rule = ["-" * width for width in widths]

    def aligned(row: Sequence[str]) -> str:
        cells = enumerate(zip(row, widths, strict=True))
        return (" " * gap).join(cell.ljust(width) if column in left else cell.rjust(width) for column, (cell, width) in cells)

    return [(" " * indent + aligned(row)).rstrip() for row in [*top, rule, *rows[1:]]]


def human_bytes(count: float) -> str:
    """As ``27.5 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def human_seconds(seconds: float) -> str:
    """As ``38 ms``, or ``4.12 s`` from one second on."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.1f} ms"
