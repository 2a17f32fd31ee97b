"""What one connection to an InfiniStore server does at a time: a share of a find, a read or a write. Run by its lane's thread."""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections.abc import Sequence
from ctypes import addressof, c_char
from itertools import accumulate
from operator import add
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
        self.trouble = ""
        """Why it failed, where the connection was the reason."""
        self._control = wired.new_control()
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
            number = int(self._control[wired.ERRNO])
            self.trouble = os.strerror(number) if number else "it hung up"
        elif status == wired.NONSENSE:
            self.trouble = "its answer makes no sense: is this the data port of an InfiniStore server?"
        if status != wired.STALE:
            self.conclude(status)
        return status

    def finish(self, fd: int, until_ns: int) -> int:
        """Go on with what `run` left outstanding. EXPIRED: call it again."""
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
    """Has a list of questions whose answers are two ``i32`` each."""

    def _ask(self, fd: int, requests: Any, answers: Any) -> int:
        return native.loops().ask(fd, _address(requests), requests.nbytes, _address(answers), answers.nbytes, self._control)


class Find(_Asking):
    """``found`` is None unless all were answered; ``seconds`` is what that took."""

    is_urgent = True

    def __init__(self, deadline: float, keys: Sequence[bytes], *, is_probe: bool = False) -> None:
        super().__init__(deadline)
        self.is_probe = is_probe
        self.found: list[bool] | None = None
        self.seconds = 0.0
        self._keys = keys
        self._parts: list[tuple[Any, Any]] = []

    def prepare(self) -> None:
        self._parts = [_questions(self._keys[start : start + MOST_ASKED]) for start in range(0, len(self._keys), MOST_ASKED)]

    def transfer(self, fd: int) -> int:
        started = time.perf_counter()
        found: list[bool] = []
        while self._parts:
            requests, answers = self._parts[0]
            status = self._ask(fd, requests, answers)
            if status != wired.OK:
                return status
            if not _make_sense(answers):
                return wired.NONSENSE
            found += (answers[:, 1] == 0).tolist()
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
        self._arena = self._plan = _NOTHING
        self._outcomes = np.full(len(items), Outcome.LATE, np.uint8)
        self.outcomes = [Outcome.LATE] * len(items)

    def conclude(self, status: int) -> None:
        # A server without room for one value has none for the next of its size, and has hung up.
        rest = {wired.EXPIRED: Outcome.LATE, wired.REFUSED: Outcome.FULL}.get(status, Outcome.FAILED)
        told = _OUTCOMES | {int(Outcome.LATE): rest, native.DANGLING: Outcome.ABSENT}
        self.outcomes = [told[outcome] for outcome in self._outcomes.tolist()]
        self._views = []
        self._items = ()

    def _see(self) -> list[tuple[int, int]]:
        """Address and length of each item's buffer, which is kept where it is until `conclude`."""
        seen: list[tuple[int, int]] = []
        for item in self._items:
            if item.buffer.readonly:
                array = np.frombuffer(item.buffer, np.uint8)
                self._views.append(array)
                seen.append((_address(array), item.buffer.nbytes))
            else:  # a third of the time
                first = c_char.from_buffer(item.buffer)
                self._views.append(first)
                seen.append((addressof(first), item.buffer.nbytes))
        return seen


