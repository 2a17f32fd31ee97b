"""The native client's side of the child: one connection, the segments' regions, and values moved in batches. Of asyncio.

What the client (infinistore 0.2.35, and its server) makes us do:

- One request is in flight at a time. Acknowledgements carry no number: the client gives each to the oldest request, and the server
  sends that of a failed one before those of older ones that still run. Two at once, and one that failed passes for done.
- Keys are looked for before a batch is read or written. A batch that lacks a key is refused as a whole, and the server then
  never frees what it had found of it; a key that is written again is lost when the older of its values is evicted.
- Whatever else goes wrong ends the process: that alone ends what the network card may still do to our memory.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import re
from collections.abc import Coroutine, Sequence
from typing import Any

from kvoffload.errors import PeerError
from kvoffload.l2.node import Outcome
from kvoffload.l2.rdma_frames import Move, Setup
from kvoffload.l2.rdma_tether import Tether
from kvoffload.memfd import check_memfd, map_memfd

BATCH_BYTES = 8 << 20
"""Moved by one request: a read waits for no longer than for one of these."""
BATCH_VALUES = 128
"""Their names and addresses fit many times into the client's 4 MiB for them."""

_CODE = re.compile(r"ret = (-?\d+)")
_ABSENT, _WRONG, _FULL = 404, 400, 507
_UNTOUCHED = 0xA5


class Mapped:
    """A segment: where it is in this process, and in which pieces it is registered."""

    def __init__(self, fd: int, num_bytes: int, region_bytes: int) -> None:
        check_memfd(fd, num_bytes, "segment")
        self.memory = map_memfd(fd, num_bytes, writable=True)
        self.memory.madvise(mmap.MADV_DONTDUMP)
        self.num_bytes = num_bytes
        self.region_bytes = region_bytes
        self._anchor = ctypes.c_char.from_buffer(self.memory)
        self.address = ctypes.addressof(self._anchor)

    def region(self, index: int) -> tuple[int, int]:
        """Address and bytes."""
        start = index * self.region_bytes
        return self.address + start, min(self.region_bytes, self.num_bytes - start)


