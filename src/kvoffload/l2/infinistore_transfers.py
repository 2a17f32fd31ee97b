"""What one connection to an InfiniStore server does at a time: what all of it has in common, and the share of a find.

Run by its lane's thread, or as far as it gets without waiting by the event loop's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from ctypes import addressof, c_char

from kvoffload.l2 import infinistore_native as native
from kvoffload.l2 import infinistore_socket as wired
from kvoffload.l2.infinistore_wire import Code, delete_request, exist_request

MOST_ASKED = 512
"""Questions sent at once: their answers, 4 KiB, fit into the server's send buffer whatever we do. It writes all that do not fit into
one buffer that it may not have sent yet."""

FINISH_SLICE_NS = 200_000_000
_NS = 1_000_000_000
_FINISHED = int(Code.FINISHED)


class Transfer:
    """One share. The loop makes it and may withdraw or `stop` it; a lane's thread claims it, runs it, and finishes what it began. A short
    one may be claimed and begun by the loop's thread, which leaves the rest to the lane's where it would have to wait for long.

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
        self._left_at: int | None = None
        self._ticket = [None]  # whoever pops it has it: popping is atomic

    def claim(self) -> bool:
        """Of thread and loop only one gets it: to run it, or to withdraw it."""
        try:
            self._ticket.pop()
        except IndexError:
            return False
        return True

    def give_back(self) -> None:
        """Claimed, and nothing asked: whoever claims it next has it."""
        self._ticket.append(None)

    def stop(self) -> None:
        """From the loop, while it runs."""
        self._control[wired.STOP] = 1

    @property
    def is_short(self) -> bool:
        """Whether the loop's thread may do it, in slices of well under a millisecond."""
        return False

    @property
    def was_left(self) -> bool:
        """Claimed and begun by the loop's thread."""
        return self._left_at is not None

    def leave(self, status: int) -> None:
        """From the loop: `run` goes on from here, where ``status`` was the last that `transfer` answered."""
        self._left_at = status

    def begin(self, left_s: float, *, may_wait: bool) -> None:
        """``left_s``: until the deadline."""
        self._control[wired.DEADLINE_NS] = time.monotonic_ns() + int(left_s * _NS)
        self._control[wired.SLICE_NOW] = 0  # what this socket's timeouts are is not known
        self._control[wired.NOWAIT] = 0 if may_wait else wired.DONTWAIT
        self.prepare()

    def run(self, fd: int, left_s: float) -> int:
        """Until all is done, or something in `infinistore_socket` is the matter. The caller's memory is not touched after it returns."""
        left_at, self._left_at = self._left_at, None
        if left_at is None:
            try:
                self.begin(left_s, may_wait=True)
            except BaseException as bug:
                self.error, left_at = bug, wired.EXPIRED  # nothing was sent
        self._control[wired.NOWAIT] = 0
        status = self.transfer(fd) if left_at is None or left_at in wired.UNDER_WAY else left_at
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
        self._control[wired.NOWAIT] = 0
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
        """It ended with this: say so in what the caller is told, and drop all references to the caller's memory. May be called again."""

    def finish_exchange(self, fd: int) -> int:
        return self.transfer(fd) if self.is_outstanding else wired.OK


class Asking(Transfer):
    """Has questions for the server."""

    def _ask(self, fd: int, questions: Questions) -> int:
        loops = native.loops()
        ask = loops.ask_at_once if self._control[wired.NOWAIT] else loops.ask
        return ask(fd, *questions.memory, self._control_address)


class Find(Asking):
    """``found`` is None unless all were answered; ``seconds`` is what that took."""

    is_urgent = True

    def __init__(self, deadline: float, names: Sequence[str], *, is_probe: bool = False) -> None:
        super().__init__(deadline)
        self.is_probe = is_probe
        self.found: list[bool] | None = None
        self.seconds = 0.0
        self._names = names
        self._started = 0.0
        self._parts: list[Questions] = []

    @property
    def is_short(self) -> bool:
        return len(self._names) <= MOST_ASKED

    def prepare(self) -> None:
        names = [name.encode() for name in self._names]
        self._parts = [whether_there(names[start : start + MOST_ASKED]) for start in range(0, len(names), MOST_ASKED)]
        self._started = time.perf_counter()

    def transfer(self, fd: int) -> int:
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
        self.found, self.seconds = found, time.perf_counter() - self._started
        return wired.OK


class Discard(Asking):
    """Of pointers, which may be deleted where they were read whole: they had been acknowledged, and one that another engine puts in the
    place of one meanwhile arrives in one piece, so there is no half of it to trip over. What they pointed at is evicted in time."""

    def __init__(self, deadline: float, names: Sequence[str]) -> None:
        super().__init__(deadline)
        self._names = names
        self._parts: list[Questions] = []

    def prepare(self) -> None:
        names = [name.encode() for name in self._names]
        self._parts = [Questions(delete_request(names[start : start + MOST_ASKED]), 1) for start in range(0, len(names), MOST_ASKED)]

    def transfer(self, fd: int) -> int:
        status: int = wired.OK
        while self._parts and status == wired.OK:
            status = self._ask(fd, self._parts[0])
            if status == wired.OK:
                del self._parts[0]
                if self._control[wired.DISCARD]:
                    break
        return status


class Questions:
    """Requests that are answered with two ``i32`` each, and their answers."""

    def __init__(self, requests: bytes, count: int) -> None:
        self._requests, self._answers = bytearray(requests), bytearray(8 * count)
        self.memory = (address_of(self._requests), len(requests), address_of(self._answers), len(self._answers))

    def answers(self) -> list[int] | None:
        """0 where there is such a key, 1 where there is none; None where an answer makes no sense."""
        numbers = memoryview(self._answers).cast("i").tolist()
        codes, answers = numbers[::2], numbers[1::2]
        return answers if codes.count(_FINISHED) == len(codes) == answers.count(0) + answers.count(1) else None


def whether_there(keys: Sequence[bytes]) -> Questions:
    if len(set(map(len, keys))) == 1:  # as good as always
        head = exist_request(keys[0])[: -len(keys[0])]
        return Questions(head + head.join(keys), len(keys))
    return Questions(b"".join([exist_request(key) for key in keys]), len(keys))


def address_of(memory: bytearray) -> int:
    """Where it is until it grows."""
    return addressof(c_char.from_buffer(memory)) if memory else 0
