"""The copy threads, one per direction, and what they share with the threads that feed them.

Every load given to `CopyHands.load` ends in exactly one `LoadEnded`, every grant that is not empty in exactly one `BlocksFilled`,
whatever happens. A copy that has started is always seen to its end: nobody is told before.

Where the engine does not know that end (`EngineLost`) copying crashes, so that the connector goes off. The save is never reported,
and its slots stay out of use: the device may still write them. The load is reported FAILED all the same, as vLLM would keep its
request waiting for ever: what broke the copy has broken the context that vLLM would compute the blocks with, and the slots are only
read.

::

    load()  -> QUEUED --thread--> STARTED --> ENDED        (LOADED or FAILED)
                  `---withdraw()------------> WITHDRAWN     whoever takes the lock first decides
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kvoffload.copy.engine import CopyEngine
from kvoffload.copy.jobs import CopyFact, HandsConfig, HandsCrashed, HandsStatistics, LoadJob, LoadState
from kvoffload.copy.pairing import PairingTable
from kvoffload.errors import EngineLost
from kvoffload.messages import (
    BlocksFilled,
    DropReason,
    Job,
    LoadBlocks,
    LoadEnded,
    LoadOutcome,
    SaveBlocks,
    SlotGrant,
)
from kvoffload.observe.logs import get_logger
from kvoffload.observe.profiling import tagged

__all__ = ["CopyFact", "CopyHands", "HandsConfig", "HandsCrashed", "HandsStatistics", "LoadJob", "LoadState"]

_FactT = TypeVar("_FactT")


class CopyHands:
    """Runs loads and saves of one rank.

    ``on_load_ended`` is WorkerSide's inbox, ``report`` GpuCopy's mailbox. Both are called from any of the threads involved, without
    a lock held, and must be quick. ``clock`` (seconds) is for `LoadJob.queued_at` and the pairing table.
    """

    def __init__(
        self,
        engine: CopyEngine,
        on_load_ended: Callable[[LoadEnded], None],
        report: Callable[[CopyFact], None],
        config: HandsConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._on_load_ended = on_load_ended
        self._report = report
        self._config = config
        self._clock = clock
        self._log = get_logger("copy")
        lock = threading.Lock()
        self._lock = lock
        self._load_ready, self._save_ready, self._told = (
            threading.Condition(lock),
            threading.Condition(lock),
            threading.Condition(lock),
        )
        self._queued: OrderedDict[LoadJob, None] = OrderedDict()
        self._live_loads: dict[LoadJob, None] = {}  # taken, and not yet told to both sides
        self._loading = False
        self._table = PairingTable(config.pair_timeout_s, config.max_saves)
        self._pairs: deque[tuple[SlotGrant, object]] = deque()
        self._saves_untold = 0
        self._saves_lost = 0  # of these: not to be told, ever
        self._takes_loads = self._takes_saves = True
        self._closing = False
        self._given_up = False
        self._threads = [
            threading.Thread(target=self._run, args=(self._load_loop,), name="kvoffload-load", daemon=True),
            threading.Thread(target=self._run, args=(self._save_loop,), name="kvoffload-save", daemon=True),
        ]
        self.crashed: BaseException | None = None
        self.statistics = HandsStatistics()

    def start(self) -> None:
        """Start the threads; once. What was given before waits for it."""
        for thread in self._threads:
            thread.start()

    # ------------------------------------------------------------ loads

    def load(self, message: LoadBlocks) -> LoadJob:
        """Queue a load, from any thread. Never raises; one that cannot be taken (closed, crashed, full) is withdrawn at once."""
        with self._lock:
            is_taken = self._takes_loads and len(self._queued) + self._loading < self._config.max_loads
            job = LoadJob(message, self._clock(), LoadState.QUEUED if is_taken else LoadState.WITHDRAWN, self._withdraw)
            self._live_loads[job] = None
            if is_taken:
                self._queued[job] = None
                self._load_ready.notify()
        if not is_taken:
            self._tell_load(job, LoadOutcome.WITHDRAWN)
        return job

    def withdraw_all_unstarted(self) -> list[LoadJob]:
        """Withdraw every load that has not started, and take no more: later ones are withdrawn as they come."""
        with self._lock:
            self._takes_loads = False
            jobs = list(self._queued)
        return [job for job in jobs if job.withdraw()]

    def live_loads(self) -> list[Job]:
        """Loads whose end has not been reported yet."""
        with self._lock:
            return [job.job for job in self._live_loads]

    def _withdraw(self, job: LoadJob) -> bool:
        with self._lock:
            if job.state is not LoadState.QUEUED:
                return False
            job.state = LoadState.WITHDRAWN
            del self._queued[job]
            self._save_ready.notify()
        self._tell_load(job, LoadOutcome.WITHDRAWN)
        return True

    def _load_loop(self) -> None:
        while True:
            with self._lock:
                while not self._queued:
                    if self._closing:
                        return
                    self._load_ready.wait()
                job, _ = self._queued.popitem(last=False)
                job.state = LoadState.STARTED
                self._loading = True
            with tagged("copy_load"):
                self._load_one(job)

    def _load_one(self, job: LoadJob) -> None:
        outcome, message = LoadOutcome.FAILED, job.message
        try:
            # All of it in one call: between two, this thread may wait 5 ms for the interpreter lock.
            self._engine.load(_ids(message.slots), _ids(message.blocks), message.after)
            outcome = LoadOutcome.LOADED
        except EngineLost:
            raise
        except Exception:
            self._log.exception("a load failed: vLLM computes its blocks", job=job.job, request=job.request, blocks=len(message.blocks))
        finally:  # also for a crash, which goes on upwards
            with self._lock:
                job.state = LoadState.ENDED
                self._loading = False
                self._save_ready.notify()
            self._tell_load(job, outcome)

    def _tell_load(self, job: LoadJob, outcome: LoadOutcome) -> None:
        ended = LoadEnded(job.job, job.request, outcome, job.message.blocks)
        self._call(self._on_load_ended, ended)
        self._call(self._report, ended)
        with self._lock:
            self.statistics.loads[outcome] += 1
            self._live_loads.pop(job, None)
            self._told.notify_all()

    # ------------------------------------------------------------ saves

    def saved(self, message: SaveBlocks) -> bool:
        """vLLM's half, from its thread. False: refused, for want of room or because saving has stopped; its grant fails."""
        now = self._clock()
        with self._lock:
            is_taken = self._takes_saves and self._table.has_room(now) and len(self._pairs) < self._config.max_saves
            if is_taken:
                grant = self._table.add_saved(message, now)
                if grant is not None:
                    self._pair(grant, message.after)
                return True
            self.statistics.refused += 1
            dropped = self._table.drop_saved(message.job) if self._takes_saves else None
            if dropped is not None:
                self._saves_untold += 1
        if dropped is not None:
            self._tell_failed(dropped, DropReason.UNPAIRED)
        return False

    def granted(self, grant: SlotGrant) -> None:
        """L1's half, from GpuCopy. An empty one is only paired, and forgotten without a report."""
        now = self._clock()
        with self._lock:
            reason = None
            if not self._takes_saves:
                reason = DropReason.OFF
            elif self._table.was_dropped(grant.job):
                reason = DropReason.UNPAIRED
            elif (message := self._table.add_granted(grant, now)) is not None:
                self._pair(grant, message.after)
            if reason is not None:
                self._saves_untold += 1
        if reason is not None:
            self._tell_failed(grant, reason)

    def expire(self, now: float) -> list[SlotGrant]:
        """Grants dropped because their other half did not come. They have been reported: nothing was written."""
        with self._lock:
            late = self._table.expire(now)
            self._saves_untold += len(late)
        for grant in late:
            self._tell_failed(grant, DropReason.UNPAIRED)
        return late

    def next_expiry(self) -> float | None:
        """When to call `expire` next, on the clock given; None when nothing waits."""
        with self._lock:
            return self._table.next_expiry()

    def stop_saving(self) -> None:
        """Take no more saves. What has not started is reported failed; a save under way ends after the chunk it is at."""
        with self._lock:
            self._takes_saves = False
            grants = [*self._table.clear(), *(grant for grant, _ in self._pairs)]
            self._saves_untold += len(grants) - len(self._pairs)  # pairs were counted when they met
            self._pairs.clear()
            self._save_ready.notify()
        for grant in grants:
            self._tell_failed(grant, DropReason.OFF)

    def _pair(self, grant: SlotGrant, after: object) -> None:
        if grant.slots:
            self._saves_untold += 1
            self._pairs.append((grant, after))
            self._save_ready.notify()

    def _save_loop(self) -> None:
        while True:
            with self._lock:
                while not self._pairs:
                    if self._closing:
                        return
                    self._save_ready.wait()
                grant, after = self._pairs.popleft()
            with tagged("copy_save"):
                self._save_one(grant, after)

    def _save_one(self, grant: SlotGrant, after: object) -> None:
        flags: NDArray[np.bool_] = np.zeros(len(grant.slots), dtype=np.bool_)
        reason, has_ended = DropReason.COPY_FAILED, True
        try:
            blocks, slots, epochs = _ids(grant.blocks), _ids(grant.slots), _ids(grant.epochs)
            step = max(1, self._config.chunk_bytes // max(1, self._engine.block_bytes))
            reason = DropReason.OVERWRITTEN
            for start in range(0, len(slots), step):
                if not self._may_copy_chunk():
                    reason = DropReason.OFF
                    break
                part = slice(start, start + step)
                flags[part] = self._engine.save(blocks[part], slots[part], epochs[part], after)
        except EngineLost:
            has_ended = False
            raise
        except Exception:
            reason = DropReason.COPY_FAILED
            self._log.exception("a save failed: its blocks are not cached", job=grant.job, blocks=len(grant.blocks))
        except BaseException:
            reason = DropReason.COPY_FAILED
            raise
        finally:
            if has_ended:
                self._tell_save(grant, flags, reason)
            else:
                self._lose_save()

    def _lose_save(self) -> None:
        with self._lock:
            self._saves_lost += 1
            self._told.notify_all()

    def _may_copy_chunk(self) -> bool:
        """Give way to loads, for a bounded time; then whether saving still goes on."""
        with self._lock:
            self._save_ready.wait_for(
                lambda: not self._takes_saves or not (self._loading or self._queued),
                timeout=self._config.load_first_s,
            )
            return self._takes_saves

    def _tell_save(self, grant: SlotGrant, flags: NDArray[np.bool_], reason: DropReason) -> None:
        if flags.all():
            fact = BlocksFilled(grant.job, self._config.rank, filled=grant.slots, failed=())
        else:
            slots = np.array(grant.slots, dtype=np.int64)
            filled, failed = tuple(slots[flags].tolist()), tuple(slots[~flags].tolist())
            fact = BlocksFilled(grant.job, self._config.rank, filled, failed, reason)
        self._tell(fact)

    def _tell_failed(self, grant: SlotGrant, reason: DropReason) -> None:
        self._tell(BlocksFilled(grant.job, self._config.rank, (), grant.slots, reason))

    def _tell(self, fact: BlocksFilled) -> None:
        if fact.filled or fact.failed:
            self._call(self._report, fact)
        with self._lock:
            self.statistics.saves += 1
            self.statistics.blocks_saved += len(fact.filled)
            if fact.reason is not None:
                failed = self.statistics.blocks_failed
                failed[fact.reason] = failed.get(fact.reason, 0) + len(fact.failed)
            self._saves_untold -= 1
            self._told.notify_all()

    # ------------------------------------------------------------ ends

    def wait_idle(self, timeout_s: float) -> bool:
        """Whether, within ``timeout_s``, everything taken so far was reported. Grants that wait for their half do not count.

        Nobody waits any longer for a copy that `close` has given up, or that lost the engine.
        """
        with self._lock:
            self._told.wait_for(lambda: self._is_idle(self._saves_lost) or self._given_up, timeout=timeout_s)
            return self._is_idle()

    def _is_idle(self, saves_untold: int = 0) -> bool:
        return not self._live_loads and self._saves_untold == saves_untold

    def close(self, timeout_s: float) -> bool:
        """Take nothing more, withdraw what has not started, and end the threads; whether they ended within ``timeout_s``.

        False: a copy is still running, or not known to have ended, and engine, segment and tensors must be kept. May be called twice.
        """
        self.stop_saving()
        self.withdraw_all_unstarted()
        with self._lock:
            self._closing = True
            self._load_ready.notify_all()
            self._save_ready.notify_all()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        ended = not any(thread.is_alive() for thread in self._threads) and not isinstance(self.crashed, EngineLost)
        with self._lock:
            self._given_up = not ended
            self._told.notify_all()
        return ended

    def _run(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except BaseException as error:  # a thread has nobody above it: GpuCopy raises this for the supervisor
            self._crash(error)

    def _crash(self, error: BaseException) -> None:
        with self._lock:
            if self.crashed is not None:
                return
            self.crashed = error
            self._takes_loads = self._takes_saves = False
        self.stop_saving()
        self.withdraw_all_unstarted()
        self._log.error("copying crashed: kvoffload stops", rank=self._config.rank, exc_info=error)
        self._call(self._report, HandsCrashed(error))

    def _call(self, port: Callable[[_FactT], None], fact: _FactT) -> None:
        """A port that raises is a bug on its side; the other side must still be told, and vLLM's thread may be the caller."""
        try:
            port(fact)
        except Exception as error:
            self._crash(error)


def _ids(values: tuple[int, ...]) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)
