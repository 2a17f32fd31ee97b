"""The transfers of one connection, compiled by numba: many values are moved while the interpreter lock is let go once.

An engine in the same process may hold the lock for 5 ms at a time. A transfer in Python takes it after every call of the system,
some ten times a value; these loops take it once a batch.

Every loop is interruptible and goes on where it was: ``control`` says what has been sent and received. It returns `EXPIRED` at its
deadline, or within `SLICE_NS` of ``control[STOP]`` being set by another thread; called again with a later deadline it finishes the
exchange that it was in. That matters because **a connection may not be closed while an answer is outstanding**: the server
closes twice when it finds a reader gone (``on_read`` and the cancelled ``on_chunk_write`` of its infinistore.cpp), and dies of it.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, register_jitable

import kvoffload.copy.native  # noqa: F401 - makes llvmlite bearable to vLLM
from kvoffload.errors import UnsupportedError
from kvoffload.l2.infinistore_wire import NONCE_BYTES, POINTER, POINTER_CHECKED_BYTES, POINTER_MAGIC, Code
from kvoffload.l2.node import Outcome
from kvoffload.observe.logs import get_logger

OK, MISSING, OTHER_SIZE, REFUSED, EXPIRED, STALE, CLOSED, NONSENSE = range(8)
"""What a loop answers. All values were dealt with; (of one value: not there, of another size, no room;) out of time; closed before
anything was asked; closed; an answer that makes no sense."""

STOP, DEADLINE_NS, SLICE_NOW, SLICE_MOST, ITEM, STEP, PHASE, OFFSET, REPLY, ERRNO, DISCARD, ONE, ASKED, HERE = range(14)
TIMEVAL, TIMESPEC = 14, 16
"""Words of ``control``: times are those of CLOCK_MONOTONIC; `DISCARD`: what is received goes nowhere, and only to the end of the exchange.
`HERE`: its own address."""
CONTROL_WORDS = 18

REQUEST, REQUEST_BYTES, VALUE, VALUE_BYTES, SECOND, SECOND_BYTES, NONCE = range(7)
"""Columns of a plan: addresses and lengths, but for `NONCE`, the nonce's place in the arena, unused by writes.

Read: `REQUEST` is the get of the pointer, `SECOND` the get of the value whose nonce is to be filled in. Pointers go to ``cells``.
Write: `REQUEST` is the put of the value, `SECOND` that of the pointer, its value with it, and right behind it in memory the next
`REQUEST`. ``VALUE``: the caller's bytes.
"""
PLAN_COLUMNS = 7

SLICE_NS = 20_000_000
"""The longest that a call of the system blocks: how late a stop is heard."""
SCRATCH_BYTES = 1 << 16

_MAGIC_WORD = int.from_bytes(POINTER_MAGIC, "little")
_POINTER_BYTES = POINTER.size
_CHECKED_WORDS = POINTER_CHECKED_BYTES // 8
_NONCE_BYTES = NONCE_BYTES
_FINISHED, _ABSENT, _FULL = (int(code) for code in (Code.FINISHED, Code.ABSENT, Code.FULL))
_DONE, _NOT_THERE, _NO_ROOM, _MALFORMED = (int(outcome) for outcome in (Outcome.DONE, Outcome.ABSENT, Outcome.FULL, Outcome.MALFORMED))
DANGLING = 255
"""An outcome of `Loops.read` alone: there is a pointer, and no value where it points."""

_PEEK = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)
_WAITALL, _DONTWAIT, _NOSIGNAL, _MORE = int(socket.MSG_WAITALL), int(socket.MSG_DONTWAIT), int(socket.MSG_NOSIGNAL), int(socket.MSG_MORE)
_SOCKET, _RCVTIMEO, _SNDTIMEO = int(socket.SOL_SOCKET), 20, 21  # asm-generic/socket.h; Python does not name the latter two
_TCP, _QUICKACK = int(socket.IPPROTO_TCP), socket.TCP_QUICKACK
_EAGAIN, _EINTR = errno.EAGAIN, errno.EINTR
_CLOCK_MONOTONIC = 1

_recv = types.ExternalFunction("recv", types.int64(types.int32, types.int64, types.int64, types.int32))
_send = types.ExternalFunction("send", types.int64(types.int32, types.int64, types.int64, types.int32))
_setsockopt = types.ExternalFunction("setsockopt", types.int32(types.int32, types.int32, types.int32, types.int64, types.uint32))
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))
_errno_location = types.ExternalFunction("__errno_location", types.int64())


@intrinsic
def _word32(typing_context: Any, address: Any) -> Any:
    """The ``i32`` at an address."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(builder.inttoptr(arguments[0], ir.IntType(32).as_pointer()))

    return types.int32(types.int64), emit