class Session:
    """A connection, once `connect` has returned. PeerError out of any call means that the process must end."""

    def __init__(self, setup: Setup, segments: Sequence[Mapped], native: Any) -> None:
        """``native`` is the module `infinistore`."""
        self._setup = setup
        self._segments = segments
        self._native = native
        self._connection: Any = None
        self._regions: dict[tuple[int, int], str] = {}
        """What was tried to be registered, and why that failed, if it did."""

    async def connect(self, address: str) -> str:
        """Takes as long as the client takes. Returns a note for the log. Raises PeerError."""
        setup, native = self._setup, self._native
        options: dict[str, Any] = {"dev_name": setup.device, "hint_gid_index": setup.gid_index}
        try:
            config = native.ClientConfig(
                connection_type=native.TYPE_RDMA,
                host_addr=address,
                service_port=setup.port,
                link_type=setup.link_type,
                ib_port=setup.ib_port,
                log_level="error",
                **options,
            )
            self._connection = connection = native.InfinityConnection(config)
            # It would be released by another thread than the one that takes it, unguarded; one at a time needs none.
            connection.semaphore = _Open()
            await asyncio.get_running_loop().run_in_executor(None, connection.connect)
        except Exception as error:
            raise PeerError(f"the native client cannot connect to {address}:{setup.port} over {setup.device or 'RDMA'}: {error}") from error
        if setup.gid_index >= 0 and not hasattr(config, "hint_gid_index"):
            return f"this version of infinistore chooses the GID by itself: {setup.gid_index} is not heeded"
        return ""

    async def move(self, move: Move, tether: Tether, is_withdrawn: asyncio.Event) -> tuple[list[Outcome], str]:
        """What became of each value, and trouble in words. Once ``is_withdrawn`` no further batch begins; the rest is LATE."""
        outcomes = [Outcome.LATE] * len(move.names)
        trouble = ""
        if is_withdrawn.is_set():
            return outcomes, trouble
        exist = await _unless(is_withdrawn, tether.exist([name.encode() for name in move.names]))
        if exist is None:
            return outcomes, trouble
        first: dict[str, int] = {}
        for index, (name, is_there) in enumerate(zip(move.names, exist, strict=True)):
            if is_there == move.is_write:
                outcomes[index] = Outcome.DONE if is_there else Outcome.ABSENT
            elif move.is_write:
                first.setdefault(name, index)
        wanted = [index for index, is_there in enumerate(exist) if is_there != move.is_write]
        if move.is_write:
            wanted = list(first.values())
        for segment, region, batch in self._batches(move, wanted):
            if is_withdrawn.is_set():
                break
            refusal = await self._register(segment, region)
            if refusal:
                trouble = refusal
                became = [Outcome.FAILED] * len(batch)
            elif move.is_write:
                became = await self._write(move, segment, region, batch)
            else:
                became = await self._read(move, segment, region, batch)
            for index, outcome in zip(batch, became, strict=True):
                outcomes[index] = outcome
        for index, name in enumerate(move.names):
            if name in first:
                outcomes[index] = outcomes[first[name]]
        return outcomes, trouble

    def _batches(self, move: Move, wanted: Sequence[int]) -> list[tuple[int, int, list[int]]]:
        """(segment, region, indices): a request is about one region."""
        most = max(1, min(BATCH_VALUES, BATCH_BYTES // max(1, move.value_bytes)))
        by_region: dict[tuple[int, int], list[int]] = {}
        for index in wanted:
            segment, offset = move.places[index]
            by_region.setdefault((segment, offset // self._segments[segment].region_bytes), []).append(index)
        return [
            (segment, region, indices[start : start + most])
            for (segment, region), indices in by_region.items()
            for start in range(0, len(indices), most)
        ]

    async def _register(self, segment: int, region: int) -> str:
        """When first used, since registering takes the memory, and segments fill up bit by bit. Why it cannot be had, if it cannot."""
        if (segment, region) not in self._regions:
            address, num_bytes = self._segments[segment].region(region)
            refusal = ""
            try:
                await asyncio.get_running_loop().run_in_executor(None, self._connection.register_mr, address, num_bytes)
            except Exception as error:
                refusal = f"{num_bytes} bytes of a segment cannot be registered ({error}): is the memlock limit (ulimit -l) too low?"
            self._regions[segment, region] = refusal
        return self._regions[segment, region]

    async def _read(self, move: Move, segment: int, region: int, batch: list[int]) -> list[Outcome]:
        memory = self._segments[segment].memory
        lasts = [move.places[index][1] + move.value_bytes - 1 for index in batch]
        for last in lasts:
            memory[last] = _UNTOUCHED
        code = await self._perform(move, segment, region, batch)
        if code in (_ABSENT, _WRONG):
            if len(batch) == 1:
                return [Outcome.ABSENT if code == _ABSENT else Outcome.MALFORMED]
            # By themselves and not in halves: the server loses what it had found of a batch before the key that spoilt it.
            return [(await self._read(move, segment, region, [index]))[0] for index in batch]
        self._expect(code)
        became = []
        for index, last in zip(batch, lasts, strict=True):
            is_short = memory[last] == _UNTOUCHED and await self._is_short(move, segment, region, index, last)
            became.append(Outcome.MALFORMED if is_short else Outcome.DONE)
        return became

    async def _is_short(self, move: Move, segment: int, region: int, index: int, last: int) -> bool:
        """The server writes as much as it has and does not say how much. What ends in one byte cannot end in the other too."""
        memory = self._segments[segment].memory
        memory[last] = _UNTOUCHED ^ 0xFF
        return await self._perform(move, segment, region, [index]) != 200 or memory[last] == _UNTOUCHED ^ 0xFF

    async def _write(self, move: Move, segment: int, region: int, batch: list[int]) -> list[Outcome]:
        code = await self._perform(move, segment, region, batch)
        if code == _FULL:
            return [Outcome.FULL] * len(batch)
        self._expect(code)
        return [Outcome.DONE] * len(batch)

    async def _perform(self, move: Move, segment: int, region: int, batch: list[int]) -> int:
        """One request; the server's code. Raises PeerError where there is none."""
        mapped, connection = self._segments[segment], self._connection
        start = region * mapped.region_bytes
        blocks = [(move.names[index], move.places[index][1] - start) for index in batch]
        method = connection.rdma_write_cache_async if move.is_write else connection.rdma_read_cache_async
        try:
            return int(await method(blocks, move.value_bytes, mapped.address + start))
        except self._native.InfiniStoreKeyNotFound:
            return _ABSENT
        except Exception as error:
            said = _CODE.search(str(error))
            if said is None:
                raise PeerError(f"the native client failed: {error}") from error
            return int(said[1])

    def _expect(self, code: int) -> None:
        if code != 200:
            raise PeerError(f"the native client failed, ret = {code}")


async def _unless(is_withdrawn: asyncio.Event, asking: Coroutine[Any, Any, list[bool]]) -> list[bool] | None:
    """The answers; None once it is withdrawn, and whoever asks goes on to take what is left of them: a server may be frozen."""
    asked, withdrawn = asyncio.ensure_future(asking), asyncio.ensure_future(is_withdrawn.wait())
    await asyncio.wait((asked, withdrawn), return_when=asyncio.FIRST_COMPLETED)
    withdrawn.cancel()
    return asked.result() if asked.done() else None


class _Open:
    """In place of a semaphore."""

    async def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass
