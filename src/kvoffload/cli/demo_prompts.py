"""The prompts of the demo: long texts, three of which open with the same instructions."""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvoffload.testing.model import vocabulary

WORDS = vocabulary(2048)[4:140]
"""The tiny model's common words: each is one token."""

SHARED_WORDS = 1300
"""Of the instructions with which the three questions open: ten blocks of 128 tokens, and a rest that no block of its own holds."""


@dataclass(frozen=True, slots=True)
class DemoPrompt:
    """``shares_opening``: it begins as others do."""

    name: str
    text: str
    shares_opening: bool = False


def demo_prompts(seed: int = 4) -> list[DemoPrompt]:
    """The same five at every run, 1,500 to 3,500 tokens each."""
    chooser = random.Random(seed)

    def words(count: int) -> str:
        return " ".join(chooser.choices(WORDS, k=count))

    opening = words(SHARED_WORDS)
    return [
        DemoPrompt("manual, question 1", f"{opening} {words(630)}", shares_opening=True),
        DemoPrompt("manual, question 2", f"{opening} {words(250)}", shares_opening=True),
        DemoPrompt("manual, question 3", f"{opening} {words(1050)}", shares_opening=True),
        DemoPrompt("a long report", words(3470)),
        DemoPrompt("a conversation", words(2580)),
    ]
