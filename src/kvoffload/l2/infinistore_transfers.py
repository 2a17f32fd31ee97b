"""What one connection to an InfiniStore server does at a time: a share of a find, a read or a write. Run by its lane's thread."""

from __future__ import annotations

import os
import time
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from ctypes import addressof, c_char
from typing import Any

import numpy as np

from kvoffload.l2 import infinistore_native as native
from kvoffload.l2 import infinistore_socket as wired
from kvoffload.l2.infinistore_wire import (
    GET,
    NONCE_BYTES,
    PART_DIGITS,
    POINTER,
    PUT,
    Code,
    delete_request,
    exist_request,
    new_nonces,
    pack_pointer,
    part_bytes_of,
    payload_template,
    value_key,
)
from kvoffload.l2.node import Item, Outcome

MOST_ASKED = 512
"""Questions sent at once: their answers, 4 KiB, fit into the server's send buffer whatever we do. It writes all that do not fit into
one buffer that it may not have sent yet."""

FINISH_SLICE_NS = 200_000_000
_HOLE = b"0" * NONCE_BYTES
_KEY_TAIL_BYTES = 1 + NONCE_BYTES + PART_DIGITS
_FINISHED = int(Code.FINISHED)


class Transfer:
    """One share. The loop makes it and may withdraw or `stop` it; a lane's thread claims it, runs it, and finishes what it began.

    A transfer that is out of time lets go of the caller's memory at once, one that is stopped within some 20 ms. What it was in the
    middle of is then finished without that memory, for the server's sake: an answer that nobody reads ends the server when the
    connection closes, and the rest of a value that does not come leaves it with memory that it never frees. (Half a value harms no
    reader: its nonce is in no pointer, so nobody asks for it.)
    """

    is_write = False
    is_urgent = False
    is_probe = False

    def __init__(self, deadline: float) -> None:
        """``deadline`` on the node's clock."""
        self.deadline = deadline
        self.error: BaseException | None = None
        self.is_withdrawn = False
        self.is_under_way = False
        """Given to a lane that has a connection, which claims it at once."""
        self.trouble = ""
        """Why it failed, where the connection was the reason."""
        self._control, self._control_address = wired.new_control()
        self._ticket = [None]  # whoever pops it has it: popping is atomic

    def claim(self) -> bool:
        """Of thread and loop only one gets it: to run it, or to withdraw it."""
        try:
            self._ticket.pop()
        except IndexError:
            return False
        return True

    def stop(self) -> None:
        """From the loop, while it runs."""
        self._control[wired.STOP] = 1

    def run(self, fd: int, deadline_ns: int) -> int:
        """Until all is done, or something in `infinistore_socket` is the matter. The caller's memory is not touched after it returns."""
        self._control[wired.DEADLINE_NS] = deadline_ns
        self._control[wired.SLICE_NOW] = 0  # what this socket's timeouts are is not known
        self.prepare()
        status = self.transfer(fd)
        if status == wired.CLOSED:
            number = self._control[wired.ERRNO]
            self.trouble = os.strerror(number) if number else "it hung up"
        elif status == wired.NONSENSE:
            self.trouble = "its answer makes no sense: is this the data port of an InfiniStore server?"
        if status != wired.STALE:
            self.conclude(status)
        return status

    def finish(self, fd: int, until_ns: int) -> int:
        """Go on with what `run` left. EXPIRED: call it again."""
        self._control[wired.STOP] = 0
        self._control[wired.DEADLINE_NS] = until_ns
        self._control[wired.SLICE_MOST] = FINISH_SLICE_NS
        self._control[wired.DISCARD] = 1
        return self.finish_exchange(fd)

    @property
    def is_outstanding(self) -> bool:
        """Whether the server has been asked something that it has not answered yet, or has half of a question."""
        return bool(self._control[wired.PHASE] or self._control[wired.OFFSET])

    @property
    def is_unfinished(self) -> bool:
        """Whether `finish` has something to do."""
        return self.is_outstanding

    def prepare(self) -> None:
        """Make what is to be sent. May be called again, to begin once more over another connection."""

    def transfer(self, fd: int) -> int:
        raise NotImplementedError

    def conclude(self, status: int) -> None:
        """It ended with this: say so in what the caller is told, and drop all references to the caller's memory."""

    def finish_exchange(self, fd: int) -> int:
        return self.transfer(fd) if self.is_outstanding else wired.OK


class _Asking(Transfer):
    """Has questions for the server."""

    def _ask(self, fd: int, questions: Questions) -> int:
        return native.loops().ask(fd, *questions.memory, self._control_address)


