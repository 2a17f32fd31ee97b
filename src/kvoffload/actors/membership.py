"""Membership: which nodes there are, by the settings or by the table that a Redis keeps, looked at again and again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import anyio

from kvoffload.config import MembershipSettings
from kvoffload.l2.addresses import static_nodes
from kvoffload.l2.nodes_table import NodesTable, TableError, parse_table
from kvoffload.l2.ring import RendezvousRing, Ring
from kvoffload.l2.slot_ring import SlotRing
from kvoffload.l2.table_source import RedisTable, TableSource, TableUnreadable
from kvoffload.messages import NodesChanged
from kvoffload.observe.logs import get_logger

log = get_logger("membership")

JITTER = 0.2
"""Waits are so much longer or shorter, by chance: engines that started together do not ask together."""
RETRY_S, RETRY_MOST_S = 0.5, 30.0
"""A Redis that could not be read is tried again after this, each time twice as long, up to the most or the polling period."""
TROUBLE_S = 1.0
"""Looks that `Membership.trouble` asks for are at least so far apart."""
CLOSE_S = 1.0
OLDER_POLLS = 2
"""A table older than the one in force is taken if it is still there after so many polling periods."""


@dataclass(frozen=True, slots=True)
class MembershipStatistics:
    """The gauge: ``last_error`` is why the last look brought no table that is used, None if it did.

    ``version`` is that of the table in force, None before the first; ``age_s`` is how long ago Redis last brought or confirmed it, None
    if never; ``problems`` are what had to be repaired in it. Static nodes have no version and no age.
    """

    nodes: int = 0
    version: int | None = None
    age_s: float | None = None
    last_error: str | None = None
    problems: tuple[str, ...] = ()
    looks: int = 0
    failures: int = 0
    changes: int = 0


class Membership:
    """Owns: the last good table, and the connection to Redis.
    Receives: `trouble`, by call.
    Sends: `NodesChanged` by ``changed``, at the first table and whenever nodes, their addresses or their slots are others.
    Ends: when cancelled. It may be run again, and goes on with the table it has.

    Versions: AIBrix's writer numbers by adding one to what it finds in Redis, also after its own restart. So an older version than
    the one in force means either a Redis that lags (a replica, or a failover to one), or one that lost its data and was written anew.
    In the first case the older table goes away by itself; in the second, all engines that start now use it, and to stay with ours
    would part us from them for good. So an older table is taken at once if Redis was without a table in between, and else once it
    has stayed for two polling periods. Never was a block wrong for it: tables decide where blocks are looked for.

    All calls on one loop, `statistics` from anywhere. ``clock`` in seconds; ``chance`` from 0 to 1.
    """

    def __init__(
        self,
        settings: MembershipSettings,
        backend: str,
        static: Sequence[str],
        changed: Callable[[NodesChanged], None],
        *,
        source: Callable[[MembershipSettings], TableSource] = RedisTable,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """``backend`` as in ``l2.backend``. Without a URL in ``settings`` the nodes are ``static``; `ConfigError` if they make no sense."""
        self._settings = settings
        self._backend = backend
        self._static = static_nodes(backend, static) if settings.url is None else ()
        self._ignored = len(static) if settings.url is not None else 0
        self._changed = changed
        self._open = source
        self._clock = clock
        self._chance = chance
        self._ring: Ring | None = None  # as last announced
        self._table: NodesTable | None = None
        self._data: bytes | None = None  # of that table
        self._problems: tuple[str, ...] = ()
        self._good_at: float | None = None
        self._older_since: float | None = None
        self._was_absent = False
        self._error: str | None = None
        self._unreadable = 0  # looks in a row
        self._looked_at = 0.0
        self._looks = self._failures = self._changes = 0
        self._wake: anyio.Event | None = None

    async def run(self) -> None:
        if self._settings.url is None:
            if self._ring is None:
                self._announce(RendezvousRing(1, self._static))
            await anyio.sleep_forever()
        if self._ignored:
            log.warning("static_nodes_ignored", reason="l2.membership.url says where the nodes are, l2.nodes is not used")
        source = self._open(self._settings)
        try:
            while True:
                await self._look(source)
                await self._rest()
        finally:
            await self._close(source)

    def trouble(self) -> None:
        """A node fails: the table may say why. Look at once, or as soon as the last look is `TROUBLE_S` ago."""
        if self._wake is not None:
            self._wake.set()

    def statistics(self) -> MembershipStatistics:
        return MembershipStatistics(
            nodes=len(self._ring.nodes) if self._ring is not None else 0,
            version=self._table.version if self._table is not None else None,
            age_s=self._clock() - self._good_at if self._good_at is not None else None,
            last_error=self._error,
            problems=self._problems,
            looks=self._looks,
            failures=self._failures,
            changes=self._changes,
        )

    async def _look(self, source: TableSource) -> None:
        self._wake = anyio.Event()
        self._looks += 1
        try:
            # Three steps at most: connect, log in, read. Each is bounded already, unless a name server hangs.
            with anyio.fail_after(3 * self._settings.timeout_ms / 1e3 + 1):
                data = await source.read()
        except (TableUnreadable, TimeoutError) as error:
            self._unreadable += 1
            self._refuse(str(error) or "Redis did not answer in time")
            await self._close(source)
            return
        finally:
            self._looked_at = self._clock()
        self._unreadable = 0
        self._take(data)

    async def _close(self, source: TableSource) -> None:
        with anyio.CancelScope(shield=True), anyio.move_on_after(CLOSE_S):
            await source.close()

    def _take(self, data: bytes | None) -> None:
        """What Redis has now is used, or is not and the table in force stays."""
        now = self._clock()
        if data is None:
            self._was_absent = True
            self._older_since = None
            self._refuse(f"Redis has no table under {self._settings.key!r}: is it the right key and database, and does its writer run?")
            return
        if data != self._data:
            try:
                table, problems = parse_table(data)
            except TableError as error:
                self._refuse(str(error))
                return
            if self._must_wait(table, now):
                return
            self._use(table, problems)
            self._data = data
        self._good_at = now
        self._older_since = None
        self._was_absent = False
        self._say(None)

    def _must_wait(self, table: NodesTable, now: float) -> bool:
        """Is it older than the one in force, and not here to stay as far as we know?"""
        if self._table is None or self._was_absent or table.version >= self._table.version:
            return False
        if self._older_since is None:
            self._older_since = now
        wait_s = OLDER_POLLS * self._settings.poll_s
        if now - self._older_since >= wait_s:
            return False
        self._refuse(f"the table's version is {table.version}, and {self._table.version} is in force: taken if it stays for {wait_s:.3g} s")
        return True

    def _use(self, table: NodesTable, problems: tuple[str, ...]) -> None:
        if problems != self._problems and problems:
            log.warning("table_repaired", version=table.version, problems="; ".join(problems))
        if self._table is None or not table.is_same_as(self._table):
            version = table.version if self._ring is None else max(table.version, self._ring.version + 1)
            self._announce(SlotRing(table, self._backend, version))
        self._table = table
        self._problems = problems

    def _announce(self, ring: Ring) -> None:
        self._changed(NodesChanged(ring))
        self._ring = ring
        self._changes += 1
        log.info("nodes_changed", version=ring.version, nodes=",".join(node.name for node in ring.nodes))

    def _refuse(self, why: str) -> None:
        self._failures += 1
        self._say(why)

    def _say(self, error: str | None) -> None:
        """One line when the trouble changes."""
        if error == self._error:
            return
        if error is None:
            log.warning("membership_recovered")  # seen wherever its trouble was
        else:
            in_force = "none" if self._table is None else self._table.version
            log.warning("membership_trouble", reason=error, in_force=in_force)
        self._error = error

    async def _rest(self) -> None:
        """Until the next look is due, or somebody is in trouble."""
        assert self._wake is not None
        with anyio.move_on_after(self._wait_s()):
            await self._wake.wait()
            await anyio.sleep(max(0.0, self._looked_at + TROUBLE_S - self._clock()))

    def _wait_s(self) -> float:
        poll_s = self._settings.poll_s
        wait_s = poll_s
        if self._unreadable:
            wait_s = min(max(poll_s, RETRY_MOST_S), min(poll_s, RETRY_S) * 2.0 ** min(self._unreadable - 1, 64))
        return wait_s * (1 + JITTER * (2 * self._chance() - 1))
