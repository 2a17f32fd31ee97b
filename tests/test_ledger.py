from __future__ import annotations

import os
import timeit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvoffload.errors import MisuseError, PeerError
from kvoffload.ledger import Ledger


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(100)


def test_each_bump_raises_the_epoch(ledger: Ledger) -> None:
    before = ledger.epochs([0, 3, 99])
    ledger.bump([3, 99])
    ledger.bump([3])
    assert before == (0, 0, 0)
    assert ledger.epochs([0, 3, 99]) == (0, 2, 1)
    assert ledger.array[3] == 2


@given(ids=st.lists(st.integers(-3, 102) | st.sampled_from([-(2**70), 2**63, 2**70]), max_size=120))
def test_the_vectorised_bump_equals_the_loop(ids: list[int]) -> None:
    ledger = Ledger(100)
    ledger.bump(ids)
    known = {block for block in ids if 0 <= block < 100}
    assert all(ledger.epochs([block])[0] >= 1 for block in known)
    assert all(ledger.epochs([block])[0] == 0 for block in range(100) if block not in known)
    assert ledger.ignored == sum(not 0 <= block < 100 for block in ids)
    ledger.close()


def test_a_bump_of_many_blocks() -> None:
    ledger = Ledger(1000)
    ledger.bump([3, 3, -1, 1000, *range(500, 1000)])
    assert ledger.epochs(range(500, 1000)) == (1,) * 500
    assert ledger.epochs([3])[0] >= 1
    assert ledger.array[:500].sum() == ledger.epochs([3])[0]
    assert ledger.ignored == 2
    ledger.close()


def test_epochs_of_unknown_blocks_are_refused(ledger: Ledger) -> None:
    for block in (-1, 100):
        with pytest.raises(MisuseError, match="not one of"):
            ledger.epochs([0, block])


def test_an_attached_ledger_sees_bumps_and_cannot_write(ledger: Ledger) -> None:
    reader = Ledger.attach(os.dup(ledger.fd), 100)
    ledger.bump([7])
    assert reader.epochs([7]) == (1,)
    with pytest.raises(MisuseError, match="only the process"):
        reader.bump([7])
    with pytest.raises(ValueError, match="read-only"):
        reader.array[7] = 5
    reader.close()


def test_attach_refuses_what_could_kill_the_process(ledger: Ledger) -> None:
    with pytest.raises(PeerError, match="800 bytes, 808 were announced"):
        Ledger.attach(ledger.fd, 101)
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 800)
    with pytest.raises(PeerError, match="not sealed"):
        Ledger.attach(unsealed, 100)
    reading, writing = os.pipe()
    with pytest.raises(PeerError, match="not a memfd"):
        Ledger.attach(reading, 100)
    for fd in (unsealed, reading, writing):
        os.close(fd)


def test_nobody_can_shrink_it(ledger: Ledger) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(ledger.fd, 8)
    assert not os.get_inheritable(ledger.fd)


def test_an_array_outlives_close(ledger: Ledger) -> None:
    ledger.bump([5])
    array = ledger.array
    ledger.close()
    ledger.close()
    assert array[5] == 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(ledger.fd)


def test_bumping_after_close_does_not_raise(ledger: Ledger) -> None:
    ledger.close()
    ledger.bump([1])
    ledger.bump(range(90))
    assert ledger.ignored == 91


def test_a_ledger_needs_blocks() -> None:
    with pytest.raises(MisuseError):
        Ledger(0)


def test_a_bump_of_a_few_blocks_is_cheap(ledger: Ledger) -> None:
    ids = [4, 8, 15, 16]
    best_s = min(timeit.repeat(lambda: ledger.bump(ids), number=1000, repeat=20)) / 1000
    assert best_s <= 5e-6  # 1.5 us on a quiet machine; the bound is for a busy one


def test_all_may_have_a_new_owner() -> None:
    ledger = Ledger(5)
    ledger.bump([1, 3])
    before = ledger.epochs(range(5))
    ledger.bump_all()
    assert ledger.epochs(range(5)) == tuple(epoch + 1 for epoch in before)
    reader = Ledger.attach(os.dup(ledger.fd), 5)
    with pytest.raises(MisuseError, match="made the ledger"):
        reader.bump_all()
    reader.close()
    ledger.close()
