"""Redis and Valkey as nodes of the second tier: standalone, or a cluster.

redis-py makes the connections: URL, TLS, password, database. Values do not go through it: each connection belongs to a thread
(`kvoffload.l2.lanes`) that receives into the caller's memory and sends from it (`kvoffload.l2.resp`).

A cluster is meant where the URL says ``redis+cluster://`` (TLS: ``rediss+cluster://``), or once a server answers MOVED. Names go
straight to the masters that CLUSTER SLOTS lists; what is being moved between servers (ASK) fails until it has arrived.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import anyio
from redis import ConnectionPool
from redis.crc import key_slot
from redis.exceptions import RedisError

from kvoffload.errors import UnsupportedError
from kvoffload.l2.lanes import Call, ConnectError, Connector, Piece, Pool
from kvoffload.l2.node import Item, NodeUnreachable, Outcome
from kvoffload.l2.redis_pieces import Address, AskSlots, Discard, Find, Ping, Read, Slots, Transfer, Write
from kvoffload.l2.resp import RespSocket
from kvoffload.l2.values import Values
from kvoffload.observe.logs import get_logger

log = get_logger("l2")

T = TypeVar("T")

_PIECE_BYTES = 4 << 20  # of values asked for at once over one connection: the server buffers as much
_PIECE_ITEMS = 256
_PIECE_NAMES = 1024
_GRACE_S = 0.05  # after the deadline, for threads to say that they are out of the buffers; they need the interpreter lock for it
_SLOTS_AGAIN_S = 1.0  # a table of slots that led nowhere is asked for again so often


class RedisNode:
    """An `L2Node`. ``connections`` to each server, a thread each; several threads than one keep reads from queueing behind writes.

    ``url`` as redis-py takes it, or ``redis+cluster://``, ``rediss+cluster://``. Raises UnsupportedError where it makes no sense.
    ``clock`` must be that of the deadlines. A write to a server that is out of memory is FULL, also of a value that is there.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        value_bytes: int,
        connections: int = 4,
        connect_timeout_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._connections = connections
        self._connect_timeout_s = connect_timeout_s
        self._clock = clock
        scheme, colon, rest = url.partition(":")
        self._is_cluster = scheme.endswith("+cluster")
        try:
            pool = ConnectionPool.from_url(
                scheme.removesuffix("+cluster") + colon + rest,
                protocol=2,
                socket_timeout=connect_timeout_s,  # of the handshake
                socket_connect_timeout=connect_timeout_s,
            )
            pool.connection_class(**pool.connection_kwargs)  # an option that it does not know is said here, and not at the first use
        except (TypeError, ValueError):
            # What they say may quote a part of the password.
            raise UnsupportedError(
                f"node {name}: no URL of a Redis server, or it has an option that redis-py does not know or take; "
                "characters such as / # @ : in a password must be percent-encoded"
            ) from None
        self._connection_class, self._options = pool.connection_class, dict(pool.connection_kwargs)
        self._seed: Address = (str(self._options.get("host", "localhost")), int(self._options.get("port", 6379)))
        self._pools: dict[Address, Pool] = {}
        self._renewals_before = 0  # of pools that are closed
        self._slots: Slots = []
        self._slots_age: float | None = None
        self._asking = asyncio.Lock()
        self._calls: set[Call] = set()
        self._unsettled: set[Call] = set()
        self._is_closed = False

    @property
    def name(self) -> str:
        return self._name

    @property
    def kind(self) -> Literal["standalone", "cluster"]:
        """What it is taken for."""
        return "cluster" if self._is_cluster else "standalone"

    # ------------------------------------------------------------ L2Node

    @property
    def renewals(self) -> int:
        return self._renewals_before + sum([pool.connector.renewals for pool in list(self._pools.values())])

    async def find(self, names: Sequence[str], deadline: float) -> list[bool] | None:
        """Of a cluster, what servers that do not answer would have is not found."""
        found: list[bool | None] = [None] * len(names)

        def pieces(call: Call, places: Sequence[int]) -> list[Find]:
            cuts = range(0, len(places), _PIECE_NAMES)
            return [Find(call, _of(names, part), part, found) for part in (places[cut : cut + _PIECE_NAMES] for cut in cuts)]

        await self._ask_all(len(names), lambda at: names[at], pieces, deadline, is_urgent=True)
        unknown = found.count(None)
        if not unknown:
            return found  # type: ignore[return-value]
        return None if unknown == len(found) else [bool(answer) for answer in found]

    async def read(self, items: Sequence[Item], deadline: float) -> list[Outcome]:
        return await self._transfer(Read, items, deadline)

    async def write(self, items: Sequence[Item], deadline: float) -> list[Outcome]:
        return await self._transfer(Write, items, deadline)

    async def discard(self, names: Sequence[str], deadline: float) -> None:
        def pieces(call: Call, places: Sequence[int]) -> list[Discard]:
            return [Discard(call, _of(names, places))]

        await self._ask_all(len(names), lambda at: names[at], pieces, deadline, is_urgent=False)

    async def settle(self) -> None:
        for call in list(self._unsettled):
            await call.quiet.wait()
            self._unsettled.discard(call)

    async def ping(self, deadline: float) -> float:
        where = f"node {self._name}, {self._at(self._seed)}"
        if self._is_closed:
            raise NodeUnreachable(f"{where}: the client is closed")
        if self._clock() >= deadline:
            raise NodeUnreachable(f"{where}: not asked, the deadline had passed: give it longer")
        call = Call()
        piece = Ping(call)
        pool = self._pool(self._seed)
        started = self._clock()
        in_time = await self._perform(call, [(pool, [piece])], deadline, is_urgent=True)
        seconds = self._clock() - started
        if piece.answer == b"+PONG" and in_time:
            return seconds
        if piece.answer not in (b"", b"+PONG"):
            raise NodeUnreachable(f"{where} answered {piece.answer[1:].decode(errors='replace')!r} to PING")
        if not in_time:
            connected = "connected, but did not answer" if piece.has_begun else "could not be connected"
            raise NodeUnreachable(f"{where}: {connected} within {seconds:.3f} s: is it frozen, overloaded, or behind a firewall?")
        raise NodeUnreachable(f"{where}: {pool.connector.trouble or 'the client was closed'}")

    async def close(self) -> None:
        self._is_closed = True
        for call in list(self._calls):
            call.stop()
        pools, self._pools = list(self._pools.values()), {}
        async with anyio.create_task_group() as group:
            for pool in pools:
                group.start_soon(pool.close, self._connect_timeout_s + _GRACE_S)
            for call in list(self._calls | self._unsettled):
                group.start_soon(call.quiet.wait)

    # ------------------------------------------------------------ calls

    async def _transfer(self, kind: type[Transfer], items: Sequence[Item], deadline: float) -> list[Outcome]:
        outcomes: list[Outcome | None] = [None] * len(items)
        transfers: list[Transfer] = []

        def pieces(call: Call, places: Sequence[int]) -> list[Transfer]:
            made = [kind(call, _of(items, part), part, outcomes) for part in _cut(items, places, self._connections)]
            transfers.extend(made)
            return made

        in_time = await self._ask_all(len(items), lambda at: items[at].name, pieces, deadline, is_urgent=kind is Read)
        if any(transfer.call in self._unsettled for transfer in transfers):
            for transfer in transfers:
                transfer.mark_unsettled()
        if not outcomes.count(None):
            return outcomes  # type: ignore[return-value]
        rest = Outcome.FAILED if in_time else Outcome.LATE
        return [rest if outcome is None else outcome for outcome in outcomes]

    async def _ask_all(
        self,
        count: int,
        name_of: Callable[[int], str],
        pieces: Callable[[Call, Sequence[int]], Sequence[Find | Transfer | Discard]],
        deadline: float,
        *,
        is_urgent: bool,
    ) -> bool:
        """Ask each server for its share; whether the deadline had not passed."""
        if self._is_closed or not count:
            return True
        if self._clock() >= deadline:
            return False
        by_server: dict[Address, Sequence[int]] = {}
        if self._is_cluster:
            await self._learn_slots(deadline)
            by_server |= self._by_server(count, name_of)
        else:
            by_server[self._seed] = range(count)
        if self._is_closed:
            return True
        call = Call()
        shares = [(self._pool(server), pieces(call, places)) for server, places in by_server.items()]
        in_time = await self._perform(call, shares, deadline, is_urgent=is_urgent)
        self._look_for_moves([piece for _, share in shares for piece in share])
        return in_time

    async def _perform(self, call: Call, shares: Sequence[tuple[Pool, Sequence[Piece]]], deadline: float, *, is_urgent: bool) -> bool:
        """Until all is answered, or the deadline came (False). Nothing touches a buffer after it, save what is in `_unsettled`."""
        self._calls.add(call)
        call.expect(sum(len(pieces) for _, pieces in shares))
        try:
            for pool, pieces in shares:
                pool.submit(pieces, is_urgent=is_urgent)
            in_time = await call.wait(deadline - self._clock())
            if not in_time:
                call.stop()
                with anyio.move_on_after(_GRACE_S, shield=True):
                    await call.quiet.wait()
                if not call.quiet.is_set():
                    self._unsettled.add(call)
        except asyncio.CancelledError:
            call.stop()
            await _until_quiet(call)
            raise
        finally:
            self._calls.discard(call)
            if call.is_stopped:
                for pool, _ in shares:
                    pool.forget(call)
        if call.error is not None:
            raise call.error
        return in_time

    # ------------------------------------------------------------ servers

    def _pool(self, server: Address) -> Pool:
        if server not in self._pools:
            connector = Connector(partial(self._connect, server), self._clock)
            self._pools[server] = Pool(self._name, self._connections, connector)
        return self._pools[server]

    def _connect(self, server: Address) -> RespSocket:
        """In a thread of its own."""
        options: dict[str, Any] = dict(self._options)
        if "path" not in options:
            options |= {"host": server[0], "port": server[1], "socket_keepalive": True}
        connection = self._connection_class(**options)
        try:
            connection.connect()
            sock = connection._sock  # what redis-py's own parsers read from; there is no public name for it
            sock.settimeout(None)
        except (RedisError, OSError, UnicodeError) as error:
            connection.disconnect()
            raise ConnectError(f"cannot connect to {self._at(server)}: {error}") from error
        return RespSocket(sock, connection.disconnect)

    def _at(self, server: Address) -> str:
        """Without the password."""
        return str(self._options["path"]) if "path" in self._options else f"{server[0]}:{server[1]}"

    def _server_of(self, name: str) -> Address | None:
        slot = key_slot(name.encode())
        at = bisect_right(self._slots, slot, key=lambda row: row[0]) - 1
        return self._slots[at][2] if at >= 0 and slot <= self._slots[at][1] else None

    def _by_server(self, count: int, name_of: Callable[[int], str]) -> dict[Address, list[int]]:
        by_server: dict[Address, list[int]] = {}
        for place in range(count):
            server = self._server_of(name_of(place))
            if server is not None:
                by_server.setdefault(server, []).append(place)
        return by_server

    async def _learn_slots(self, deadline: float) -> None:
        """Have a table of slots that nothing speaks against; the old one where none can be had in time."""
        with anyio.move_on_after(deadline - self._clock()):
            async with self._asking:
                for server in dict.fromkeys((self._seed, *self._pools)):
                    if self._slots_age is not None or self._is_closed:
                        break
                    call = Call()
                    piece = AskSlots(call, server)
                    half_way = self._clock() + (deadline - self._clock()) / 2  # the next one may know
                    await self._perform(call, [(self._pool(server), [piece])], half_way, is_urgent=True)
                    if piece.slots:
                        self._slots, self._slots_age = piece.slots, self._clock()
                        await self._leave_others({self._seed} | {master for _, _, master in piece.slots})

    async def _leave_others(self, servers: set[Address]) -> None:
        """Close what goes to servers that are none any more."""
        for server in set(self._pools) - servers:
            pool = self._pools.pop(server)
            self._renewals_before += pool.connector.renewals
            await pool.close(0)

    def _look_for_moves(self, pieces: Sequence[Find | Transfer | Discard]) -> None:
        """Does what became of these say that the table of slots is not right?"""
        if not self._is_cluster and any(piece.has_moved for piece in pieces):
            log.info("a server answered MOVED: taken for a cluster from now on", node=self._name, server=self._at(self._seed))
            self._is_cluster = True
        if self._slots_age is None or self._clock() - self._slots_age < _SLOTS_AGAIN_S:
            return
        if any(piece.has_moved or piece.answered < piece.count for piece in pieces):
            self._slots_age = None


