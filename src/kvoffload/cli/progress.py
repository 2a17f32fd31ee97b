"""A line that says what is being waited for, and for how long."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self, TextIO


class Progress:
    """A context manager. On a terminal the line counts the seconds; elsewhere it is printed once. `done` sets what its end says.

    ``keep`` False: the line vanishes at the end, and is not printed where it could not.
    """

    def __init__(self, what: str, *, stream: TextIO, keep: bool = True, width: int = 64) -> None:
        self._what = what
        self._stream = stream
        self._keep = keep
        self._width = width
        self._is_terminal = stream.isatty()
        self._end = "done"
        self._ended = threading.Event()
        self._ticker: threading.Thread | None = None

    def done(self, end: str) -> None:
        self._end = end

    def __enter__(self) -> Self:
        self._begun = time.monotonic()
        if self._is_terminal:
            self._ticker = threading.Thread(target=self._tick, daemon=True)
            self._ticker.start()
        elif self._keep:
            self._write(f"{self._what} ".ljust(self._width, ".") + " ")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if self._ticker is not None:
            self._ticker.join()
        end = f"{self._end if kind is None else 'failed'} ({time.monotonic() - self._begun:.1f} s)"
        if self._keep:
            head = "\r" + f"{self._what} ".ljust(self._width, ".") + " " if self._is_terminal else ""
            self._write(f"{head}{end}\n")
        elif self._is_terminal:
            self._write("\r" + " " * (self._width + 20) + "\r")

    def _tick(self) -> None:
        while True:
            self._write("\r" + f"{self._what} ".ljust(self._width, ".") + f" {time.monotonic() - self._begun:.0f} s")
            if self._ended.wait(0.5):
                return

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
