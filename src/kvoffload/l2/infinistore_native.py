"""The transfers of one connection, compiled by numba: many values are moved while the interpreter lock is let go once.

An engine in the same process may hold the lock for 5 ms at a time. A transfer in Python takes it after every call of the system,
some ten times a value; these loops take it once a batch. Where they may not wait they keep it: it is gone for microseconds that way,
and let go it might be another's for those 5 ms.

What each is made of, and how it is interrupted: `infinistore_socket`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from numba import types
from numba.extending import register_jitable

from kvoffload.compiled import compile_native, digest_of
from kvoffload.l2 import infinistore_socket, infinistore_wire, system_calls
from kvoffload.l2.infinistore_socket import (
    CLOSED,
    CONTROL_WORDS,
    DISCARD,
    DONTWAIT,
    EXPIRED,
    ITEM,
    MISSING,
    MORE,
    NONSENSE,
    NOWAIT,
    OFFSET,
    OK,
    OTHER_SIZE,
    PHASE,
    REFUSED,
    REPLY,
    STEP,
    TOO_LONG,
    at,
    get,
    has_time,
    look,
    next_phase,
    quick_ack,
    receive_all,
    receive_codes,
    send_all,
)
from kvoffload.l2.infinistore_wire import (
    MOST_PART_BYTES,
    MOST_PARTS,
    NONCE_BYTES,
    PART_DIGITS,
    POINTER,
    POINTER_CHECKED_BYTES,
    POINTER_MAGIC,
    Code,
)
from kvoffload.l2.node import Outcome
from kvoffload.l2.system_calls import octets, recv, word32, words

REQUEST, REQUEST_BYTES, VALUE, VALUE_BYTES, SECOND, SECOND_BYTES, NONCE = range(7)
"""Columns of a plan: addresses and lengths, but for `NONCE`, the nonce's place in the arena (of reads). ``VALUE``: the caller's memory.