@register_jitable
def _at(control: Any, word: int) -> Any:
    return control[HERE] + word * 8


@register_jitable
def _slice(fd: int, control: Any) -> Any:
    """Let the socket block until the deadline, or as long as a stop may go unheard. False when there is no time left."""
    if control[STOP] != 0:
        return False
    _clock_gettime(_CLOCK_MONOTONIC, _at(control, TIMESPEC))
    left = control[DEADLINE_NS] - (control[TIMESPEC] * 1_000_000_000 + control[TIMESPEC + 1])
    if left <= 0:
        return False
    wanted = max(min(left, control[SLICE_MOST]), 1000)  # no microseconds at all would mean for ever
    if wanted != control[SLICE_NOW]:
        control[SLICE_NOW] = wanted
        control[TIMEVAL] = wanted // 1_000_000_000
        control[TIMEVAL + 1] = wanted % 1_000_000_000 // 1000
        _setsockopt(fd, _SOCKET, _RCVTIMEO, _at(control, TIMEVAL), 16)
        _setsockopt(fd, _SOCKET, _SNDTIMEO, _at(control, TIMEVAL), 16)
    return True


@register_jitable
def _next_phase(control: Any) -> None:
    control[PHASE] += 1
    control[OFFSET] = 0


@register_jitable
def _failed(control: Any) -> Any:
    """Whether the call that just answered -1 has failed for good."""
    number = _word32(_errno_location())
    if number in (_EAGAIN, _EINTR):
        return False
    control[ERRNO] = number
    return True


@register_jitable
def _send_all(fd: int, address: int, count: int, flags: int, control: Any) -> Any:
    while control[OFFSET] < count:
        if not _slice(fd, control):
            return EXPIRED
        sent = _send(fd, address + control[OFFSET], count - control[OFFSET], flags | _NOSIGNAL)
        if sent >= 0:
            control[OFFSET] += sent
            control[ASKED] = 1
        elif _failed(control):
            return CLOSED
    _next_phase(control)
    return OK


@register_jitable
def _receive_all(fd: int, address: int, count: int, is_kept: bool, control: Any) -> Any:
    """``address`` is room for `SCRATCH_BYTES` where what comes is not kept."""
    while control[OFFSET] < count:
        if not _slice(fd, control):
            return EXPIRED
        left, place = count - control[OFFSET], control[OFFSET] if is_kept else 0
        got = _recv(fd, address + place, left if is_kept else min(left, SCRATCH_BYTES), _WAITALL)
        if got > 0:
            control[OFFSET] += got
        elif got == 0 or _failed(control):
            return CLOSED
    _next_phase(control)
    return OK


@register_jitable
def _look(fd: int, control: Any) -> Any:
    """Before anything is asked: nothing may have come, and the connection must be open."""
    got = _recv(fd, _at(control, REPLY), 1, _PEEK)
    if got > 0:
        return STALE if control[ASKED] == 0 else NONSENSE  # an answer too many: the next one would be taken for this one's
    if got == 0 or _failed(control):
        return STALE if control[ASKED] == 0 else CLOSED
    return OK


@register_jitable
def _quick_ack(fd: int, control: Any) -> None:
    """Not sticky. Without it the server holds back the end of an answer until a delayed ack, 43 ms."""
    _setsockopt(fd, _TCP, _QUICKACK, _at(control, ONE), 4)


@register_jitable
def _receive_head(fd: int, control: Any) -> Any:
    """The code of a get's answer, and where there is a value its length: it may be all the answer, so not one byte more is waited for."""
    while control[OFFSET] < 4 or (control[OFFSET] < 8 and _word32(_at(control, REPLY)) == _FINISHED):
        if not _slice(fd, control):
            return EXPIRED
        got = _recv(fd, _at(control, REPLY) + control[OFFSET], 8 - control[OFFSET], 0)
        if got > 0:
            control[OFFSET] += got
        elif got == 0 or _failed(control):
            return CLOSED
    code = _word32(_at(control, REPLY))
    if code == _ABSENT and control[OFFSET] == 4:
        control[PHASE] = control[OFFSET] = 0
        return MISSING
    if code != _FINISHED or _word32(_at(control, REPLY) + 4) < 0:
        return NONSENSE
    _next_phase(control)
    return OK


