"""What is asked of a Redis server over one connection, and how its answers are read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from kvoffload.l2.lanes import Call
from kvoffload.l2.node import Item, Outcome
from kvoffload.l2.resp import ProtocolError, RespSocket, bulk_length, command, commands
from kvoffload.l2.values import Values

Address = tuple[str, int]
Slots = list[tuple[int, int, Address]]

_SKIP_AT_MOST = 16 << 20  # a longer value that nobody wants costs a connection instead


class _Piece:
    """One connection's share of a call: questions that are sent together, answers in the same order."""

    is_probe = False

    def __init__(self, call: Call, count: int) -> None:
        self.call = call
        self.answered = 0
        self.count = count
        self.has_begun = False
        self.refusal = b""
        """The last error that the server answered with."""

    def run(self, connection: RespSocket) -> None:
        self.has_begun = True
        self.prepare()
        self.ask(connection)
        while self.answered < self.count:
            self.take_some(connection)
            if self.answered < self.count:
                self.take_line(connection.read_line(), connection)
        self.forget()

    def take_some(self, connection: RespSocket) -> None:
        """Take down what can be had at once, if it is what it usually is."""

    def take_line(self, line: bytes, connection: RespSocket) -> None:
        """Take down one answer."""
        if line.startswith(b"-"):
            self.refusal = line[1:]
        self.take(self.answered, line, connection)
        self.answered += 1

    def forget(self) -> None:
        """All is answered: let go of what was asked. Not left to the loop, where it would take as long as to make it."""

    def prepare(self) -> None:
        """What is to be asked is made here, and not where it is asked for: that is on the loop."""

    def ask(self, connection: RespSocket) -> None:
        raise NotImplementedError

    def take(self, index: int, line: bytes, connection: RespSocket) -> None:
        raise NotImplementedError

    @property
    def has_moved(self) -> bool:
        """Whether the server said that a name is another server's."""
        return self.refusal.startswith((b"MOVED", b"ASK "))


class Transfer(_Piece):
    """Values of one batch; ``places[i]`` is where in ``outcomes`` the outcome of ``items[i]`` goes."""

    def __init__(self, call: Call, items: Sequence[Item], places: Sequence[int], outcomes: list[Outcome | None]) -> None:
        super().__init__(call, len(items))
        self._items = items
        self._names: list[bytes] = []
        self._buffers: list[memoryview] = []
        self._places = places
        self._outcomes = outcomes

    def prepare(self) -> None:
        if not self._names:
            self._names = [name.encode() for name, _ in self._items]
            self._buffers = [_flat(buffer) for _, buffer in self._items]

    def forget(self) -> None:
        self.prove()
        self._items, self._names, self._buffers = (), [], []

    def prove(self) -> None:
        """All came: verify it here, if it is of a kind that knows how."""

    def take(self, index: int, line: bytes, connection: RespSocket) -> None:
        self._outcomes[self._places[index]] = self.outcome(self._buffers[index], line, connection)

    def outcome(self, buffer: memoryview, line: bytes, connection: RespSocket) -> Outcome:
        raise NotImplementedError

    def mark_unsettled(self) -> None:
        """It was stopped, and its thread has not said yet that it is out of the buffers, or was never in them."""
        for place in self._places:
            if self._outcomes[place] is None:
                self._outcomes[place] = Outcome.UNSETTLED


class Read(Transfer):
    """GET, straight into the buffers."""

    def ask(self, connection: RespSocket) -> None:
        connection.send([commands(b"GET", self._names[self.answered :])])

    def prove(self) -> None:
        if isinstance(self._items, Values):
            came = [index for index, place in enumerate(self._places) if self._outcomes[place] is Outcome.DONE]
            self._items.prove(came, lambda: self.call.is_stopped)

    def take_some(self, connection: RespSocket) -> None:
        first = self.answered
        count = connection.read_values(self._buffers[first:])
        for place in self._places[first : first + count]:
            self._outcomes[place] = Outcome.DONE
        self.answered += count

    def outcome(self, buffer: memoryview, line: bytes, connection: RespSocket) -> Outcome:
        if line.startswith(b"-"):
            return Outcome.MALFORMED if line.startswith(b"-WRONGTYPE") else Outcome.FAILED
        length = bulk_length(line)
        if length is None:
            return Outcome.ABSENT
        if length == len(buffer):
            connection.read_value(buffer)
            return Outcome.DONE
        if length > _SKIP_AT_MOST:
            self._outcomes[self._places[self.answered]] = Outcome.MALFORMED
            self.answered += 1  # the rest is asked for again, over another connection
            raise ProtocolError(f"a value has {length} bytes instead of {len(buffer)}")
        connection.skip_value(length)
        return Outcome.MALFORMED