async def _until_quiet(call: Call) -> None:
    """Not to be cancelled: the caller's memory is in use until then. A stopped call is quiet within a few ms."""
    with anyio.CancelScope(shield=True):
        while not call.quiet.is_set():
            try:
                await call.quiet.wait()
            except asyncio.CancelledError:  # asyncio's own knows no shield; the caller raises in any case
                continue


def _of(things: Sequence[T], places: Sequence[int]) -> Sequence[T]:
    """Those at these places; a run of them as the sequence makes it."""
    return things[places.start : places.stop] if isinstance(places, range) else [things[at] for at in places]


def _cut(items: Sequence[Item], places: Sequence[int], lanes: int) -> list[Sequence[int]]:
    """``places`` in runs of about the same number of bytes, one for each lane, or more where that would be too many."""
    if isinstance(items, Values):
        num_bytes = items.value_bytes
        share = min(_PIECE_BYTES, -(-num_bytes * len(places) // lanes))
        step = min(_PIECE_ITEMS, max(1, -(-share // num_bytes)))
        return [places[start : start + step] for start in range(0, len(places), step)]
    share = min(_PIECE_BYTES, -(-sum(items[at].buffer.nbytes for at in places) // lanes))
    runs: list[list[int]] = []
    room = 0
    for place in places:
        if room <= 0 or len(runs[-1]) >= _PIECE_ITEMS:
            runs.append([])
            room = share
        runs[-1].append(place)
        room -= items[place].buffer.nbytes
    return list(runs)