@register_jitable
def _get(fd: int, request: int, request_bytes: int, into: int, into_bytes: int, scratch: int, control: Any) -> Any:
    """One get. `OK`, `MISSING` and `OTHER_SIZE` leave nothing outstanding."""
    if control[PHASE] == 0:
        if control[OFFSET] == 0:
            status = _look(fd, control)
            if status != OK:
                return status
        status = _send_all(fd, request, request_bytes, 0, control)
        if status != OK:
            return status
    if control[PHASE] == 1:
        if control[OFFSET] == 0:
            _quick_ack(fd, control)
        status = _receive_head(fd, control)
        if status != OK:
            return status
    size = _word32(_at(control, REPLY) + 4)
    is_kept = size == into_bytes and control[DISCARD] == 0
    status = _receive_all(fd, into if is_kept else scratch, size, is_kept, control)
    if status != OK:
        return status
    control[PHASE] = 0
    return OK if size == into_bytes else OTHER_SIZE


def _ask(fd: int, requests: int, requests_bytes: int, answers: int, answers_bytes: int, control: Any) -> Any:
    """Send requests of fixed-size answers, all at once, and read the answers. They must be few enough for the server's send buffer:
    it keeps one buffer for all answers that it could not send yet."""
    if control[PHASE] == 0:
        if control[OFFSET] == 0:
            status = _look(fd, control)
            if status != OK:
                return status
        status = _send_all(fd, requests, requests_bytes, 0, control)
        if status != OK:
            return status
    _quick_ack(fd, control)
    status = _receive_all(fd, answers, answers_bytes, True, control)
    if status == OK:
        control[PHASE] = 0
    return status


@register_jitable
def _check_pointer(cells: Any, index: int) -> Any:
    """Whether this is a pointer: the magic, and the CRC-32 of the words before it (reflected, as zlib's)."""
    if cells[index, 0] != _MAGIC_WORD:
        return False
    crc = 0xFFFFFFFF
    for word in range(_CHECKED_WORDS):
        for byte in range(8):
            crc ^= (cells[index, word] >> byte * 8) & 0xFF
            for _ in range(8):
                crc = (crc >> 1) ^ (0xEDB88320 * (crc & 1))
    return cells[index, _CHECKED_WORDS] == crc ^ 0xFFFFFFFF


