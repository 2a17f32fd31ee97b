"""One measured figure and what it is held to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """``value`` in ``unit``; ``passed`` says whether it meets ``target``, in words."""

    name: str
    value: float
    unit: str
    target: str
    passed: bool
    detail: str = ""
