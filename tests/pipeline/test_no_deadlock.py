"""L1Manager and the ranks send to each other through mailboxes of capacity one: nobody ever waits for the other to take something."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest
from tests.l1.rig import chain, run

from kvoffload.actors.l1_manager import L1Manager
from kvoffload.l1 import L1Config, L1Core, State
from kvoffload.mailbox import EndOfMailbox, OnFull, Receiver, Reply, Sender, open_mailbox
from kvoffload.messages import (
    BlocksFilled,
    Flush,
    ForgetRequest,
    LoadFinished,
    LoadOutcome,
    MatchPrefix,
    PrefixHit,
    ReserveSlots,
    SegmentGrown,
    SlotGrant,
    StartLoad,
    ToL1Manager,
    ToScheduler,
)

RANKS = 2
JOBS = 60


class StandInRank:
    """A rank that answers each grant, one at a time and after a turn of the loop, as GpuCopy does: by `owe`."""

    def __init__(self, rank: int, receiver: Receiver[SlotGrant], to_l1: Sender[ToL1Manager]) -> None:
        self._rank = rank
        self._receiver = receiver
        self._to_l1 = to_l1

    async def run(self) -> None:
        self._to_l1.owe(SegmentGrown(self._rank, 16))
        try:
            while True:
                for grant in await self._receiver.receive_burst(1):
                    await anyio.lowlevel.checkpoint()
                    if grant.slots:
                        self._to_l1.owe(BlocksFilled(grant.job, self._rank, grant.slots, ()))
        except EndOfMailbox:
            self._to_l1.close()


@pytest.mark.anyio
async def test_the_graph_does_not_deadlock_with_every_mailbox_at_capacity_one() -> None:
    core = L1Core(L1Config(ranks=RANKS), 16)
    requests: Sender[ToL1Manager]
    receiver: Receiver[ToL1Manager]
    requests, receiver = open_mailbox("l1_manager", 1, OnFull.WAIT)
    grants: list[Sender[SlotGrant]] = []
    ranks: list[StandInRank] = []
    for rank in range(RANKS):
        to_rank: Sender[SlotGrant]
        from_l1: Receiver[SlotGrant]
        to_rank, from_l1 = open_mailbox(f"rank {rank}", 1, OnFull.WAIT)
        grants.append(to_rank)
        ranks.append(StandInRank(rank, from_l1, requests.clone()))
    answers: list[ToScheduler] = []
    manager = L1Manager(core, receiver, lambda rank, grant: grants[rank].owe(grant), answers.append, anyio.current_time)

    async def offer_jobs() -> None:
        """SchedulerSide's part: many requests at once, more than any mailbox has room for."""
        for job in range(1, JOBS + 1):
            keys = chain(f"prompt {job % 7}", 4)
            await requests.send(ReserveSlots(job, (run(keys, request=f"r{job}"),)))
            await requests.send(MatchPrefix(f"r{job}", job, keys, 0.0))
            await requests.send(StartLoad(JOBS + job, f"r{job}", job, 0, 1))
            for rank in range(RANKS):
                await requests.send(LoadFinished(JOBS + job, rank, LoadOutcome.LOADED))
            await requests.send(ForgetRequest(f"r{job}"))

    flush: Reply[bool] = Reply()
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(manager.run)
            for rank_part in ranks:
                tasks.start_soon(rank_part.run)
            async with anyio.create_task_group() as offering:
                offering.start_soon(offer_jobs)
            await requests.send(Flush(flush))
            assert await flush.wait()
            requests.close()
            for to_rank in grants:
                to_rank.close()
    core.check()
    statistics = core.statistics()
    assert len([answer for answer in answers if isinstance(answer, PrefixHit)]) == JOBS
    assert statistics.committed > 4 * 7
    assert statistics.slots[State.FREE] + statistics.slots[State.READY] == 16
    assert not core.open_jobs()
