"""What happened, so that a failure can be read: the last events of the jobs, requests and blocks that it names."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

Tag = str
"""What an event is about: ``job 7``, ``request r3``, ``block 12``, ``slot 4``."""


class OracleError(AssertionError):
    """The simulation has seen something that must never happen. ``tags`` name what it is about."""

    def __init__(self, text: str, tags: Iterable[Tag] = ()) -> None:
        super().__init__(text)
        self.tags = tuple(tags)


class InjectedError(Exception):
    """A bug that the simulation put into a hook on purpose."""


class Trace:
    """The last ``capacity`` events of one simulation."""

    def __init__(self, capacity: int = 20_000) -> None:
        self.step = 0
        self._events: deque[tuple[int, str, frozenset[Tag]]] = deque(maxlen=capacity)

    def note(self, text: str, *tags: Tag) -> None:
        """Remember ``text`` as an event about ``tags``."""
        self._events.append((self.step, text, frozenset(tags)))

    def report(self, tags: Iterable[Tag] = (), last: int = 40, about: int = 60) -> str:
        """The last ``about`` events that share a tag with ``tags`` or with those events' jobs, then the ``last`` of all."""
        wanted = set(tags)
        for _, _, event_tags in self._events:
            # The jobs of a block or slot that went wrong are the story; the jobs of a request all belong to it anyway.
            if wanted & event_tags:
                wanted |= {tag for tag in event_tags if tag.startswith("job ")}
        chosen = [event for event in self._events if wanted & event[2]][-about:]
        lines = [f"-- events about {', '.join(sorted(wanted))}", *map(_line, chosen)] if chosen else []
        lines += ["-- the last events", *map(_line, list(self._events)[-last:])]
        return "\n".join(lines)


def _line(event: tuple[int, str, frozenset[Tag]]) -> str:
    return f"  step {event[0]}: {event[1]}"


def shorten(numbers: Iterable[int]) -> str:
    """``3 4 5 9`` for humans."""
    return " ".join(map(str, numbers)) or "-"