class Read(Values):
    """For each the pointer, then the parts of the value that it points at."""

    def __init__(self, deadline: float, items: Sequence[Item]) -> None:
        super().__init__(deadline, items)
        self._cells = self._request = self._deleted = _NOTHING
        self._dangling: list[bytes] = []

    def prepare(self) -> None:
        if self._keys:
            return
        self._keys = [item.name.encode() for item in self._items]
        parts: list[bytes] = []
        firsts, seconds, holes, key_bytes, place = [], [], [], -1, 0
        head, tail, hole, first, second = b"", b"", 0, payload_template(GET, 1, 0), payload_template(GET, 1, 0)
        for key in self._keys:
            if len(key) != key_bytes:  # as good as never
                key_bytes = len(key)
                first, second = payload_template(GET, key_bytes, 0), payload_template(GET, key_bytes + _KEY_TAIL_BYTES, 0)
                head, tail = first.tail + second.head, value_key(b"", _HOLE) + second.tail
                hole = len(first.fill(key)) + len(second.head) + key_bytes + 1
            parts += (first.head, key, head, key, tail)
            firsts.append(len(first.head) + key_bytes + len(first.tail))
            seconds.append(key_bytes + len(second.head) + len(tail))
            holes.append(place + hole)
            place += firsts[-1] + seconds[-1]
        self._arena, self._plan = _arena_and_plan(parts, firsts, seconds, self._see())
        self._plan[:, native.NONCE] = holes
        self._cells = np.zeros((len(self._keys), POINTER.size // 8), np.int64)

    def transfer(self, fd: int) -> int:
        return native.loops().read(
            fd, self._plan, self._arena, self._cells, _address(self._cells), _SCRATCH_ADDRESS, self._outcomes, self._control
        )

    def conclude(self, status: int) -> None:
        super().conclude(status)
        if status == wired.OK:
            self._dangling = [key for key, outcome in zip(self._keys, self._outcomes.tolist(), strict=True) if outcome == native.DANGLING]

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
        if not self.is_outstanding:
            self._request = np.frombuffer(delete_request(self._dangling), np.uint8)
            self._deleted = np.zeros((1, 2), np.int32)
        status = self._ask(fd, self._request, self._deleted)
        if status == wired.OK:
            self._dangling = []
        return status


class Write(Values):
    """Which pointers exist; then for each other the value, part by part, and when the server has all of it, the pointer."""

    is_write = True

    def __init__(self, deadline: float, items: Sequence[Item]) -> None:
        super().__init__(deadline, items)
        self._requests = self._answers = self._rest = _NOTHING
        self._new: list[int] = []
        self._last: list[int] = []
        """The row in the plan of the last part of each of ``new``."""
        self._put = _NOTHING
        self._has_looked = False

    def prepare(self) -> None:
        if not self._keys:
            self._keys = [item.name.encode() for item in self._items]
            self._requests, self._answers = _questions(self._keys)

    def transfer(self, fd: int) -> int:
        if not self._has_looked:
            status = self._ask(fd, self._requests, self._answers)
            if status != wired.OK or self._control[wired.DISCARD]:
                return status
            if not _make_sense(self._answers):
                return wired.NONSENSE
            self._has_looked = True
            self._outcomes[self._answers[:, 1] == 0] = Outcome.DONE
            self._plan_puts()
        return native.loops().write(fd, self._plan, self._put, self._control)

    def _plan_puts(self) -> None:
        self._new = np.flatnonzero(self._answers[:, 1]).tolist()
        seen = self._see()
        requests: list[bytes] = []
        firsts, seconds, memory = [], [], []
        for index, nonce in zip(self._new, new_nonces(len(self._new)), strict=True):
            key, (address, size) = self._keys[index], seen[index]
            part_bytes = part_bytes_of(size)
            for part, start in enumerate(range(0, size, part_bytes)):
                length = min(part_bytes, size - start)
                first = payload_template(PUT, len(key) + _KEY_TAIL_BYTES, length).fill(value_key(key, nonce, part))
                requests.append(first)
                firsts.append(len(first))
                seconds.append(0)
                memory.append((address + start, length))
            second = payload_template(PUT, len(key), POINTER.size).fill(key) + pack_pointer(nonce, size)
            requests.append(second)
            seconds[-1] = len(second)
            self._last.append(len(seconds) - 1)
        self._arena, self._plan = _arena_and_plan(requests, firsts, seconds, memory)
        self._put = np.full(len(seconds), Outcome.LATE, np.uint8)

    @property
    def is_outstanding(self) -> bool:
        """Also where a part is stored and the pointer is not."""
        return super().is_outstanding or (self._has_looked and bool(self._control[wired.ITEM]))

    def conclude(self, status: int) -> None:
        if self._has_looked:
            self._outcomes[self._new] = self._put[self._last]
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
        begin = int(self._plan[first, native.VALUE])
        sent = int(self._plan[row, native.VALUE]) - begin + (offset if phase == 1 else 0)
        self._rest = np.frombuffer(self._items[self._new[value]].buffer, np.uint8)[sent:].copy()
        self._plan[row : last + 1, native.VALUE] += _address(self._rest) - begin - sent


_NOTHING: Any = np.empty(0, np.uint8)
_OUTCOMES = {int(outcome): outcome for outcome in Outcome}
_SCRATCH = np.empty(wired.SCRATCH_BYTES, np.uint8)  # all threads write to it, and nobody reads it
_SCRATCH_ADDRESS = int(_SCRATCH.__array_interface__["data"][0])


def _address(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


def _arena_and_plan(
    parts: Sequence[bytes], firsts: Sequence[int], seconds: Sequence[int], seen: Sequence[tuple[int, int]]
) -> tuple[Any, Any]:
    """The requests in one writable run, and the plan. Of each item first and second request, so long, and its memory."""
    arena = np.frombuffer(bytearray(b"".join(parts)), np.uint8)
    plan = np.zeros((len(firsts), native.PLAN_COLUMNS), np.int64)
    places = list(accumulate(map(add, firsts, seconds), initial=_address(arena)))[:-1]
    plan[:, native.REQUEST], plan[:, native.REQUEST_BYTES] = places, firsts
    plan[:, native.SECOND], plan[:, native.SECOND_BYTES] = list(map(add, places, firsts)), seconds
    plan[:, native.VALUE : native.VALUE_BYTES + 1] = np.array(seen, np.int64).reshape(-1, 2)
    return arena, plan


def _questions(keys: Sequence[bytes]) -> tuple[Any, Any]:
    """Whether they exist, and room for the answers."""
    return np.frombuffer(b"".join([exist_request(key) for key in keys]), np.uint8), np.zeros((len(keys), 2), np.int32)


def _make_sense(answers: Any) -> bool:
    return bool(((answers[:, 0] == _FINISHED) & ((answers[:, 1] == 0) | (answers[:, 1] == 1))).all())
