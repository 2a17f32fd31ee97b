"""One measured figure and what it is held to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """``value`` in ``unit``; ``passed`` says whether it meets ``target``, in words. One that is not measured does not."""

    name: str
    value: float
    unit: str
    target: str
    passed: bool
    detail: str = ""
    is_measured: bool = True


def not_measured(name: str, target: str, reason: str) -> Figure:
    """A figure that should be here; ``reason`` says what it needs."""
    return Figure(name, 0.0, "", target, False, f"not measured: {reason}", is_measured=False)
