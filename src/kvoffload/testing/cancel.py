"""Cancel a coroutine at its first, second, ... checkpoint: whatever it holds must be accounted for wherever that comes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Generator
from inspect import isawaitable
from typing import Any

import anyio

from kvoffload.errors import MisuseError


class _CancelledAt:
    """Awaits ``coroutine`` and calls ``cancel`` as it suspends for the ``nth`` time: there the cancellation arrives."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], nth: int, cancel: Callable[[], None]) -> None:
        self._coroutine = coroutine
        self._nth = nth
        self._cancel = cancel
        self.suspended = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        # What `yield from` does, with a count: see PEP 380. The coroutine's own frames are not touched.
        send: Callable[[], Any] = lambda: self._coroutine.send(None)  # noqa: E731
        while True:
            try:
                awaited = send()
            except StopIteration as end:
                return end.value
            self.suspended += 1
            if self.suspended == self._nth:
                self._cancel()
            try:
                value = yield awaited
            except GeneratorExit:
                self._coroutine.close()
                raise
            except BaseException as error:  # handed on to the coroutine, which decides
                send = _bind(self._coroutine.throw, error)
            else:
                send = _bind(self._coroutine.send, value)


def _bind(function: Callable[[Any], Any], argument: object) -> Callable[[], Any]:
    return lambda: function(argument)


async def cancel_at_every_checkpoint(
    make_run: Callable[[], Coroutine[Any, Any, Any]],
    check: Callable[[int], Awaitable[None] | None],
    *,
    most: int = 1000,
) -> int:
    """Run ``make_run()`` again and again, cancelling it where it suspends for the 1st, 2nd, ... time, until it ends before that.

    ``make_run`` makes a fresh coroutine and all that it works with; ``check(nth)``, which may be async, is called after each
    run, the complete one included, and raises if something is not accounted for. Only the coroutine's own suspensions count, not
    those of tasks it starts; a shielded one is passed, and the cancellation arrives behind it. Returns how many runs were
    cancelled. For asyncio and trio. Raises `MisuseError` if the coroutine still goes on after ``most`` suspensions.
    """
    for nth in range(1, most + 1):
        with anyio.CancelScope() as scope:
            run = _CancelledAt(make_run(), nth, scope.cancel)
            try:
                await run
            except Exception as error:
                error.add_note(f"when cancelled at checkpoint {nth}")
                raise
        try:
            checked = check(nth)
            if isawaitable(checked):
                await checked
        except Exception as error:
            error.add_note(f"after a cancellation at checkpoint {nth}")
            raise
        if run.suspended < nth:
            return nth - 1
    raise MisuseError(f"the coroutine did not end within {most} checkpoints: does it wait for something that never comes?")
