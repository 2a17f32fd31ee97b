"""Log lines: ``event key=value ...`` on the stdlib loggers ``kvoffload.*``, and nobody else's logging is touched.

structlog's global configuration belongs to the host program: our loggers carry their own processors, so it is neither used nor
changed, and nor are the root logger and its handlers.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

from structlog.stdlib import BoundLogger, filter_by_level

ROOT = "kvoffload"
QUIET = logging.WARNING

_BARE = re.compile(r"[^\s=\"'\\]+")


def get_logger(name: str = ROOT) -> BoundLogger:
    """A structlog logger over the stdlib logger ``kvoffload.<name>`` (a module's ``__name__`` is taken as it is).

    Until `configure`, or the host by the stdlib's means, says otherwise, only warnings and errors are written.
    """
    root = logging.getLogger(ROOT)
    if root.level == logging.NOTSET:
        root.setLevel(QUIET)
    if name != ROOT and not name.startswith(f"{ROOT}."):
        name = f"{ROOT}.{name}"
    return BoundLogger(logging.getLogger(name), [filter_by_level, _render], {})


def configure(level: str) -> None:
    """Write from ``level`` ("debug", "info", "warning", "error") on, to stderr where the host has no handler. Idempotent."""
    root = logging.getLogger(ROOT)
    root.setLevel(level.upper())
    if not any(isinstance(handler, _Fallback) for handler in root.handlers):
        root.addHandler(_Fallback())


class _Fallback(logging.Handler):
    """Writes to what sys.stderr is then, while nothing else handles our records. (logging's own last resort drops info.)"""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(levelname)s %(asctime)s [%(name)s] %(message)s", "%m-%d %H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        others = logging.getLogger(ROOT).handlers + logging.getLogger().handlers
        if any(handler is not self for handler in others):
            return
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def _render(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> tuple[tuple[str], dict[str, Any]]:
    """``(args, kwargs)`` of the stdlib call: one argument, so that a % in it stays; tracebacks are the host formatter's affair."""
    kwargs = {name: event.pop(name) for name in ("exc_info", "stack_info", "stacklevel") if name in event}
    text = str(event.pop("event", ""))
    return (" ".join([text, *(f"{name}={_value(value)}" for name, value in event.items())]),), kwargs


def _value(value: object) -> str:
    return value if isinstance(value, str) and _BARE.fullmatch(value) else repr(value)
