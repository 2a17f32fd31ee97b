"""No hook raises into vLLM."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

from kvoffload.observe.logs import get_logger

log = get_logger("connector")

Hook = TypeVar("Hook", bound=Callable[..., Any])


class HasHooks(Protocol):
    def hook_failed(self, hook: str, error: Exception) -> None:
        """A bug of ours surfaced in a hook: say so, and make no further promise."""
        ...


def never_raises(neutral: Any, instead: Callable[..., Any] | None = None, *, name: str | None = None) -> Callable[[Hook], Hook]:
    """Wrap a method of `HasHooks`: where it raises, the connector is told, and vLLM gets ``instead(connector, *args)``.

    Without ``instead``, or where that raises too, vLLM gets ``neutral``. ``name`` is the hook's, where the method is a part of one.
    This is the one place with a catch-all, because here a bug would end the engine; it never becomes a hit or a success.
    """

    def wrap(hook: Hook) -> Hook:
        @functools.wraps(hook)
        def guarded(self: HasHooks, *args: Any, **kwargs: Any) -> Any:
            try:
                return hook(self, *args, **kwargs)
            except Exception as error:  # see above
                _try(self.hook_failed, name or hook.__name__, error)
            return _try(instead, self, *args, neutral=neutral) if instead is not None else neutral

        return cast("Hook", guarded)

    return wrap


def _try(function: Callable[..., Any], *args: Any, neutral: Any = None) -> Any:
    try:
        return function(*args)
    except Exception as error:  # what was to make up for a bug, which has been said, has one itself
        log.debug("what was to make up for a failed hook failed", what=getattr(function, "__qualname__", repr(function)), exc_info=error)
        return neutral
