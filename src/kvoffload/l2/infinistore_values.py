"""The values that one connection to an InfiniStore server moves at a time: a share of a read or a write."""

from __future__ import annotations

import time
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from ctypes import addressof, c_char
from typing import Any

import numpy as np

from kvoffload.l2 import infinistore_native as native
from kvoffload.l2 import infinistore_socket as wired
from kvoffload.l2.infinistore_transfers import Asking, Questions, address_of, whether_there
from kvoffload.l2.infinistore_wire import (
    GET,
    NONCE_BYTES,
    PART_DIGITS,
    POINTER,
    PUT,
    delete_request,
    new_nonces,
    pack_pointer,
    part_bytes_of,
    payload_template,
    value_key,
)
from kvoffload.l2.node import Item, Outcome
from kvoffload.l2.values import Values

SHORT_BYTES = 64 << 10
"""The most that the loop's thread moves for a share: some 20 us."""
SHORT_VALUES = 1
"""Each costs it some 40 us, and a lane's thread 15."""

_HOLE = b"0" * NONCE_BYTES
_KEY_TAIL_BYTES = 1 + NONCE_BYTES + PART_DIGITS


class Share(Asking):
    """A share of the values of a call; ``outcomes[i]`` is that of ``items[i]``."""

    def __init__(self, deadline: float, items: Sequence[Item]) -> None:
        super().__init__(deadline)
        self._items = items
        self._keys: list[bytes] = []
        self._views: list[Any] = []
        self._arena, self._plan = bytearray(), array("q")
        self._outcomes = bytearray(_LATE * len(items))
        self.outcomes = [Outcome.LATE] * len(items)

    def conclude(self, status: int) -> None:
        # A server without room for one value has none for the next of its size, and has hung up.
        rest = {wired.EXPIRED: Outcome.LATE, wired.REFUSED: Outcome.FULL}.get(status, Outcome.FAILED)
        told = _OUTCOMES | {int(Outcome.LATE): rest, native.DANGLING: Outcome.ABSENT}
        self.outcomes = [told[outcome] for outcome in self._outcomes]
        self._views = []
        self._items = ()

    def _see(self) -> list[tuple[int, int]]:
        """Address and length of each item's buffer, which is kept where it is until `conclude`."""
        seen: list[tuple[int, int]] = []
        for item in self._items:
            if item.buffer.readonly:
                view = np.frombuffer(item.buffer, np.uint8)
                self._views.append(view)
                seen.append((_start(view), item.buffer.nbytes))
            else:  # a third of the time
                first = c_char.from_buffer(item.buffer)
                self._views.append(first)
                seen.append((addressof(first), item.buffer.nbytes))
        return seen


class Read(Share):
    """For each the pointer, then the parts of the value that it points at."""

    def __init__(self, deadline: float, items: Sequence[Item]) -> None:
        super().__init__(deadline, items)
        self._cells = array("q")
        self._deletion: Questions | None = None
        self._dangling: list[bytes] = []

    @property
    def is_short(self) -> bool:
        items = self._items
        if len(items) > SHORT_VALUES:
            return False
        total = items.value_bytes * len(items) if isinstance(items, Values) else sum([item.buffer.nbytes for item in items])
        return total <= SHORT_BYTES

    def prepare(self) -> None:
        if self._keys:
            return
        self._keys = [item.name.encode() for item in self._items]
        parts: list[bytes] = []
        rows: list[int] = []
        key_bytes, place = -1, 0
        head, middle, tail, first_bytes, second_bytes, hole = b"", b"", b"", 0, 0, 0
        for key, (address, size) in zip(self._keys, self._see(), strict=True):
            if len(key) != key_bytes:  # as good as never
                key_bytes = len(key)
                first, second = payload_template(GET, key_bytes, 0), payload_template(GET, key_bytes + _KEY_TAIL_BYTES, 0)
                head, middle, tail = first.head, first.tail + second.head, value_key(b"", _HOLE) + second.tail
                first_bytes, second_bytes = len(first.fill(key)), len(second.head) + key_bytes + len(tail)
                hole = first_bytes + len(second.head) + key_bytes + 1
            parts += (head, key, middle, key, tail)
            rows += (place, first_bytes, address, size, place + first_bytes, second_bytes, place + hole)
            place += first_bytes + second_bytes
        self._arena = bytearray(b"".join(parts))
        self._plan = _plan(rows, self._arena)
        self._cells = array("q", bytes(POINTER.size * len(self._keys)))

    def transfer(self, fd: int) -> int:
        arena, cells = self._arena, self._cells.buffer_info()[0]
        plan, outcomes = self._plan.buffer_info()[0], address_of(self._outcomes)
        loops = native.loops()
        read = loops.read_at_once if self._control[wired.NOWAIT] else loops.read
        return read(fd, len(self._keys), plan, address_of(arena), len(arena), cells, _SCRATCH_ADDRESS, outcomes, self._control_address)

    def conclude(self, status: int) -> None:
        if status == wired.OK and isinstance(self._items, Values) and not self._control[wired.NOWAIT]:  # not on the loop
            came = [index for index, outcome in enumerate(self._outcomes) if outcome == _DONE]
            self._items.prove(came, self._is_over_time)
        super().conclude(status)
        if status == wired.OK and native.DANGLING in self._outcomes:
            self._dangling = [key for key, outcome in zip(self._keys, self._outcomes, strict=True) if outcome == native.DANGLING]

    def _is_over_time(self) -> bool:
        return bool(self._control[wired.STOP]) or time.monotonic_ns() >= self._control[wired.DEADLINE_NS]

    @property
    def is_unfinished(self) -> bool:
        return self.is_outstanding or bool(self._dangling)

    def finish_exchange(self, fd: int) -> int:
        """Read the rest of an answer into nowhere; delete pointers whose value was evicted.

        Such a pointer would stay for as long as somebody looks at it, and would keep the block from being written again. `Discard` says why
        it may be deleted.
        """
        if not self._dangling:
            return super().finish_exchange(fd)
        if self._deletion is None:
            self._deletion = Questions(delete_request(self._dangling), 1)
        status = self._ask(fd, self._deletion)
        if status == wired.OK:
            self._dangling = []
        return status


