"""No hook raises into vLLM."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

Hook = TypeVar("Hook", bound=Callable[..., Any])


class HasHooks(Protocol):
    def hook_failed(self, hook: str, error: Exception) -> None:
        """A bug of ours surfaced in a hook: say so, and make no further promise."""
        ...


def never_raises(fallback: Callable[..., Any]) -> Callable[[Hook], Hook]:
    """Wrap a method of `HasHooks`: where it raises, the connector is told and vLLM gets ``fallback(connector, *args)``.

    This is the one place with a catch-all, because here a bug would end the engine; it never becomes a hit or a success.
    """

    def wrap(hook: Hook) -> Hook:
        @functools.wraps(hook)
        def guarded(self: HasHooks, *args: Any, **kwargs: Any) -> Any:
            try:
                return hook(self, *args, **kwargs)
            except Exception as error:  # see above
                self.hook_failed(hook.__name__, error)
                return fallback(self, *args)

        return cast("Hook", guarded)

    return wrap


def nothing(*_: Any) -> None:
    """The fallback of hooks that return nothing."""