def _read(fd: int, plan: Any, arena: Any, cells: Any, cells_address: int, scratch: int, outcomes: Any, control: Any) -> Any:
    while control[ITEM] < plan.shape[0]:
        item = control[ITEM]
        value_bytes = plan[item, VALUE_BYTES]
        if control[STEP] == 0:
            status = _get(
                fd, plan[item, REQUEST], plan[item, REQUEST_BYTES], cells_address + item * _POINTER_BYTES, _POINTER_BYTES, scratch, control
            )
        else:
            status = _get(fd, plan[item, SECOND], plan[item, SECOND_BYTES], plan[item, VALUE], value_bytes, scratch, control)
        if status > OTHER_SIZE:
            return status
        if control[DISCARD] != 0:
            return OK
        if status == OK and control[STEP] == 0 and _check_pointer(cells, item) and cells[item, 1] == value_bytes:
            for byte in range(_NONCE_BYTES):
                arena[plan[item, NONCE] + byte] = (cells[item, 2 + byte // 8] >> byte % 8 * 8) & 0xFF
            control[STEP] = 1
            continue
        if status == MISSING:
            outcomes[item] = _NOT_THERE if control[STEP] == 0 else DANGLING
        elif status == OK and control[STEP] == 1:
            outcomes[item] = _DONE
        else:
            outcomes[item] = _MALFORMED
        control[STEP] = 0
        control[ITEM] += 1
    return OK


@register_jitable
def _take_codes(control: Any, received: int, outcomes: Any) -> Any:
    """What the answers to one burst say: that of the pointer before, unless this is the first value, and that of the value."""
    item, place = control[ITEM], 0
    for target in (item - 1, item):
        if target < 0 or (target == item and control[STEP] == 1):
            continue
        if place + 4 > received:
            return CLOSED
        code = _word32(_at(control, REPLY) + place)
        place += 4
        if code == _FULL:
            outcomes[target] = _NO_ROOM
            return REFUSED
        if code != _FINISHED:
            return NONSENSE
        if target < item:
            outcomes[target] = _DONE
    return OK


def _write(fd: int, plan: Any, outcomes: Any, control: Any) -> Any:
    """A value that is stored is followed, in one burst, by its pointer and the next value; the last by its pointer alone.

    A burst begins when everything before it has been acknowledged. So a pointer is the beginning of a segment and far shorter, and
    the server has it whole in the read that gives it the first byte.
    """
    while True:
        item = control[ITEM]
        if control[PHASE] == 0 and control[OFFSET] == 0:
            control[STEP] = 1 if item == plan.shape[0] or control[DISCARD] != 0 else 0
            if control[STEP] == 1 and item == 0:
                return OK
            if not _slice(fd, control):
                return EXPIRED
            status = _look(fd, control)
            if status != OK:
                return status
        has_value = control[STEP] == 0
        first = plan[item, REQUEST] if item == 0 else plan[item - 1, SECOND]
        first_bytes = (plan[item - 1, SECOND_BYTES] if item > 0 else 0) + (plan[item, REQUEST_BYTES] if has_value else 0)
        if control[PHASE] == 0:
            status = _send_all(fd, first, first_bytes, _MORE if has_value else 0, control)
            if status != OK:
                return status
        if control[PHASE] == 1:
            status = _send_all(fd, plan[item, VALUE], plan[item, VALUE_BYTES], 0, control) if has_value else OK
            if status == CLOSED:
                # Having no room the server says so, takes the value for requests, and hangs up: what it said is still to be read.
                received = _recv(fd, _at(control, REPLY), 8, _DONTWAIT)
                return REFUSED if _take_codes(control, received, outcomes) == REFUSED else CLOSED
            if status != OK:
                return status
            if not has_value:
                _next_phase(control)
            _quick_ack(fd, control)
        count = 8 if has_value and item > 0 else 4
        status = _receive_all(fd, _at(control, REPLY), count, True, control)
        if status == OK:
            control[PHASE] = 0
            status = _take_codes(control, count, outcomes)
        elif status == CLOSED and _take_codes(control, control[OFFSET], outcomes) == REFUSED:
            status = REFUSED
        if status != OK:
            return status
        if not has_value:
            control[ITEM] = 0  # nothing is left to be done, however often this is called
            return OK
        control[ITEM] += 1


_WORD = types.int64
_CONTROL = types.Array(types.int64, 1, "C")
_TABLE = types.Array(types.int64, 2, "C")
_BYTES = types.Array(types.uint8, 1, "C")
_ASK = _WORD(_WORD, _WORD, _WORD, _WORD, _WORD, _CONTROL)
_READ = _WORD(_WORD, _TABLE, _BYTES, _TABLE, _WORD, _WORD, _BYTES, _CONTROL)
_WRITE = _WORD(_WORD, _TABLE, _BYTES, _CONTROL)


@dataclass(frozen=True, slots=True)
class Loops:
    """The compiled loops; arguments as in `_ask`, `_read` and `_write` above."""

    ask: Callable[..., int]
    read: Callable[..., int]
    write: Callable[..., int]


@cache
def loops() -> Loops:
    """Compile now (some seconds; milliseconds when an earlier process left it in numba's cache). Raises UnsupportedError."""
    if numba.config.DISABLE_JIT:
        raise UnsupportedError("NUMBA_DISABLE_JIT is set: transfers would be interpreted code")
    return Loops(ask=_compile(_ask, _ASK), read=_compile(_read, _READ), write=_compile(_write, _WRITE))


def _compile(function: Callable[..., Any], signature: Any, *, cached: bool = True) -> Callable[..., int]:
    try:
        compiled: Callable[..., int] = numba.njit(signature, nogil=True, cache=cached)(function)
    except Exception as error:
        if not cached:
            raise UnsupportedError(f"numba cannot compile the transfers of InfiniStore: {error}") from error
        get_logger("l2").info("compiling without numba's cache", reason=str(error))
        return _compile(function, signature, cached=False)
    return compiled


def new_control() -> Any:
    """The state of a transfer that has not begun. int64, `CONTROL_WORDS` long; must not be moved."""
    control = np.zeros(CONTROL_WORDS, np.int64)
    control[SLICE_MOST] = SLICE_NS
    control[ONE] = 1
    control[HERE] = control.__array_interface__["data"][0]
    return control