class Write(Share):
    """Which pointers exist; then for each other the value, part by part, and when the server has all of it, the pointer."""

    is_write = True

    def __init__(self, deadline: float, items: Sequence[Item]) -> None:
        super().__init__(deadline, items)
        self._whether_there: Questions | None = None
        self._rest: Any = None
        self._new: list[int] = []
        self._last: list[int] = []
        """The row in the plan of the last part of each of ``new``."""
        self._put = bytearray()
        self._has_looked = False

    def prepare(self) -> None:
        if not self._keys:
            self._keys = [item.name.encode() for item in self._items]
            self._whether_there = whether_there(self._keys)

    def transfer(self, fd: int) -> int:
        if not self._has_looked:
            assert self._whether_there is not None
            status = self._ask(fd, self._whether_there)
            if status != wired.OK or self._control[wired.DISCARD]:
                return status
            answers = self._whether_there.answers()
            if answers is None:
                return wired.NONSENSE
            self._has_looked = True
            self._plan_puts(answers)
        return native.loops().write(fd, len(self._put), self._plan.buffer_info()[0], address_of(self._put), self._control_address)

    def _plan_puts(self, answers: Sequence[int]) -> None:
        for index, answer in enumerate(answers):
            if answer == 0:
                self._outcomes[index] = Outcome.DONE
            else:
                self._new.append(index)
        seen = self._see()
        requests: list[bytes] = []
        rows: list[int] = []
        place = 0
        for index, nonce in zip(self._new, new_nonces(len(self._new)), strict=True):
            key, (address, size) = self._keys[index], seen[index]
            part_bytes = part_bytes_of(size)
            for part, start in enumerate(range(0, size, part_bytes)):
                length = min(part_bytes, size - start)
                first = payload_template(PUT, len(key) + _KEY_TAIL_BYTES, length).fill(value_key(key, nonce, part))
                requests.append(first)
                rows += (place, len(first), address + start, length, place + len(first), 0, 0)
                place += len(first)
            second = payload_template(PUT, len(key), POINTER.size).fill(key) + pack_pointer(nonce, size)
            requests.append(second)
            rows[native.SECOND_BYTES - native.PLAN_COLUMNS] = len(second)
            place += len(second)
            self._last.append(len(rows) // native.PLAN_COLUMNS - 1)
        self._arena = bytearray(b"".join(requests))
        self._plan = _plan(rows, self._arena)
        self._put = bytearray(_LATE * (len(rows) // native.PLAN_COLUMNS))

    @property
    def is_outstanding(self) -> bool:
        """Also where a part is stored and the pointer is not."""
        return super().is_outstanding or (self._has_looked and bool(self._control[wired.ITEM]))

    def conclude(self, status: int) -> None:
        if self._has_looked:
            for index, last in zip(self._new, self._last, strict=True):
                self._outcomes[index] = self._put[last]
            if status == wired.EXPIRED:
                self._keep_the_rest()
        super().conclude(status)

    def _keep_the_rest(self) -> None:
        """Of the value that was begun. To copy it takes about a millisecond, and then the caller has its memory back."""
        row, phase, offset = (int(self._control[word]) for word in (wired.ITEM, wired.PHASE, wired.OFFSET))
        value = bisect_left(self._last, row)
        if value == len(self._last):
            return
        first, last = self._last[value - 1] + 1 if value else 0, self._last[value]
        if row == first and not super().is_outstanding:
            return
        columns = native.PLAN_COLUMNS
        begin = self._plan[first * columns + native.VALUE]
        sent = self._plan[row * columns + native.VALUE] - begin + (offset if phase == 1 else 0)
        self._rest = np.frombuffer(self._items[self._new[value]].buffer, np.uint8)[sent:].copy()
        for place in range(row * columns + native.VALUE, (last + 1) * columns, columns):
            self._plan[place] += _start(self._rest) - begin - sent


_LATE = bytes([Outcome.LATE])
_DONE = int(Outcome.DONE)
_OUTCOMES = {int(outcome): outcome for outcome in Outcome}
_SCRATCH = bytearray(wired.SCRATCH_BYTES)  # all threads write to it, and nobody reads it


def _start(view: Any) -> int:
    """Where an array's bytes are."""
    return int(view.__array_interface__["data"][0])


_SCRATCH_ADDRESS = address_of(_SCRATCH)


def _plan(rows: Sequence[int], arena: bytearray) -> array[int]:
    """Of rows whose requests are said by their place in the arena. They are kept in one run of memory, which must not grow."""
    plan, address = array("q", rows), address_of(arena)
    for column in (native.REQUEST, native.SECOND):
        plan[column :: native.PLAN_COLUMNS] = array("q", [address + place for place in rows[column :: native.PLAN_COLUMNS]])
    return plan
