"""Streaming sessions: a request whose input comes in pieces, each answered before the next one is there.

vLLM offers them in its asynchronous front end only; here the same requests are handed to the engine as that front end makes them. At each
turn vLLM drops the last token it said, for which it has computed nothing, and goes on with the new input in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Any

import pytest
from tests.vllm.connectors import faulty_config
from tests.vllm.harness import LIKELIEST, Engine, _read, engine
from tests.vllm.outputs import Output, assert_same, difference
from tests.vllm.plain import Plain
from tests.vllm.prompts import prompt
from tests.vllm.roundtrip import check_hits, loadable


@pytest.fixture(scope="module")
def served(plain: Plain) -> Iterator[Engine]:
    with engine(transfer=faulty_config(), num_gpu_blocks_override=60) as started:
        yield started
        started.assert_nothing_leaked()


class Session:
    """One of them. `history` is what the next piece is put behind."""

    def __init__(self, served: Engine, name: str) -> None:
        self._served = served
        self._name = name
        self.history: list[int] = []
        self.said: list[Output] = []

    def say(self, piece: list[int], tokens: int = 5) -> Output:
        """Hand in a piece and wait for its answer of ``tokens`` tokens."""
        self.begin(piece, tokens)
        return self.finish()

    def begin(self, piece: list[int], tokens: int = 5) -> None:
        self._expected = tokens
        self._add(piece, tokens, resumable=True)
        self.history += piece

    def finish(self) -> Output:
        said: list[int] = []
        logprobs: list[Any] = []
        cached = 0
        for _ in range(20_000):
            for output in self._served._engine.step():
                if output.finished:
                    self._served._finished[output.request_id] = _read(output)
                elif output.request_id == self._name:
                    [part] = output.outputs
                    said += part.token_ids
                    logprobs += part.logprobs or []
                    cached = output.num_cached_tokens or 0
            if len(said) == self._expected:
                break
        else:
            raise AssertionError(f"{len(said)} tokens of {self._expected}")
        places = tuple({token: entry.logprob for token, entry in place.items()} for place in logprobs)
        self.said.append(Output(tuple(said), places, cached, "length"))
        self.history += said[:-1]
        return self.said[-1]

    def close(self) -> None:
        self._add([0], 1, resumable=False)
        self._served.idle_steps(3)

    def _add(self, piece: list[int], tokens: int, *, resumable: bool) -> None:
        from vllm.sampling_params import RequestOutputKind

        from vllm import SamplingParams

        llm = self._served._engine
        parameters = SamplingParams(
            max_tokens=tokens,
            temperature=0.0,
            logprobs=LIKELIEST,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        request = llm.input_processor.process_inputs(
            self._name, {"prompt_token_ids": list(piece)}, parameters, supported_tasks=llm.get_supported_tasks(), resumable=resumable
        )
        request.external_req_id = self._name
        llm.output_processor.add_request(request, None, None, 0)
        # As if it went to another process, which in that front end it does: both sides append to their list of the session's tokens.
        theirs = copy(request)
        theirs.prompt_token_ids = list(piece)
        llm.engine_core.add_request(theirs)


PIECES = (prompt(60, "first"), prompt(37, "second"), prompt(100, "third"))


def test_what_a_session_said_and_heard_is_saved(served: Engine, plain: Plain) -> None:
    """All of it comes back for whoever begins with it; and of a turn's last token, which was dropped, there is nothing."""
    session = Session(served, "session")
    for turn, piece in enumerate(PIECES):
        before = [*session.history, *piece]
        found = session.say(piece)
        [expected] = plain.generate([before], 5)
        assert difference(expected, found) is None, f"turn {turn}"
    whole = session.history
    session.close()
    kv = served.kv_of(whole)
    assert len(kv) == len(whole) // served.block_size
    served.forget()
    check_hits(served, plain, [[*whole, 9]], kv=[kv])
    served.forget()
    with_dropped = [*PIECES[0], *session.said[0].tokens, *PIECES[1]]
    [other] = served.generate([with_dropped])
    assert_same(plain.generate([with_dropped]), [other])
    assert other.cached == (len(PIECES[0]) + 4) // served.block_size * served.block_size


def test_a_session_that_begins_with_what_is_saved(served: Engine, plain: Plain) -> None:
    start = prompt(200, "start of a session")
    served.generate([start])
    served.forget()
    loads = served.loaded_blocks()
    session = Session(served, "begun elsewhere")
    first = session.say(start)
    assert first.cached == loadable(start, served.block_size)
    assert served.loaded_blocks() - loads == loadable(start, served.block_size) // served.block_size
    [expected] = plain.generate([start], 5)
    assert difference(expected, first) is None
    piece = prompt(70, "more of it")
    [expected] = plain.generate([[*session.history, *piece]], 5)
    assert difference(expected, session.say(piece)) is None
    session.close()
    served.forget()
    check_hits(served, plain, [[*session.history, 9]])


def test_a_session_goes_on_while_saves_are_held(served: Engine, plain: Plain) -> None:
    """The next piece is in place of the dropped token before a copy has read anything: what is saved is of what was said."""
    session = Session(served, "held")
    served.copies.hold_saves()
    for piece in PIECES:
        session.say([*piece, 5])
    served.copies.release()
    session.close()
    served.forget()
    check_hits(served, plain, [[*session.history, 9]])


def test_sessions_in_turns_with_others(served: Engine, plain: Plain) -> None:
    """Their turns in the same batches as other requests, in an engine that holds not all of them at once."""
    sessions = [Session(served, f"one of several {number}") for number in range(3)]
    for turn in range(3):
        others = [prompt(150, (turn, number)) for number in range(3)]
        pieces = [prompt(40 + 30 * number, (turn, "piece")) for number in range(3)]
        before = [[*session.history, *piece] for session, piece in zip(sessions, pieces, strict=True)]
        names = [served.submit(one) for one in others]
        found = [session.say(piece) for session, piece in zip(sessions, pieces, strict=True)]
        for one, expected in zip(found, plain.generate(before, 5), strict=True):
            assert difference(expected, one) is None
        served.step_until(lambda names=names: all(served.is_finished(name) for name in names))  # type: ignore[misc]
        assert_same(plain.generate(others), [served.take(name) for name in names])
    for session in sessions:
        session.close()
    served.forget()
    check_hits(served, plain, [[*session.history, 9] for session in sessions])