Read: a row is a value; `REQUEST` is the get of the pointer, `SECOND` that of a part, whose nonce and number are to be filled in. Pointers
go to ``cells``.
Write: a row is a part of a value; `REQUEST` is its put, `SECOND` that of the pointer, the pointer with it, which is empty unless it is the
value's last part. Right behind it in memory is the next `REQUEST`.
"""
PLAN_COLUMNS = 7

_MAGIC_WORD = int.from_bytes(POINTER_MAGIC, "little")
_POINTER_BYTES, _POINTER_WORDS = POINTER.size, POINTER.size // 8
_CHECKED_WORDS = POINTER_CHECKED_BYTES // 8
_FINISHED, _FULL = int(Code.FINISHED), int(Code.FULL)
_DONE, _NOT_THERE, _NO_ROOM, _MALFORMED = (int(outcome) for outcome in (Outcome.DONE, Outcome.ABSENT, Outcome.FULL, Outcome.MALFORMED))
DANGLING = 255
"""An outcome of `Loops.read` alone: there is a pointer, and where it points a part is missing."""


@register_jitable
def _ask(fd: int, requests: int, requests_bytes: int, answers: int, answers_bytes: int, control: Any) -> Any:
    """Send requests of fixed-size answers, all at once, and read the answers. They must be few enough for the server's send buffer:
    it keeps one buffer for all answers that it could not send yet."""
    if control[PHASE] == 0:
        if control[OFFSET] == 0:
            status = look(fd, control)
            if status != OK:
                return status
        status = send_all(fd, requests, requests_bytes, 0, control)
        if status != OK:
            return status
    quick_ack(fd, control)
    status = receive_all(fd, answers, answers_bytes, True, control)
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


@register_jitable
def _may_follow(cells: Any, index: int) -> Any:
    """Whether it cuts its value into parts that may be asked for."""
    part_bytes = cells[index, 4]
    return 0 < part_bytes <= MOST_PART_BYTES and cells[index, 1] <= part_bytes * MOST_PARTS


@register_jitable
def _name_part(arena: Any, place: int, cells: Any, index: int, part: int) -> None:
    """Fill in what tells the keys of a value's parts from the value's name."""
    for byte in range(NONCE_BYTES):
        arena[place + byte] = (cells[index, 2 + byte // 8] >> byte % 8 * 8) & 0xFF
    for digit in range(PART_DIGITS):
        number = (part >> 4 * (PART_DIGITS - 1 - digit)) & 0xF
        arena[place + NONCE_BYTES + digit] = number + (48 if number < 10 else 87)  # as %x


@register_jitable
def _read(fd: int, plan: Any, arena: Any, cells: Any, cells_address: int, scratch: int, outcomes: Any, control: Any) -> Any:
    """Of a value first the pointer, then its parts one after another, each to its place. `STEP`: 0, or the number of the part from 1."""
    while control[ITEM] < plan.shape[0]:
        item = control[ITEM]
        value_bytes = plan[item, VALUE_BYTES]
        end = min(control[STEP] * cells[item, 4], value_bytes)  # of this part, and so far
        if control[STEP] == 0:
            status = get(
                fd, plan[item, REQUEST], plan[item, REQUEST_BYTES], cells_address + item * _POINTER_BYTES, _POINTER_BYTES, scratch, control
            )
        else:
            start = (control[STEP] - 1) * cells[item, 4]
            status = get(fd, plan[item, SECOND], plan[item, SECOND_BYTES], plan[item, VALUE] + start, end - start, scratch, control)
        if status > OTHER_SIZE:
            return status
        if control[DISCARD] != 0:
            return OK
        is_sound = control[STEP] > 0 or (_check_pointer(cells, item) and cells[item, 1] == value_bytes and _may_follow(cells, item))
        if status == OK and is_sound and end < value_bytes:
            _name_part(arena, plan[item, NONCE], cells, item, control[STEP])
            control[STEP] += 1
            if control[NOWAIT] != 0 and cells[item, 4] < value_bytes:
                return TOO_LONG
            continue
        if status == MISSING:
            outcomes[item] = _NOT_THERE if control[STEP] == 0 else DANGLING
        elif status == OK and is_sound:
            outcomes[item] = _DONE
        else:
            outcomes[item] = _MALFORMED
        control[STEP] = 0
        control[ITEM] += 1
    return OK


@register_jitable
def _take_codes(control: Any, received: int, plan: Any, outcomes: Any) -> Any:
    """What the answers to one burst say: that of the pointer of the part before, where it has one, and that of the part."""
    item, place = control[ITEM], 0
    for target in (item - 1, item):
        if (target < item and (item == 0 or plan[item - 1, SECOND_BYTES] == 0)) or (target == item and control[STEP] == 1):
            continue
        if place + 4 > received:
            return CLOSED
        code = word32(at(control, REPLY) + place)
        place += 4
        if code == _FULL:
            outcomes[target] = _NO_ROOM
            return REFUSED
        if code != _FINISHED:
            return NONSENSE
        if target < item:
            outcomes[target] = _DONE
    return OK


@register_jitable
def _write(fd: int, plan: Any, outcomes: Any, control: Any) -> Any:
    """Part after part. When a value's last part is stored, its pointer and the next value's first part follow in one burst; in the end the
    pointer alone (`STEP` 1). The outcome of a value is that of its last part. To discard is to finish the value that was begun.

    A burst begins when everything before it has been acknowledged. So a pointer is the beginning of a segment and far shorter, and
    the server has it whole in the read that gives it the first byte.
    """
    while True:
        item = control[ITEM]
        if control[PHASE] == 0 and control[OFFSET] == 0:
            is_between = item == 0 or plan[item - 1, SECOND_BYTES] > 0  # two values
            control[STEP] = 1 if item == plan.shape[0] or (control[DISCARD] != 0 and is_between) else 0
            if control[STEP] == 1 and item == 0:
                return OK
            if not has_time(fd, control):
                return EXPIRED
            status = look(fd, control)
            if status != OK:
                return status
        has_value = control[STEP] == 0
        first = plan[item, REQUEST] if item == 0 else plan[item - 1, SECOND]
        first_bytes = (plan[item - 1, SECOND_BYTES] if item > 0 else 0) + (plan[item, REQUEST_BYTES] if has_value else 0)
        if control[PHASE] == 0:
            status = send_all(fd, first, first_bytes, MORE if has_value else 0, control)
            if status != OK:
                return status
        if control[PHASE] == 1:
            status = send_all(fd, plan[item, VALUE], plan[item, VALUE_BYTES], 0, control) if has_value else OK
            if status == CLOSED:
                # Having no room the server says so, takes the value for requests, and hangs up: what it said is still to be read.
                received = recv(fd, at(control, REPLY), 8, DONTWAIT)
                return REFUSED if _take_codes(control, received, plan, outcomes) == REFUSED else CLOSED
            if status != OK:
                return status
            if not has_value:
                next_phase(control)
        count = (4 if has_value else 0) + (4 if item > 0 and plan[item - 1, SECOND_BYTES] > 0 else 0)
        status = receive_codes(fd, count, control)
        if status == OK:
            control[PHASE] = 0
            status = _take_codes(control, count, plan, outcomes)
        elif status == CLOSED and _take_codes(control, control[OFFSET], plan, outcomes) == REFUSED:
            status = REFUSED
        if status != OK:
            return status
        if not has_value:
            control[ITEM] = 0  # nothing is left to be done, however often this is called
            return OK
        control[ITEM] += 1


_WORD = types.int64
_ASK, _READ, _WRITE = (_WORD(*[_WORD] * count) for count in (6, 9, 5))


@dataclass(frozen=True, slots=True)
class Loops:
    """The compiled loops; arguments as in `_entries` below, all of them numbers: numba takes microseconds to look into an array."""

    ask: Callable[..., int]
    read: Callable[..., int]
    write: Callable[..., int]
    ask_at_once: Callable[..., int]
    read_at_once: Callable[..., int]
    """These two keep the interpreter lock: for transfers with `NOWAIT` alone."""


@cache
def loops() -> Loops:
    """Compile now (some seconds; milliseconds when an earlier process left it in numba's cache). Raises UnsupportedError."""
    digest = digest_of(sys.modules[__name__], infinistore_socket, infinistore_wire, system_calls)
    ask, read, write = _entries(digest, 0)
    ask_at_once, read_at_once, _ = _entries(digest, 1)
    return Loops(
        ask=compile_native(ask, _ASK),
        read=compile_native(read, _READ),
        write=compile_native(write, _WRITE),
        ask_at_once=compile_native(ask_at_once, _ASK, nogil=False),
        read_at_once=compile_native(read_at_once, _READ, nogil=False),
    )


def _entries(digest: int, lock: int) -> tuple[Callable[..., Any], ...]:
    """The loops as functions whose closure holds ``digest`` and ``lock``: see `kvoffload.compiled`."""

    def ask(fd: int, requests: int, requests_bytes: int, answers: int, answers_bytes: int, control: int) -> Any:
        digest, lock  # noqa: B018
        return _ask(fd, requests, requests_bytes, answers, answers_bytes, words(control, 1, CONTROL_WORDS)[0])

    def read(fd: int, count: int, plan: int, arena: int, arena_bytes: int, cells: int, scratch: int, outcomes: int, control: int) -> Any:
        digest, lock  # noqa: B018
        table, pointers, state = words(plan, count, PLAN_COLUMNS), words(cells, count, _POINTER_WORDS), words(control, 1, CONTROL_WORDS)[0]
        return _read(fd, table, octets(arena, arena_bytes), pointers, cells, scratch, octets(outcomes, count), state)

    def write(fd: int, count: int, plan: int, outcomes: int, control: int) -> Any:
        digest, lock  # noqa: B018
        return _write(fd, words(plan, count, PLAN_COLUMNS), octets(outcomes, count), words(control, 1, CONTROL_WORDS)[0])

    return ask, read, write
