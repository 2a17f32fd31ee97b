"""What every `CopyEngine` promises: the host's, and CUDA's by each of its ways on the stand-in for libcuda."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.copy.rigs import Rig, ids, layers_of, strided

from kvoffload.copy.proof import prove
from kvoffload.cuda.settings import CopyMode, GpuCopySettings
from kvoffload.errors import CopyError, LayoutError
from kvoffload.layout import HEADER_BYTES
from kvoffload.ledger import Ledger
from kvoffload.testing.copy_faults import FaultyCopyEngine

OnCaches = Callable[[dict[str, NDArray[Any]], int], Rig]


@dataclass
class Kind:
    """Makes engines of one kind: on given tensors and so many slots, all of them usable."""

    name: str
    on: OnCaches

    def make(self, blocks: int = 8, slots: int = 8, layers: int = 3) -> Rig:
        random = np.random.default_rng(1)
        memory = {f"layers.{number}": np.zeros(blocks * 256 + 64, np.uint8) for number in range(layers)}
        caches = {name: at[-at.ctypes.data % 64 :][: blocks * 256].reshape(blocks, 2, 8, 16) for name, at in memory.items()}
        for cache in caches.values():
            cache[:] = random.integers(0, 256, cache.shape, dtype=np.uint8)
        return self.on(caches, slots)


CUDA = {
    "cuda": GpuCopySettings(),
    "cuda dma": GpuCopySettings(copy=CopyMode.DMA),
    "cuda kernel": GpuCopySettings(copy=CopyMode.KERNEL),
    "cuda single": GpuCopySettings(copy=CopyMode.SINGLE),
    "cuda unpinned": GpuCopySettings(pin=False),
    "cuda in small windows": GpuCopySettings(copy=CopyMode.DMA, descriptors_per_call=3, inflight_bytes=1024),
    "cuda kernel in small windows": GpuCopySettings(copy=CopyMode.KERNEL, descriptors_per_call=2, inflight_bytes=1 << 20),
}


@pytest.fixture(params=["host", *(pytest.param(name, marks=pytest.mark.cuda) for name in CUDA)])
def kind(request: pytest.FixtureRequest) -> Iterator[Kind]:
    if request.param == "host":
        yield Kind("host", lambda caches, slots: Rig.on(caches, next(iter(caches.values())).shape[0], slots))
        return
    from tests.cuda.rigs import CudaRig
    from tests.cuda.standin import load

    standin = load()
    standin.reset()
    yield Kind(request.param, lambda caches, slots: CudaRig.of(standin, caches, slots, CUDA[request.param]))
    standin.check()
    standin.reset()


@pytest.fixture
def rig(kind: Kind) -> Iterator[Rig]:
    made = kind.make()
    yield made
    made.close()


def save(rig: Rig, blocks: NDArray[np.int64], slots: NDArray[np.int64], epochs: NDArray[np.int64] | None = None) -> list[bool]:
    planned = np.zeros(len(blocks), np.int64) if epochs is None else epochs
    flags: list[bool] = rig.engine.save(blocks, slots, planned, rig.engine.mark()).tolist()
    return flags


def load(rig: Rig, slots: NDArray[np.int64], blocks: NDArray[np.int64]) -> None:
    rig.engine.load(slots, blocks, rig.engine.mark())


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.permutations("LBHNC"),
    sizes=st.tuples(st.integers(1, 3), st.integers(3, 5), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)),
    padding=st.lists(st.integers(0, 3), min_size=5, max_size=5),
    itemsize=st.sampled_from([1, 2, 4, 8]),
    data=st.data(),
)
def test_any_strided_layout(
    kind: Kind, order: list[str], sizes: tuple[int, ...], padding: list[int], itemsize: int, data: st.DataObject
) -> None:
    memory, view = strided("".join(order), dict(zip("LBHNC", sizes, strict=True)), padding, itemsize)
    source, target = data.draw(st.permutations(range(view.shape[1])))[:2]
    rig = kind.on(layers_of(view), 3)
    rig.segment.array[:] = 0x5A
    expected = memory.copy()

    assert save(rig, ids(source), ids(1)) == [True]
    assert np.array_equal(memory, expected)
    around = np.delete(rig.segment.array, np.s_[rig.segment.slot_bytes : 2 * rig.segment.slot_bytes])
    assert (around == 0x5A).all()
    assert not rig.segment.slot(1)[:HEADER_BYTES].any()
    assert (rig.segment.slot(1)[HEADER_BYTES + rig.layout.payload_bytes :] == 0x5A).all()

    load(rig, ids(1), ids(target))
    # The same as this assignment, and no other byte of the memory, padding and guards included.
    start = (view.ctypes.data - memory.ctypes.data) // itemsize
    expected_view = np.lib.stride_tricks.as_strided(expected[start:], view.shape, view.strides)
    expected_view[:, target] = expected_view[:, source].copy()
    assert np.array_equal(memory, expected)
    rig.close()


def test_a_batch_goes_where_it_says(rig: Rig) -> None:
    before = [rig.block(number) for number in range(8)]
    rig.segment.array[:] = 0x5A
    assert save(rig, ids(5, 1, 3), ids(0, 7, 2)) == [True, True, True]
    assert [rig.slot(slot) for slot in (0, 7, 2)] == [before[5], before[1], before[3]]
    assert [bool(rig.segment.slot(slot)[:HEADER_BYTES].any()) for slot in (0, 7, 2, 1)] == [False, False, False, True]
    load(rig, ids(7, 0, 2), ids(6, 2, 5))
    assert [rig.block(number) for number in (6, 2, 5)] == [before[1], before[5], before[3]]
    assert [rig.block(number) for number in (0, 1, 3, 4, 7)] == [before[number] for number in (0, 1, 3, 4, 7)]


def test_all_blocks_at_once_and_back(kind: Kind) -> None:
    rig = kind.make(blocks=64, slots=64, layers=5)
    before = [rig.block(number) for number in range(64)]
    order = np.random.default_rng(3).permutation(64).astype(np.int64)
    assert all(save(rig, order, np.arange(64, dtype=np.int64)))
    assert [rig.slot(slot) for slot in range(64)] == [before[block] for block in order]
    back = np.random.default_rng(4).permutation(64).astype(np.int64)
    load(rig, np.arange(64, dtype=np.int64), back)
    assert [rig.block(int(block)) for block in back] == [before[block] for block in order]
    rig.close()


def test_the_same_slot_may_be_read_twice(rig: Rig) -> None:
    save(rig, ids(4, 4), ids(0, 1))
    load(rig, ids(0, 0), ids(2, 3))
    assert rig.block(2) == rig.block(3) == rig.block(4)


def test_nothing_to_copy(rig: Rig) -> None:
    assert save(rig, ids(), ids()) == []
    load(rig, ids(), ids())


def test_flags_follow_the_ledger(rig: Rig) -> None:
    rig.ledger.bump([1, 2])
    rig.ledger.bump([2])
    assert save(rig, ids(1, 2, 3, 4), ids(0, 1, 2, 3), ids(1, 1, 0, 7)) == [True, False, True, False]


def test_another_ledger_takes_over(rig: Rig) -> None:
    scheduler_s = Ledger(8)
    scheduler_s.bump([3])
    rig.engine.use_ledger(scheduler_s)
    assert save(rig, ids(3, 4), ids(0, 1), ids(1, 0)) == [True, True]
    scheduler_s.close()  # the engine holds its memory
    assert save(rig, ids(3, 4), ids(0, 1), ids(0, 0)) == [False, True]
    with pytest.raises(LayoutError, match="9 blocks"):
        rig.engine.use_ledger(Ledger(9))


@pytest.mark.parametrize(
    ("blocks", "slots", "reason"),
    [
        ((0, 8), (0, 1), "names block 8, there are 8"),
        ((-1, 2), (0, 1), "names block -1"),
        ((0, 1), (0, 8), "names slot 8, there are 8"),
        ((0, 1), (-9, 1), "names slot -9"),
        ((0, 1), (3, 3), "names a destination twice"),
        ((0, 1), (3,), "a save of 2 blocks into 1 slots"),
    ],
)
def test_a_wrong_save_touches_nothing(rig: Rig, blocks: tuple[int, ...], slots: tuple[int, ...], reason: str) -> None:
    rig.segment.array[:] = 1
    for _ in range(2):  # a refused call leaves nothing behind that refuses a later one, or lets it pass
        with pytest.raises(CopyError, match=reason):
            save(rig, ids(*blocks), ids(*slots))
    assert (rig.segment.array == 1).all()
    assert save(rig, ids(0, 1), ids(3, 1)) == [True, True]


@pytest.mark.parametrize(
    ("slots", "blocks", "reason"),
    [
        ((0, 1), (2, 8), "names block 8"),
        ((0, 8), (2, 3), "names slot 8"),
        ((0, 1), (5, 5), "names a destination twice"),
        ((0, 1), (5,), "a load of 2 slots into 1 blocks"),
    ],
)
def test_a_wrong_load_touches_nothing(rig: Rig, slots: tuple[int, ...], blocks: tuple[int, ...], reason: str) -> None:
    before = [rig.block(number) for number in range(8)]
    for _ in range(2):
        with pytest.raises(CopyError, match=reason):
            load(rig, ids(*slots), ids(*blocks))
    assert [rig.block(number) for number in range(8)] == before
    load(rig, ids(0, 1), ids(5, 2))


def test_what_are_not_ids(rig: Rig) -> None:
    mark = rig.engine.mark()
    with pytest.raises(CopyError, match="one-dimensional"):
        rig.engine.load(np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int64), mark)
    with pytest.raises(CopyError, match="not ids"):
        rig.engine.load([2**70], [1], mark)  # type: ignore[arg-type]


def test_a_closed_engine_copies_no_more(rig: Rig) -> None:
    mark = rig.engine.mark()
    rig.engine.load(ids(1), ids(1), mark)
    rig.engine.close()
    for after in (mark, rig.engine.mark()):
        with pytest.raises(CopyError, match="closed"):
            rig.engine.save(ids(1), ids(1), ids(0), after)
        with pytest.raises(CopyError, match="closed"):
            rig.engine.load(ids(1), ids(1), after)
    rig.engine.close()


def test_the_start_up_proof_passes(rig: Rig) -> None:
    before = [rig.block(number) for number in range(8)]
    prove(rig.layout, rig.engine, rig.caches, rig.segment, rig.ledger)
    assert [rig.block(number) for number in range(8)] == before


def test_usable_slots_pass_through_the_faulty_engine(rig: Rig) -> None:
    assert FaultyCopyEngine(rig.engine).prepare_slots(8, at_start=True) == 8
