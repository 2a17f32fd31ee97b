"""Prompts by seed: token ids, no two seeds alike."""

from __future__ import annotations

import random

FIRST_WORD = 4
VOCABULARY = 2048


def prompt(length: int, seed: object) -> list[int]:
    """``length`` random tokens; the same for the same length and seed."""
    draw = random.Random(f"prompt {length} {seed}")
    return [draw.randrange(FIRST_WORD, VOCABULARY) for _ in range(length)]


def prompts(lengths: list[int], seed: object) -> list[list[int]]:
    return [prompt(length, (seed, index, length)) for index, length in enumerate(lengths)]
