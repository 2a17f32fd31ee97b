"""Calls of the system on one connection, and the exchanges made of them, compiled by numba into the loops of `infinistore_native`.

Every one is interruptible and goes on where it was: ``control`` says what has been sent and received. It returns `EXPIRED` at its
deadline, or within `SLICE_NS` of ``control[STOP]`` being set by another thread; called again with a later deadline it finishes the
exchange that it was in. With ``control[NOWAIT]`` no call of the system blocks: it returns `AWAITS_BYTES` or `AWAITS_ROOM` instead, and
`TOO_LONG` rather than move much; the next call, with or without it, goes on from there. That every exchange is finished matters because
**a connection may not be closed while an answer is outstanding**: the server closes twice when it finds a reader gone (``on_read`` and
the cancelled ``on_chunk_write`` of its infinistore.cpp), and dies of it.
"""

from __future__ import annotations

import errno
import socket
from array import array
from typing import Any

from numba import types
from numba.extending import register_jitable

from kvoffload.l2.infinistore_wire import Code
from kvoffload.l2.system_calls import last_error, recv, word32

OK, MISSING, OTHER_SIZE, REFUSED, EXPIRED, STALE, CLOSED, NONSENSE, AWAITS_BYTES, AWAITS_ROOM, TOO_LONG = range(11)
"""What a loop answers. All values were dealt with; (of one value: not there, of another size, no room;) out of time; closed before
anything was asked; closed; an answer that makes no sense; (with `NOWAIT`: nothing has come; nothing can be sent; more is coming than
who may not wait should move)."""
UNDER_WAY = (AWAITS_BYTES, AWAITS_ROOM, TOO_LONG)
"""Whoever calls again goes on from there; of the others the reason would be lost."""

STOP, DEADLINE_NS, SLICE_NOW, SLICE_MOST, ITEM, STEP, PHASE, OFFSET, REPLY, ERRNO, DISCARD, ONE, ASKED, HERE = range(14)
TIMEVAL, TIMESPEC, NOWAIT = 14, 16, 18
"""Words of ``control``: times are those of CLOCK_MONOTONIC; `ITEM`, `STEP`: where a loop is; `PHASE`, `OFFSET`: where an exchange is;
`DISCARD`: what is received goes nowhere, and only to the end of the exchange; `HERE`: its own address; `NOWAIT`: 0 or `DONTWAIT`."""
CONTROL_WORDS = 19

SLICE_NS = 20_000_000
"""The longest that a call of the system blocks: how late a stop is heard."""
SCRATCH_BYTES = 1 << 16

_FINISHED, _ABSENT = int(Code.FINISHED), int(Code.ABSENT)
_PEEK = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)
_WAITALL, DONTWAIT, _NOSIGNAL, MORE = int(socket.MSG_WAITALL), int(socket.MSG_DONTWAIT), int(socket.MSG_NOSIGNAL), int(socket.MSG_MORE)
_SOCKET, _RCVTIMEO, _SNDTIMEO = int(socket.SOL_SOCKET), 20, 21  # asm-generic/socket.h; Python does not name the latter two
_TCP, _QUICKACK = int(socket.IPPROTO_TCP), socket.TCP_QUICKACK
_EAGAIN, _EINTR = errno.EAGAIN, errno.EINTR
_CLOCK_MONOTONIC = 1

_send = types.ExternalFunction("send", types.int64(types.int32, types.int64, types.int64, types.int32))
_setsockopt = types.ExternalFunction("setsockopt", types.int32(types.int32, types.int32, types.int32, types.int64, types.uint32))
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))


@register_jitable
def at(control: Any, word: int) -> Any:
    return control[HERE] + word * 8


@register_jitable
def has_time(fd: int, control: Any) -> Any:
    """Let the socket block, if it may, until the deadline or as long as a stop may go unheard. False when there is no time left."""
    if control[STOP] != 0:
        return False
    _clock_gettime(_CLOCK_MONOTONIC, at(control, TIMESPEC))
    left = control[DEADLINE_NS] - (control[TIMESPEC] * 1_000_000_000 + control[TIMESPEC + 1])
    if left <= 0:
        return False
    if control[NOWAIT] != 0:
        return True
    wanted = max(min(left, control[SLICE_MOST]), 1000)  # no microseconds at all would mean for ever
    if wanted != control[SLICE_NOW]:
        control[SLICE_NOW] = wanted
        control[TIMEVAL] = wanted // 1_000_000_000
        control[TIMEVAL + 1] = wanted % 1_000_000_000 // 1000
        _setsockopt(fd, _SOCKET, _RCVTIMEO, at(control, TIMEVAL), 16)
        _setsockopt(fd, _SOCKET, _SNDTIMEO, at(control, TIMEVAL), 16)
    return True


@register_jitable
def next_phase(control: Any) -> None:
    control[PHASE] += 1
    control[OFFSET] = 0


@register_jitable
def failed(control: Any) -> Any:
    """Whether the call that just answered -1 has failed for good."""
    number = last_error()
    if number in (_EAGAIN, _EINTR):
        return False
    control[ERRNO] = number
    return True


