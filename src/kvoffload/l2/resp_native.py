"""Values of a Redis server's answers into the caller's memory, compiled by numba: the interpreter lock is let go once for a batch of
them, and not twice for each.

Only what is usual is read here: values of the length that is expected. Any other answer is left in the scratch to
`kvoffload.l2.resp`, which knows what to make of it.
"""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from numba import types
from numba.extending import register_jitable

from kvoffload.compiled import compile_native, digest_of
from kvoffload.l2 import system_calls
from kvoffload.l2.system_calls import last_error, octets, recv, words

READ, ODD, CLOSED, NONSENSE = range(4)
"""All values came; the next answer is none of the usual ones, and what came of it lies in the scratch; the connection is lost; a value
is not followed by CRLF."""
START, END, ITEM, ERRNO = range(4)
"""Words of ``control``: what of the scratch was received and is not read yet, from where to where; how many values came; why the
connection was lost, 0 where the server closed it."""
CONTROL_WORDS = 4
ADDRESS, LENGTH = range(2)
"""Columns of a plan, which has a row for each value: where its bytes go, and how many they are."""

_CR, _LF, _DOLLAR, _ZERO, _NINE = b"\r\n$09"
_WAITALL, _EINTR = int(socket.MSG_WAITALL), errno.EINTR
_MOST_DIGITS = 10


@register_jitable
def _receive(fd: int, address: int, count: int, flags: int, control: Any) -> Any:
    """Some bytes, at least one; 0 when the connection is lost."""
    while True:
        got = recv(fd, address, count, flags)
        if got > 0:
            return got
        control[ERRNO] = last_error() if got < 0 else 0
        if control[ERRNO] != _EINTR:
            return 0


@register_jitable
def _fill(fd: int, scratch: Any, address: int, control: Any) -> Any:
    """Receive something more behind what is not read yet; `ODD` where there is no room."""
    start, end = control[START], control[END]
    if start > 0:
        for place in range(end - start):
            scratch[place] = scratch[start + place]
        control[START], control[END] = 0, end - start
    if control[END] == scratch.shape[0]:
        return ODD
    got = _receive(fd, address + control[END], scratch.shape[0] - control[END], 0, control)
    control[END] += got
    return READ if got > 0 else CLOSED


@register_jitable
def _announced(scratch: Any, control: Any) -> Any:
    """The length of the value that the next line announces, and that of the line; -1 where it is no such line, -2 where more of it is
    to come."""
    start, end = control[START], control[END]
    if start == end:
        return -2, 0
    if scratch[start] != _DOLLAR:
        return -1, 0
    length, place = 0, start + 1
    while place < end and _ZERO <= scratch[place] <= _NINE and place - start <= _MOST_DIGITS:
        length = length * 10 + (scratch[place] - _ZERO)
        place += 1
    if place + 2 > end and (place == end or scratch[place] == _CR):
        return -2, 0
    if place == start + 1 or scratch[place] != _CR or scratch[place + 1] != _LF:
        return -1, 0
    return length, place + 2 - start


@register_jitable
def _read(fd: int, plan: Any, scratch: Any, scratch_address: int, control: Any) -> Any:
    control[ITEM] = 0
    while control[ITEM] < plan.shape[0]:
        length, line = _announced(scratch, control)
        while length == -2:
            status = _fill(fd, scratch, scratch_address, control)
            if status != READ:
                return status
            length, line = _announced(scratch, control)
        if length != plan[control[ITEM], LENGTH]:
            return ODD
        control[START] += line
        ready = min(control[END] - control[START], length)
        into = octets(plan[control[ITEM], ADDRESS], length)
        into[:ready] = scratch[control[START] : control[START] + ready]
        control[START] += ready
        while ready < length:
            got = _receive(fd, plan[control[ITEM], ADDRESS] + ready, length - ready, _WAITALL, control)
            if got == 0:
                return CLOSED
            ready += got
        while control[END] - control[START] < 2:
            status = _fill(fd, scratch, scratch_address, control)
            if status != READ:
                return status
        if scratch[control[START]] != _CR or scratch[control[START] + 1] != _LF:
            return NONSENSE
        control[START] += 2
        control[ITEM] += 1
    return READ


@cache
def read_values() -> Callable[..., int]:
    """``(fd, values, plan, scratch, scratch bytes, control)``, addresses all but the first two and the length.

    Compiles now (a second; milliseconds when an earlier process left it in numba's cache). Raises UnsupportedError.
    """
    digest = digest_of(sys.modules[__name__], system_calls)

    def read(fd: int, count: int, plan: int, scratch: int, scratch_bytes: int, control: int) -> Any:
        digest  # noqa: B018
        return _read(fd, words(plan, count, 2), octets(scratch, scratch_bytes), scratch, words(control, 1, CONTROL_WORDS)[0])

    return compile_native(read, types.int64(*[types.int64] * 6))
