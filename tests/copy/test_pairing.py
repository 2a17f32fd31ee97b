from __future__ import annotations

import pytest

from kvoffload.copy import pairing
from kvoffload.copy.pairing import PairingTable
from kvoffload.messages import SaveBlocks, SlotGrant


def grant(job: int) -> SlotGrant:
    return SlotGrant(job, (job,), (1,), (0,))


def saved(job: int) -> SaveBlocks:
    return SaveBlocks(job, f"after {job}")


@pytest.fixture
def table() -> PairingTable:
    return PairingTable(timeout_s=5.0, max_saves=3)


def test_either_half_may_come_first(table: PairingTable) -> None:
    assert table.add_granted(grant(1), 0.0) is None
    assert table.add_saved(saved(1), 1.0) == grant(1)
    assert table.add_saved(saved(2), 2.0) is None
    assert table.add_granted(grant(2), 3.0) == saved(2)
    assert len(table) == 0
    assert table.next_expiry() is None


def test_a_grant_alone_expires_and_its_late_half_is_ignored(table: PairingTable) -> None:
    table.add_granted(grant(1), 0.0)
    table.add_granted(grant(2), 1.0)
    assert table.next_expiry() == 5.0
    assert table.expire(4.99) == []
    assert table.expire(5.0) == [grant(1)]
    assert table.next_expiry() == 6.0
    assert table.add_saved(saved(1), 5.5) is None
    assert len(table) == 1  # job 2 alone: the late half was not kept
    assert table.expire(100.0) == [grant(2)]


def test_a_saved_half_alone_expires_and_its_late_grant_is_known_as_dropped(table: PairingTable) -> None:
    table.add_saved(saved(1), 0.0)
    assert table.expire(5.0) == []
    assert len(table) == 0
    assert table.was_dropped(1)
    assert not table.was_dropped(1)
    assert not table.was_dropped(2)


def test_room_for_saved_halves_is_bounded_and_comes_back_with_time(table: PairingTable) -> None:
    for job in (1, 2, 3):
        assert table.has_room(float(job))
        table.add_saved(saved(job), float(job))
    assert not table.has_room(4.0)
    assert table.has_room(6.0)  # job 1 waited too long
    assert table.was_dropped(1)


def test_a_refused_half_gives_its_grant_back_or_is_remembered(table: PairingTable) -> None:
    table.add_granted(grant(1), 0.0)
    assert table.drop_saved(1) == grant(1)
    assert table.drop_saved(2) is None
    assert table.was_dropped(2)
    assert len(table) == 0


def test_memory_of_dropped_jobs_is_bounded(table: PairingTable) -> None:
    for job in range(3000):
        table.drop_saved(job)
    known = [job for job in range(3000) if table.was_dropped(job)]
    assert known == list(range(3000 - pairing._REMEMBERED, 3000))


def test_clear_gives_the_grants(table: PairingTable) -> None:
    table.add_granted(grant(1), 0.0)
    table.add_saved(saved(2), 0.0)
    assert table.clear() == [grant(1)]
    assert len(table) == 0
