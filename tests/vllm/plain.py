"""The reference: vLLM with no connector and no prefix cache, in a process of its own that lives as long as the test session."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from tests.vllm.outputs import Output

from kvoffload.testing.model import TINY, ModelShape

ANSWER_TIMEOUT_S = 240.0


class Plain:
    """Asks that process, and remembers what it said."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), name="plain vLLM")
        self._process.start()
        theirs.close()
        self._known: dict[Any, Output] = {}

    def generate(self, prompts: Sequence[list[int]], tokens: int = 8, *, shape: ModelShape = TINY, dtype: str = "float32") -> list[Output]:
        """What plain vLLM says to each, computed from the first token on."""
        names = [(shape, dtype, tokens, tuple(prompt)) for prompt in prompts]
        unknown = list(dict.fromkeys(name for name in names if name not in self._known))
        if unknown:
            self._connection.send((shape, dtype, tokens, [list(name[3]) for name in unknown]))
            assert self._connection.poll(ANSWER_TIMEOUT_S), "plain vLLM does not answer"
            answer = self._connection.recv()
            if isinstance(answer, str):
                raise AssertionError(f"plain vLLM failed: {answer}")
            self._known.update(zip(unknown, answer, strict=True))
        return [self._known[name] for name in names]

    def close(self) -> None:
        self._connection.close()
        self._process.kill()  # one process that holds nothing: an orderly end takes 10 s and shows nothing
        self._process.join()


def _serve(connection: Connection[Any, Any]) -> None:
    from tests.vllm.harness import Engine

    engines: dict[Any, Engine] = {}

    def engine_of(shape: ModelShape, dtype: str) -> Engine:
        if (shape, dtype) not in engines:
            engines[shape, dtype] = Engine(shape, dtype=dtype, enable_prefix_caching=False)
        return engines[shape, dtype]

    engine_of(TINY, "float32").generate([[1]], 1)  # nearly every test wants it, and it starts while they start theirs
    while True:
        try:
            shape, dtype, tokens, prompts = connection.recv()
        except EOFError:
            return
        try:
            connection.send(engine_of(shape, dtype).generate(prompts, tokens))
        except Exception as error:  # told to the test, which fails with it
            connection.send(repr(error))
