"""Findings, and the text that goes into a bug report."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from kvoffload.observe.logs import ROOT

BEGIN = "======== kvoffload: paste from here ========"
END = "======== kvoffload: to here ========"
NAME_WIDTH = 40


class State(Enum):
    """Of something that was tried. MISSING: kvoffload works without it, more slowly or in a smaller part of the cases."""

    OK = "ok"
    MISSING = "missing"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. ``state`` is None for what is only told."""

    name: str
    text: str
    state: State | None = None


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    findings: tuple[Finding, ...]


def line_of(finding: Finding) -> str:
    """One line without its indent, whatever the text holds."""
    text = " ".join(finding.text.split())
    state = "" if finding.state is None else f"{finding.state.value.ljust(7)}  "
    return f"{finding.name.ljust(NAME_WIDTH)}  {state}{text}".rstrip()


def block_of(sections: Sequence[Section]) -> list[str]:
    """The lines to paste, between markers."""
    lines = [BEGIN]
    for section in sections:
        lines += [f"[{section.title}]", *(f"  {line_of(finding)}" for finding in section.findings)]
    return [*lines, END]


def all_passed(findings: Sequence[Finding]) -> bool:
    """Whether all that was tried is there and right."""
    return all(finding.state in (None, State.OK) for finding in findings)


def summary_of(findings: Sequence[Finding]) -> str:
    """In one line."""
    tried = [finding for finding in findings if finding.state is not None]
    failed = [finding.name for finding in tried if finding.state is State.FAILED]
    missing = [finding.name for finding in tried if finding.state is State.MISSING]
    if not failed and not missing:
        return f"all {len(tried)} checks passed"
    parts = [f"{len(failed)} of {len(tried)} checks FAILED ({', '.join(failed)})"] if failed else []
    if missing:
        parts.append(f"{len(missing)} of {len(tried)} found something missing ({', '.join(missing)})")
    return "; ".join(parts)


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """What kvoffload logs in here from warnings on. Its fallbacks are silent but for these."""
    found: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler, root = Collector(logging.WARNING), logging.getLogger(ROOT)
    root.addHandler(handler)
    try:
        yield found
    finally:
        root.removeHandler(handler)
