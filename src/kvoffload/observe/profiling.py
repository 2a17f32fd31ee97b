"""Continuous profiling with Pyroscope, samples tagged by actor; off, it costs a few instructions per tag.

pyroscope-io comes with the extra ``profiling`` and is imported only when that is switched on. Whatever goes wrong is a warning.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, ClassVar, Protocol

from kvoffload.observe.logs import get_logger

APPLICATION = "kvoffload"

_log = get_logger(__name__)


class Settings(Protocol):
    """What `start` reads; `kvoffload.config.ProfilingSettings` is one."""

    @property
    def enabled(self) -> bool: ...
    @property
    def server_address(self) -> str: ...


class _Off:
    """Does nothing, in C: two Python methods would take twice as long. Formatting "" gives "", which swallows no exception."""

    __enter__: ClassVar[Any] = staticmethod("".format)
    __exit__: ClassVar[Any] = staticmethod("".format)


class _Tag:
    """Tags this thread's samples while inside."""

    __slots__ = ("_actor", "_agent")

    def __init__(self, agent: Any, actor: str) -> None:
        self._agent = agent
        self._actor = actor

    def __enter__(self) -> None:
        self._agent.add_thread_tag("actor", self._actor)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._agent.remove_thread_tag("actor", self._actor)


_off: Any = _Off()
_agent: Any = None  # the module pyroscope, while it profiles this process


def start(settings: Settings, tags: Mapping[str, str] | None = None) -> bool:
    """Profile this process from now on, every sample with ``tags``: whether that is so. False is silent when not enabled."""
    global _agent
    if not settings.enabled or _agent is not None:
        return _agent is not None
    try:
        agent = importlib.import_module("pyroscope")
    except ImportError as error:
        _log.warning("profiling is off: install it with pip install kvoffload[profiling]", error=error)
        return False
    try:
        started = agent.configure(application_name=APPLICATION, server_address=settings.server_address, tags=dict(tags or {}))
    except Exception as error:  # a native extension of somebody else's: what it raises is not ours to know, and never worth an engine
        _log.warning("profiling is off: pyroscope did not start", server=settings.server_address, error=error)
        return False
    if started is False:
        _log.warning("profiling is off: pyroscope refused to start", server=settings.server_address)
        return False
    _agent = agent
    return True


def stop() -> None:
    """Send what was sampled and stop. Does nothing when not started."""
    global _agent
    agent, _agent = _agent, None
    if agent is not None and not agent.shutdown():
        _log.warning("profiling did not stop cleanly")


def tagged(actor: str) -> AbstractContextManager[None]:
    """``with tagged("L1Manager"):`` around synchronous work. Tags are a thread's: an ``await`` inside would tag others' work."""
    return _off if _agent is None else _Tag(_agent, actor)