@register_jitable
def send_all(fd: int, address: int, count: int, flags: int, control: Any) -> Any:
    while control[OFFSET] < count:
        if not has_time(fd, control):
            return EXPIRED
        sent = _send(fd, address + control[OFFSET], count - control[OFFSET], flags | _NOSIGNAL | control[NOWAIT])
        if sent >= 0:
            control[OFFSET] += sent
            control[ASKED] = 1
        elif failed(control):
            return CLOSED
        elif control[NOWAIT] != 0:
            return AWAITS_ROOM
    next_phase(control)
    return OK


@register_jitable
def receive_all(fd: int, address: int, count: int, is_kept: bool, control: Any) -> Any:
    """``address`` is room for `SCRATCH_BYTES` where what comes is not kept."""
    while control[OFFSET] < count:
        if not has_time(fd, control):
            return EXPIRED
        left, place = count - control[OFFSET], control[OFFSET] if is_kept else 0
        got = recv(fd, address + place, left if is_kept else min(left, SCRATCH_BYTES), _WAITALL | control[NOWAIT])
        if got > 0:
            control[OFFSET] += got
        elif got == 0 or failed(control):
            return CLOSED
        elif control[NOWAIT] != 0:
            return AWAITS_BYTES
    next_phase(control)
    return OK


@register_jitable
def look(fd: int, control: Any) -> Any:
    """Before anything is asked: nothing may have come, and the connection must be open."""
    got = recv(fd, at(control, REPLY), 1, _PEEK)
    if got > 0:
        return STALE if control[ASKED] == 0 else NONSENSE  # an answer too many: the next one would be taken for this one's
    if got == 0 or failed(control):
        return STALE if control[ASKED] == 0 else CLOSED
    return OK


@register_jitable
def quick_ack(fd: int, control: Any) -> None:
    """Not sticky. Without it the server holds back the end of an answer until a delayed ack, 43 ms."""
    _setsockopt(fd, _TCP, _QUICKACK, at(control, ONE), 4)


@register_jitable
def receive_head(fd: int, control: Any) -> Any:
    """The code of a get's answer, and where there is a value its length: it may be all the answer, so not one byte more is waited for."""
    while control[OFFSET] < 4 or (control[OFFSET] < 8 and word32(at(control, REPLY)) == _FINISHED):
        if not has_time(fd, control):
            return EXPIRED
        got = recv(fd, at(control, REPLY) + control[OFFSET], 8 - control[OFFSET], control[NOWAIT])
        if got > 0:
            control[OFFSET] += got
        elif got == 0 or failed(control):
            return CLOSED
        elif control[NOWAIT] != 0:
            return AWAITS_BYTES
    code = word32(at(control, REPLY))
    if code == _ABSENT and control[OFFSET] == 4:
        control[PHASE] = control[OFFSET] = 0
        return MISSING
    if code != _FINISHED or word32(at(control, REPLY) + 4) < 0:
        return NONSENSE
    next_phase(control)
    return OK


@register_jitable
def get(fd: int, request: int, request_bytes: int, into: int, into_bytes: int, scratch: int, control: Any) -> Any:
    """One get. `OK`, `MISSING` and `OTHER_SIZE` leave nothing outstanding."""
    if control[PHASE] == 0:
        if control[OFFSET] == 0:
            status = look(fd, control)
            if status != OK:
                return status
        status = send_all(fd, request, request_bytes, 0, control)
        if status != OK:
            return status
    if control[PHASE] == 1:
        if control[OFFSET] == 0:
            quick_ack(fd, control)
        status = receive_head(fd, control)
        if status != OK:
            return status
    size = word32(at(control, REPLY) + 4)
    is_kept = size == into_bytes and control[DISCARD] == 0
    if control[NOWAIT] != 0 and not is_kept:
        return TOO_LONG
    status = receive_all(fd, into if is_kept else scratch, size, is_kept, control)
    if status != OK:
        return status
    control[PHASE] = 0
    return OK if size == into_bytes else OTHER_SIZE


@register_jitable
def receive_codes(fd: int, count: int, control: Any) -> Any:
    """The codes of a put's answers, of a burst's two. The server holds back the second until the first is acknowledged."""
    while control[OFFSET] < count:
        if not has_time(fd, control):
            return EXPIRED
        quick_ack(fd, control)
        got = recv(fd, at(control, REPLY) + control[OFFSET], count - control[OFFSET], control[NOWAIT])
        if got > 0:
            control[OFFSET] += got
        elif got == 0 or failed(control):
            return CLOSED
        elif control[NOWAIT] != 0:
            return AWAITS_BYTES
    next_phase(control)
    return OK


def new_control() -> tuple[array[int], int]:
    """The state of a transfer that has not begun, and its address. int64, `CONTROL_WORDS` long; must not grow."""
    control = array("q", _NEW)
    address, _ = control.buffer_info()
    control[HERE] = address
    return control, address


_NEW = array("q", bytes(CONTROL_WORDS * 8))
_NEW[SLICE_MOST], _NEW[ONE] = SLICE_NS, 1
