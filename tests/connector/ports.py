"""The facade's ports, pure: a hub that answers when told to, in virtual time, and what vLLM would hand to the hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from kvoffload.connector.record import RequestRecord
from kvoffload.keys import KEY_BYTES, KeyChain
from kvoffload.messages import Job, LoadBlocks, LoadEnded, LoadOutcome, PrefixHit, SaveBlocks, ToL1Manager, ToScheduler

BLOCK_SIZE = 4
NAMESPACE = b"test".ljust(KEY_BYTES, b".")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeHub:
    """Keeps what is posted. ``on_wait``, called with the seconds asked for, may put answers; each wait costs its whole time."""

    def __init__(self, clock: Clock) -> None:
        self.is_live = True
        self.refuses = False
        self.posted: list[ToL1Manager] = []
        self.inbox: list[ToScheduler] = []
        self.waits: list[float] = []
        self.on_wait: Callable[[float], None] = lambda timeout_s: None
        self._clock = clock

    def offer(self, message: ToL1Manager) -> bool:
        if self.refuses:
            return False
        self.posted.append(message)
        return True

    def owe(self, message: ToL1Manager) -> None:
        self.posted.append(message)

    def take(self) -> Sequence[ToScheduler]:
        taken, self.inbox = self.inbox, []
        return taken

    def wait(self, timeout_s: float) -> bool:
        self.waits.append(timeout_s)
        self._clock.now += timeout_s
        self.on_wait(timeout_s)
        return bool(self.inbox)

    def of(self, kind: type) -> list[Any]:
        """What was posted of this kind."""
        return [message for message in self.posted if isinstance(message, kind)]


class FakeLedger:
    def __init__(self) -> None:
        self.bumped: list[int] = []

    def bump(self, ids: Sequence[int]) -> None:
        self.bumped += ids

    def epochs(self, ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(100 + block for block in ids)


class FakeLoad:
    def __init__(self, message: LoadBlocks) -> None:
        self.message = message
        self.is_started = False
        self.withdrawals = 0

    def withdraw(self) -> bool:
        self.withdrawals += 1
        return not self.is_started


class FakeCopies:
    """Keeps what it is given; a test ends loads with `end`."""

    def __init__(self, clock: Clock) -> None:
        self.loads: dict[Job, FakeLoad] = {}
        self.saves: list[SaveBlocks] = []
        self.off: list[tuple[Job, str]] = []
        self.waits: list[float] = []
        self.is_gone = False
        self.refuses_saves = False
        self.on_wait: Callable[[], None] = lambda: None
        self._ended: list[LoadEnded] = []
        self._clock = clock

    def mark(self) -> object:
        return "mark"

    def save(self, message: SaveBlocks) -> bool:
        self.saves.append(message)
        return not self.refuses_saves

    def load(self, message: LoadBlocks) -> FakeLoad | None:
        if self.is_gone:
            return None
        load = self.loads[message.job] = FakeLoad(message)
        return load

    def withdrawn(self, job: Job, request: str) -> None:
        self.off.append((job, request))

    def take(self) -> Sequence[LoadEnded]:
        taken, self._ended = self._ended, []
        return taken

    def wait(self, timeout_s: float) -> bool:
        self.waits.append(timeout_s)
        self._clock.now += timeout_s
        self.on_wait()
        return bool(self._ended)

    def end(self, job: Job, outcome: LoadOutcome = LoadOutcome.LOADED) -> None:
        message = self.loads[job].message
        self._ended.append(LoadEnded(job, message.request, outcome, message.blocks))


def make_request(name: str, tokens: int, *, skip_reading: bool = False, params: object = None) -> Any:
    """As much of a vLLM `Request` as the facade reads."""
    ids = list(range(tokens))
    request = SimpleNamespace(
        request_id=name,
        _all_token_ids=ids,
        num_prompt_tokens=tokens,
        num_tokens=tokens,
        num_computed_tokens=0,
        num_preemptions=0,
        skip_reading_prefix_cache=skip_reading,
        kv_transfer_params=params,
    )
    return request


def generate(request: Any, tokens: int) -> None:
    """``tokens`` more of them, as sampled."""
    request._all_token_ids.extend(range(1000, 1000 + tokens))
    request.num_tokens = len(request._all_token_ids)


def make_record(name: str, tokens: int, *, may_save: bool = True, may_load: bool = True) -> RequestRecord:
    return RequestRecord(make_request(name, tokens), KeyChain(NAMESPACE, BLOCK_SIZE), b"", may_save=may_save, may_load=may_load)


def hit_for(
    record: RequestRecord, slots: int, *, generation: int = 0, expires: float = 1e9, sequence: int | None = None, **changes: Any
) -> PrefixHit:
    """An answer to the record's last question."""
    from kvoffload.messages import HitReason

    reason = changes.get("reason", HitReason.HIT if slots else HitReason.MISS)
    number = record.sequence if sequence is None else sequence
    return PrefixHit(record.request_id, number, tuple(range(50, 50 + slots)), 0, generation, expires, reason)


class _Blocks:
    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = list(ids)

    def get_block_ids(self) -> tuple[list[int]]:
        return (self._ids,)


def blocks_of(*ids: int) -> Any:
    """As much of `KVCacheBlocks` as the facade reads."""
    return _Blocks(ids)


def make_output(
    scheduled: dict[str, int] | None = None,
    tables: dict[str, list[int]] | None = None,
    *,
    running: dict[str, list[int] | None] | None = None,
    resumed: Sequence[str] = (),
    preempted: Sequence[str] = (),
    copies: Sequence[tuple[int, int]] = (),
) -> Any:
    """As much of a `SchedulerOutput` as the facade reads: tokens by request, block tables, and new blocks of those that go on."""
    scheduled, tables, running = scheduled or {}, tables or {}, running or {}

    def get_block_ids(name: str) -> tuple[list[int], ...] | None:
        return (tables[name],) if name in tables else None

    return SimpleNamespace(
        num_scheduled_tokens=scheduled,
        total_num_scheduled_tokens=sum(scheduled.values()),
        preempted_req_ids=set(preempted),
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(running),
            new_block_ids=[None if blocks is None else (blocks,) for blocks in running.values()],
            resumed_req_ids=set(resumed),
        ),
        kv_cache_block_copies=[SimpleNamespace(src_block_id=src, dst_block_id=dst) for src, dst in copies] or None,
        kv_connector_block_state=SimpleNamespace(get_block_ids=get_block_ids),
    )
