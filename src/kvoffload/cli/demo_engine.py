"""What the demo does with the engine: every prompt computed in full, the engine's cache dropped, every prompt again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvoffload.bench.engine_process import EngineProcess
from kvoffload.cli.demo_prompts import DemoPrompt
from kvoffload.errors import PeerError

ANSWER_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Outcome:
    """One prompt: where its tokens came from the second time, and both answers. Seconds to the first token."""

    prompt: DemoPrompt
    tokens: int
    from_engine: int
    from_l1: int
    computed_s: float
    loaded_s: float
    first_text: str
    second_text: str
    bytes_loaded: int
    is_same: bool

    @property
    def computed(self) -> int:
        return self.tokens - self.from_engine - self.from_l1


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer as the engine process tells it."""

    tokens: int
    from_engine: int
    from_l1: int
    first_token_s: float
    output: tuple[int, ...]
    text: str


def compute_all(engine: EngineProcess, prompts: Sequence[DemoPrompt]) -> list[Answer]:
    """Every prompt with no cache at all: the engine's is dropped before each, and kvoffload is told to save but not to load."""
    answers = []
    for prompt in prompts:
        drop_engine_cache(engine)
        answers.append(_ask(engine, prompt, load=False))
    if not engine.call("flush"):
        raise PeerError(f"kvoffload did not finish saving\n{engine.log_tail()}")
    return answers


def ask_again(engine: EngineProcess, prompts: Sequence[DemoPrompt], firsts: Sequence[Answer], bytes_per_token: int) -> list[Outcome]:
    """Every prompt as any request: vLLM uses its own cache first, then what kvoffload has."""
    outcomes = []
    for prompt, first in zip(prompts, firsts, strict=True):
        second = _ask(engine, prompt, load=True)
        outcomes.append(
            Outcome(
                prompt,
                second.tokens,
                second.from_engine,
                second.from_l1,
                first.first_token_s,
                second.first_token_s,
                first.text,
                second.text,
                second.from_l1 * bytes_per_token,
                first.output == second.output,
            )
        )
    return outcomes


def drop_engine_cache(engine: EngineProcess) -> None:
    """vLLM forgets every prefix; L1 does not."""
    if not engine.call("reset"):
        raise PeerError(f"vLLM did not drop its prefix cache\n{engine.log_tail()}")


def _ask(engine: EngineProcess, prompt: DemoPrompt, *, load: bool) -> Answer:
    result: dict[str, Any] = engine.call("generate", prompts=[prompt.text], max_tokens=ANSWER_TOKENS, load=load)
    (answer,) = result["answers"]
    sources: dict[str, int] = result["sources"]
    return Answer(
        tokens=answer["tokens"],
        from_engine=sources.get("device", 0),
        from_l1=sources.get("host", 0),
        first_token_s=answer["first_token_s"],
        output=tuple(answer["output"]),
        text=answer["text"],
    )
