"""The copy threads without threads: the same tables and outcomes as `kvoffload.copy.hands`, copied half a block at a time."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from kvoffload.copy.pairing import PairingTable
from kvoffload.messages import BlocksFilled, DropReason, Job, LoadBlocks, LoadEnded, LoadFinished, LoadOutcome, SaveBlocks, SlotGrant
from kvoffload.testing.sim.hub import SimHub
from kvoffload.testing.sim.memory import SimClock, SimLedger, SimMemory
from kvoffload.testing.sim.settings import BLOCK_SIZE, SimSettings
from kvoffload.testing.sim.trace import OracleError, Trace, shorten

HALF = BLOCK_SIZE // 2


class LoadState(Enum):
    QUEUED = "queued"
    STARTED = "started"
    ENDED = "ended"
    WITHDRAWN = "withdrawn"


@dataclass(eq=False)
class SimLoad:
    """A load on its way (`kvoffload.connector.ports.LoadHandle`)."""

    copies: SimCopies
    message: LoadBlocks
    queued_at: float
    state: LoadState = LoadState.QUEUED
    halves: int = 0
    fails_at: int | None = None

    def withdraw(self) -> bool:
        return self.copies.withdraw(self)


@dataclass(eq=False)
class SimSave:
    """A save being copied; ``flags`` are of the blocks done."""

    grant: SlotGrant
    halves: int = 0
    flags: list[bool] = field(default_factory=list)
    fails_at: int | None = None


@dataclass(slots=True)
class Sabotage:
    """What a negative control breaks."""

    ignore_ledger: bool = False
    claim_loads: bool = False
    swap_blocks: bool = False


class SimCopies:
    """`kvoffload.connector.ports.CopyPort`, and GpuCopy's place in the flow. Copies move in `tick_load` and `tick_save`.

    ``owns(request, blocks)`` says whether these engine blocks are still reserved for the load of that request.
    """

    def __init__(
        self,
        hub: SimHub,
        memory: SimMemory,
        ledger: SimLedger,
        settings: SimSettings,
        clock: SimClock,
        rng: random.Random,
        trace: Trace,
        progress: Callable[[], None],
        owns: Callable[[str, Sequence[int]], bool],
        perhaps_fail: Callable[[], None],
    ) -> None:
        self.hold_loads = False
        self.hold_saves = False
        self.hold_at: int | None = None
        """Half blocks after which a copy under way stops, until this is changed."""
        self.crashed = False
        self.sabotage = Sabotage()
        self.waited_s = 0.0
        self.finished_loads: Counter[LoadOutcome] = Counter()
        self.saved_blocks = 0
        self.loads: deque[SimLoad] = deque()
        self._loading: SimLoad | None = None
        self._pairs: deque[SimSave] = deque()
        self._saving: SimSave | None = None
        self._ended: list[LoadEnded] = []
        self._table = PairingTable(settings.pair_timeout_s, max_saves=8)
        self._writers: dict[int, Job] = {}
        self._readers: Counter[int] = Counter()
        self._open: dict[Job, tuple[int, ...]] = {}
        self._hub = hub
        self._memory = memory
        self._ledger = ledger
        self._settings = settings
        self._clock = clock
        self._rng = rng
        self._trace = trace
        self._progress = progress
        self._owns = owns
        self._perhaps_fail = perhaps_fail

    # ------------------------------------------------------------ CopyPort

    def mark(self) -> object:
        self._perhaps_fail()
        return self._trace.step

    def save(self, message: SaveBlocks) -> bool:
        self._perhaps_fail()
        refused = self._rng.random() < self._settings.refuse_share or not self._table.has_room(self._clock.now)
        if self.crashed or refused:
            dropped = self._table.drop_saved(message.job)
            if dropped is not None:
                self._fail(dropped, DropReason.UNPAIRED)
            return False
        grant = self._table.add_saved(message, self._clock.now)
        if grant is not None:
            self._pair(grant)
        return True

    def load(self, message: LoadBlocks) -> SimLoad | None:
        self._perhaps_fail()
        if self.crashed:
            return None
        self.loads.append(load := SimLoad(self, message, self._clock.now))
        if len(self.loads) + (self._loading is not None) > self._settings.max_loads:
            raise OracleError(f"more than {self._settings.max_loads} loads were handed over", [f"job {message.job}"])
        if self._rng.random() < self._settings.fail_share:
            load.fails_at = self._rng.randrange(2 * len(message.blocks))
        return load

    def withdrawn(self, job: Job, request: str) -> None:
        self._close_load(job, LoadOutcome.WITHDRAWN)

    def take(self) -> Sequence[LoadEnded]:
        self._perhaps_fail()
        taken, self._ended = self._ended, []
        return taken

    def wait(self, timeout_s: float) -> bool:
        if self._rng.random() < self._settings.wait_finds_share:
            for _ in range(20):
                self._progress()
        self._clock.advance(timeout_s)
        self.waited_s += timeout_s
        return bool(self._ended)

    # ------------------------------------------------------------ as GpuCopy

    def issued(self, grant: SlotGrant) -> None:
        """L1 decided to fill these slots: nobody may be reading or writing them."""
        for slot in grant.slots:
            if slot in self._writers or self._readers[slot]:
                used_by = f"save {self._writers[slot]} writes" if slot in self._writers else "a load reads"
                raise OracleError(f"slot {slot} was granted to save {grant.job} while {used_by} it", [f"slot {slot}", f"job {grant.job}"])
            self._writers[slot] = grant.job

    def announced(self, job: Job, slots: tuple[int, ...]) -> None:
        """A plan with this load has left the scheduler: its slots are read from here until its end is reported."""
        for slot in slots:
            if slot in self._writers:
                text = f"load {job} is to read slot {slot}, which save {self._writers[slot]} is filling"
                raise OracleError(text, [f"slot {slot}", f"job {job}"])
            self._readers[slot] += 1
        self._open[job] = slots

    def granted(self, grant: SlotGrant) -> None:
        if self.crashed:
            self._fail(grant, DropReason.OFF)
        elif self._table.was_dropped(grant.job):
            self._fail(grant, DropReason.UNPAIRED)
        elif self._table.add_granted(grant, self._clock.now) is not None:
            self._pair(grant)

    def expire(self) -> None:
        for grant in self._table.expire(self._clock.now):
            self._fail(grant, DropReason.UNPAIRED)

    def withdraw(self, load: SimLoad) -> bool:
        if load.state is not LoadState.QUEUED:
            return False
        load.state = LoadState.WITHDRAWN
        self.loads.remove(load)
        self._tell_load(load, LoadOutcome.WITHDRAWN)
        return True

    def crash(self) -> None:
        """GpuCopy is lost: what has not started is off, what has started is seen to its end."""
        self._trace.note("the copy threads crash")
        self.crashed = True
        for load in list(self.loads):
            self.withdraw(load)
        grants = [*self._table.clear(), *(save.grant for save in self._pairs)]
        self._pairs.clear()
        for grant in grants:
            self._fail(grant, DropReason.OFF)

    @property
    def is_loading(self) -> bool:
        """A load has started and has not ended."""
        return self._loading is not None

    @property
    def is_saving(self) -> bool:
        return self._saving is not None

    @property
    def is_idle(self) -> bool:
        return not (self.loads or self._loading or self._pairs or self._saving)

    def leaks(self) -> list[str]:
        """What is still open though everything has ended."""
        found = [f"slot {slot} is still being written by save {job}" for slot, job in self._writers.items()]
        found += [f"slot {slot} is still being read" for slot, readers in self._readers.items() if readers]
        if len(self._table):
            found.append(f"{len(self._table)} halves of saves wait for the other one")
        return found

    def late_loads(self, start_deadline_s: float) -> list[SimLoad]:
        """Those that did not start in time and yet were not withdrawn."""
        return [load for load in self.loads if self._clock.now >= load.queued_at + start_deadline_s]

    # ------------------------------------------------------------ copying

    def tick_load(self) -> bool:
        """Half a block of the load under way, or its begin or end; False when there is nothing to do."""
        if self.hold_loads or not (self._loading or self.loads):
            return False
        load = self._loading
        if load is None:
            load = self._loading = self.loads.popleft()
            load.state = LoadState.STARTED
            self._trace.note(f"load {load.message.job} starts", f"job {load.message.job}")
            return True
        if load.halves == self.hold_at:
            return False
        message = load.message
        failed = load.fails_at == load.halves
        if not failed and load.halves < 2 * len(message.slots):
            self._copy_half(load)
            load.halves += 1
            return True
        if failed:
            block = message.blocks[load.halves // 2]
            self._memory.engine[block][:HALF] = [self._memory.garbage()] * HALF
        load.state = LoadState.ENDED
        self._loading = None
        self._tell_load(load, LoadOutcome.FAILED if failed else LoadOutcome.LOADED)
        return True

    def _copy_half(self, load: SimLoad) -> None:
        index, second = divmod(load.halves, 2)
        message = load.message
        if not self._owns(message.request, message.blocks):
            text = f"load {message.job} of {message.request} writes engine blocks {shorten(message.blocks)}, which are not its own any more"
            raise OracleError(text, [f"job {message.job}", f"request {message.request}"])
        if self.sabotage.claim_loads:
            return
        source = len(message.slots) - 1 - index if self.sabotage.swap_blocks else index
        part = slice(HALF, BLOCK_SIZE) if second else slice(0, HALF)
        self._memory.engine[message.blocks[index]][part] = self._memory.slots[message.slots[source]][part]

    def tick_save(self) -> bool:
        """Half a block of the save under way, or its begin or end; False when there is nothing to do."""
        if self.hold_saves or not (self._saving or self._pairs):
            return False
        save = self._saving
        if save is None:
            save = self._saving = self._pairs.popleft()
            if self._rng.random() < self._settings.fail_share:
                save.fails_at = self._rng.randrange(2 * len(save.grant.slots))
            return True
        if save.halves == self.hold_at:
            return False
        grant = save.grant
        index, second = divmod(save.halves, 2)
        if save.halves == save.fails_at:
            self._memory.slots[grant.slots[index]][:HALF] = [self._memory.garbage()] * HALF
            save.flags += [False] * (len(grant.slots) - len(save.flags))
        if len(save.flags) == len(grant.slots):
            self._saving = None
            reason = DropReason.COPY_FAILED if save.fails_at is not None else DropReason.OVERWRITTEN
            self._tell_save(grant, save.flags, reason)
            return True
        part = slice(HALF, BLOCK_SIZE) if second else slice(0, HALF)
        self._memory.slots[grant.slots[index]][part] = self._memory.engine[grant.blocks[index]][part]
        save.halves += 1
        if second:
            unchanged = self._ledger.epochs([grant.blocks[index]])[0] == grant.epochs[index]
            save.flags.append(unchanged or self.sabotage.ignore_ledger)
        return True

    # ------------------------------------------------------------ telling

    def _pair(self, grant: SlotGrant) -> None:
        if grant.slots:
            self._pairs.append(SimSave(grant))

    def _fail(self, grant: SlotGrant, reason: DropReason) -> None:
        if grant.slots:
            self._tell_save(grant, [False] * len(grant.slots), reason)

    def _tell_save(self, grant: SlotGrant, flags: Sequence[bool], reason: DropReason) -> None:
        filled = tuple(slot for slot, flag in zip(grant.slots, flags, strict=True) if flag)
        failed = tuple(slot for slot, flag in zip(grant.slots, flags, strict=True) if not flag)
        for slot in grant.slots:
            del self._writers[slot]
        self.saved_blocks += len(filled)
        self._hub.report(BlocksFilled(grant.job, 0, filled, failed, reason if failed else None))

    def _tell_load(self, load: SimLoad, outcome: LoadOutcome) -> None:
        message = load.message
        self._ended.append(LoadEnded(message.job, message.request, outcome, message.blocks))
        self._close_load(message.job, outcome)

    def _close_load(self, job: Job, outcome: LoadOutcome) -> None:
        self.finished_loads[outcome] += 1
        slots = self._open.pop(job, None)
        if slots is None:
            raise OracleError(f"load {job} ended twice, or was never announced", [f"job {job}"])
        for slot in slots:
            self._readers[slot] -= 1
        self._hub.report(LoadFinished(job, 0, outcome))