class Find(_Asking):
    """``found`` is None unless all were answered; ``seconds`` is what that took."""

    is_urgent = True

    def __init__(self, deadline: float, keys: Sequence[bytes], *, is_probe: bool = False) -> None:
        super().__init__(deadline)
        self.is_probe = is_probe
        self.found: list[bool] | None = None
        self.seconds = 0.0
        self._keys = keys
        self._parts: list[Questions] = []

    def prepare(self) -> None:
        self._parts = [_whether_there(self._keys[start : start + MOST_ASKED]) for start in range(0, len(self._keys), MOST_ASKED)]

    def transfer(self, fd: int) -> int:
        started = time.perf_counter()
        found: list[bool] = []
        while self._parts:
            status = self._ask(fd, self._parts[0])
            if status != wired.OK:
                return status
            answers = self._parts[0].answers()
            if answers is None:
                return wired.NONSENSE
            found += [answer == 0 for answer in answers]
            del self._parts[0]
            if self._control[wired.DISCARD]:
                return wired.OK
        self.found, self.seconds = found, time.perf_counter() - started
        return wired.OK


class Values(_Asking):
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


class Read(Values):
    """For each the pointer, then the parts of the value that it points at."""

    def __init__(self, deadline: float, items: Sequence[Item]) -> None:
        super().__init__(deadline, items)
        self._cells = array("q")
        self._deletion: Questions | None = None
        self._dangling: list[bytes] = []

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
        plan, outcomes = self._plan.buffer_info()[0], _address(self._outcomes)
        return native.loops().read(
            fd, len(self._keys), plan, _address(arena), len(arena), cells, _SCRATCH_ADDRESS, outcomes, self._control_address
        )

    def conclude(self, status: int) -> None:
        super().conclude(status)
        if status == wired.OK and native.DANGLING in self._outcomes:
            self._dangling = [key for key, outcome in zip(self._keys, self._outcomes, strict=True) if outcome == native.DANGLING]

    @property
    def is_unfinished(self) -> bool:
        return self.is_outstanding or bool(self._dangling)

    def finish_exchange(self, fd: int) -> int:
        """Read the rest of an answer into nowhere; delete pointers whose value was evicted.

        Such a pointer would stay for as long as somebody looks at it, and would keep the block from being written again. It may be
        deleted: it was read whole, so it had been acknowledged, and one that another engine puts in its place meanwhile arrives in one
        piece, so there is no half of it to trip over.
        """
        if not self._dangling:
            return super().finish_exchange(fd)
        if self._deletion is None:
            self._deletion = Questions(delete_request(self._dangling), 1)
        status = self._ask(fd, self._deletion)
        if status == wired.OK:
            self._dangling = []
        return status


class Write(Values):
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
            self._whether_there = _whether_there(self._keys)

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
        return native.loops().write(fd, len(self._put), self._plan.buffer_info()[0], _address(self._put), self._control_address)

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
_OUTCOMES = {int(outcome): outcome for outcome in Outcome}
_SCRATCH = bytearray(wired.SCRATCH_BYTES)  # all threads write to it, and nobody reads it


def _address(memory: bytearray) -> int:
    """Where it is until it grows."""
    return addressof(c_char.from_buffer(memory)) if memory else 0


def _start(view: Any) -> int:
    """Where an array's bytes are."""
    return int(view.__array_interface__["data"][0])


_SCRATCH_ADDRESS = _address(_SCRATCH)


def _plan(rows: Sequence[int], arena: bytearray) -> array[int]:
    """Of rows whose requests are said by their place in the arena. They are kept in one run of memory, which must not grow."""
    plan, address = array("q", rows), _address(arena)
    for column in (native.REQUEST, native.SECOND):
        plan[column :: native.PLAN_COLUMNS] = array("q", [address + place for place in rows[column :: native.PLAN_COLUMNS]])
    return plan


class Questions:
    """Requests that are answered with two ``i32`` each, and their answers."""

    def __init__(self, requests: bytes, count: int) -> None:
        self._requests, self._answers = bytearray(requests), bytearray(8 * count)
        self.memory = (_address(self._requests), len(requests), _address(self._answers), len(self._answers))

    def answers(self) -> list[int] | None:
        """0 where there is such a key, 1 where there is none; None where an answer makes no sense."""
        numbers = memoryview(self._answers).cast("i").tolist()
        codes, answers = numbers[::2], numbers[1::2]
        return answers if codes.count(_FINISHED) == len(codes) == answers.count(0) + answers.count(1) else None


def _whether_there(keys: Sequence[bytes]) -> Questions:
    return Questions(b"".join([exist_request(key) for key in keys]), len(keys))