class Write(Transfer):
    """SET NX, straight from the buffers, all in one system call."""

    def ask(self, connection: RespSocket) -> None:
        parts: list[bytes | memoryview] = []
        end = b""
        for name, buffer in zip(self._names[self.answered :], self._buffers[self.answered :], strict=True):
            start = b"*4\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(name), name, len(buffer))
            parts += (end + start, buffer)
            end = b"\r\n$2\r\nNX\r\n"
        connection.send([*parts, end])

    def outcome(self, buffer: memoryview, line: bytes, connection: RespSocket) -> Outcome:
        if line == b"+OK" or line.startswith((b"$-1", b"_")):  # nil: it was there
            return Outcome.DONE
        if line.startswith(b"-OOM"):
            return Outcome.FULL
        if line.startswith(b"-"):
            return Outcome.FAILED
        raise ProtocolError(f"not an answer to SET: {line[:80]!r}")


class Find(_Piece):
    """EXISTS, name by name; ``found[places[i]]`` stays None where the server would not say."""

    def __init__(self, call: Call, names: Sequence[str], places: Sequence[int], found: list[bool | None]) -> None:
        super().__init__(call, len(names))
        self._asked = names
        self._names: list[bytes] = []
        self._places = places
        self._found = found

    def prepare(self) -> None:
        self._names = self._names or [name.encode() for name in self._asked]

    def forget(self) -> None:
        self._asked, self._names = (), []

    def ask(self, connection: RespSocket) -> None:
        connection.send([commands(b"EXISTS", self._names[self.answered :])])

    def take_some(self, connection: RespSocket) -> None:
        for line in connection.read_lines(self.count - self.answered):
            self.take_line(line, connection)

    def take(self, index: int, line: bytes, connection: RespSocket) -> None:
        if line.startswith(b":"):
            self._found[self._places[index]] = line == b":1"
        elif not line.startswith(b"-"):
            raise ProtocolError(f"not an answer to EXISTS: {line[:80]!r}")


class Discard(_Piece):
    """UNLINK, name by name: those of a cluster need not be on one server."""

    def __init__(self, call: Call, names: Sequence[str]) -> None:
        super().__init__(call, len(names))
        self._names = names

    def ask(self, connection: RespSocket) -> None:
        connection.send([commands(b"UNLINK", [name.encode() for name in self._names[self.answered :]])])

    def take_some(self, connection: RespSocket) -> None:
        for line in connection.read_lines(self.count - self.answered):
            self.take_line(line, connection)

    def take(self, index: int, line: bytes, connection: RespSocket) -> None:
        if not line.startswith((b":", b"-")):
            raise ProtocolError(f"not an answer to UNLINK: {line[:80]!r}")


class Ping(_Piece):
    """PING; `answer` is what came."""

    is_probe = True

    def __init__(self, call: Call) -> None:
        super().__init__(call, 1)
        self.answer = b""

    def ask(self, connection: RespSocket) -> None:
        connection.send([command(b"PING")])

    def take(self, index: int, line: bytes, connection: RespSocket) -> None:
        self.answer = line


class AskSlots(_Piece):
    """CLUSTER SLOTS: which server has which names; `slots` is None where it did not say."""

    def __init__(self, call: Call, asked: Address) -> None:
        super().__init__(call, 1)
        self._asked = asked
        self.slots: Slots | None = None

    def ask(self, connection: RespSocket) -> None:
        connection.send([command(b"CLUSTER", b"SLOTS")])

    def take(self, index: int, line: bytes, connection: RespSocket) -> None:
        if not line.startswith(b"-"):
            self.slots = _slots(_reply(line, connection, depth=5), self._asked)


def _flat(buffer: memoryview) -> memoryview:
    return buffer if buffer.ndim == 1 and buffer.format == "B" else buffer.cast("B")


def _reply(line: bytes, connection: RespSocket, depth: int) -> object:
    """A whole reply whose first line is ``line``. Raises `ProtocolError`."""
    kind, rest = line[:1], line[1:]
    if kind in (b"+", b"-"):
        return rest
    if kind == b"$":
        length = bulk_length(line)
        if length is None or length > 4096:
            if length is not None:
                raise ProtocolError(f"a name of {length} bytes")
            return None
        text = bytearray(length)
        connection.read_value(memoryview(text))
        return bytes(text)
    try:
        number = int(rest)
    except ValueError as error:
        raise ProtocolError(f"not a reply: {line[:80]!r}") from error
    if kind == b":":
        return number
    if kind != b"*" or number > 20_000 or not depth:
        raise ProtocolError(f"not a reply: {line[:80]!r}")
    return [_reply(connection.read_line(), connection, depth - 1) for _ in range(max(number, 0))]


def _slots(reply: object, asked: Address) -> Slots:
    """(first hash slot, last, its master), in order; a server that does not know its own host is where we asked."""
    try:
        ranges = []
        for first, last, (host, port, *_), *_ in reply:  # type: ignore[attr-defined]
            name = (host or b"").decode()
            ranges.append((int(first), int(last), (asked[0] if name in ("", "?") else name, int(port))))
    except (AttributeError, TypeError, ValueError) as error:
        raise ProtocolError(f"CLUSTER SLOTS makes no sense: {error}") from error
    ranges.sort()
    if any(first > last for first, last, _ in ranges) or any(left[1] >= right[0] for left, right in pairwise(ranges)):
        raise ProtocolError("CLUSTER SLOTS has ranges that overlap")
    return ranges
