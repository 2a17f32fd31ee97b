from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.copy.rigs import Rig, layers_of, strided

from kvoffload.copy.host import HostCopyEngine
from kvoffload.copy.proof import prove
from kvoffload.errors import LayoutError
from kvoffload.layout import BlockLayout, Run
from kvoffload.ledger import Ledger
from kvoffload.segment import Segment
from kvoffload.testing.copy_faults import FaultyCopyEngine


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig.make(blocks=8)
    yield made
    made.close()


def run_proof(rig: Rig, engine: object = None) -> None:
    prove(rig.layout, engine or rig.engine, rig.caches, rig.segment, rig.ledger)  # type: ignore[arg-type]


@pytest.mark.parametrize("blocks", [4, 5, 8, 33])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_good_layout_passes_and_nothing_is_left_behind(blocks: int, slots: int) -> None:
    rig = Rig.make(blocks, slots)
    rig.ledger.bump([0, 1, 3])
    before = [rig.block(number) for number in range(blocks)]
    run_proof(rig)
    assert [rig.block(number) for number in range(blocks)] == before
    assert not rig.segment.array.any()
    rig.close()


@pytest.mark.parametrize("order", ["LBHNC", "BLHNC", "LHBNC", "BHLNC", "NCHLB"])
def test_every_layout_passes(order: str) -> None:
    memory, view = strided(order, {"L": 2, "B": 6, "H": 2, "N": 3, "C": 4}, (1, 0, 2, 0, 3), 2)
    before = memory.copy()
    rig = Rig.on(layers_of(view), 6, 4)
    run_proof(rig)
    assert np.array_equal(memory, before)
    rig.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.uint8])
def test_torch_tensors_of_any_type(dtype: torch.dtype) -> None:
    storage = torch.randint(0, 256, (2, 6, 4, 16), dtype=torch.uint8).view(dtype)
    before = storage.clone()
    tensors = {"a": storage[0], "b": storage[1].transpose(1, 2), "shared": storage[0]}
    layout = BlockLayout.from_tensors(tensors, 6)
    segment, ledger = Segment.create(1 << 16, layout.slot_bytes), Ledger(6)
    prove(layout, HostCopyEngine(layout, segment, ledger), tensors, segment, ledger)
    assert torch.equal(storage.view(torch.uint8), before.view(torch.uint8))


def wrong_runs(rig: Rig) -> dict[str, tuple[Run, ...]]:
    """Plans that a mistake could give; all stay inside the tensors."""
    first, second, third = rig.layout.runs
    return {
        "a layer missing": (first, second),
        "a layer twice": (first, second, second),
        "too short": (first, second, replace(third, size=third.size - 1)),
        "one byte off": (first, second, replace(third, address=third.address - 1)),
        "half the stride": (first, second, replace(third, block_stride=third.block_stride // 2)),
        "one block off": (first, second, replace(third, address=third.address - third.block_stride)),
        "no stride": (first, second, replace(third, block_stride=0)),
    }


@pytest.mark.parametrize("mistake", list(wrong_runs(Rig.make())))
@pytest.mark.parametrize("slots", [1, 4])
def test_a_wrong_plan_is_found(mistake: str, slots: int) -> None:
    rig = Rig.make(blocks=8, slots=slots)
    runs = wrong_runs(rig)[mistake]
    layout = replace(rig.layout, runs=runs)
    before = [rig.block(number) for number in range(8)]
    with pytest.raises(LayoutError, match="proof failed"):
        prove(layout, HostCopyEngine(layout, rig.segment, rig.ledger), rig.caches, rig.segment, rig.ledger)
    assert [rig.block(number) for number in range(8)] == before
    assert not rig.segment.array.any()
    rig.close()


@pytest.mark.parametrize("fault", ["corrupt save", "corrupt load", "swap save", "swap load", "lie", "fail", "ignores the ledger"])
def test_a_bad_engine_is_found(rig: Rig, fault: str) -> None:
    engine = FaultyCopyEngine(rig.engine)
    if fault.endswith("save"):  # the first save only shows that the ledger is looked at; the second one is the round trip's
        engine.pass_next("save")
    match fault.split():
        case ["corrupt", kind]:
            engine.corrupt_next(kind)
        case ["swap", kind]:
            engine.swap_next(kind)
        case ["lie"]:
            engine.lie_next_load()
        case ["fail"]:
            engine.fail_next(1, "load")
        case _:
            engine.ignore_ledger()
    before = [rig.block(number) for number in range(8)]
    with pytest.raises(LayoutError, match="proof failed"):
        run_proof(rig, engine)
    assert [rig.block(number) for number in range(8)] == before


def test_a_faultless_wrapper_passes(rig: Rig) -> None:
    engine = FaultyCopyEngine(rig.engine)
    run_proof(rig, engine)
    assert [call.kind for call in engine.calls] == ["save", "save", "load"]
    assert all(0 not in call.blocks for call in engine.calls)


def test_an_engine_that_does_not_clear_headers_is_found(rig: Rig) -> None:
    class Sloppy(FaultyCopyEngine):
        def save(self, *arguments: object) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
            flags = super().save(*arguments)  # type: ignore[arg-type]
            rig.segment.slot(0)[10] = 1
            return flags

    with pytest.raises(LayoutError, match="header"):
        run_proof(rig, Sloppy(rig.engine))


def test_an_engine_that_writes_behind_a_blocks_bytes_is_found(rig: Rig) -> None:
    class Long(FaultyCopyEngine):
        def save(self, *arguments: object) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
            flags = super().save(*arguments)  # type: ignore[arg-type]
            rig.segment.slot(0)[64 + rig.layout.payload_bytes] = 0
            return flags

    with pytest.raises(LayoutError, match="behind a block's bytes"):
        run_proof(rig, Long(rig.engine))


def test_a_plan_of_another_length_is_not_run(rig: Rig) -> None:
    """It might leave the slot: at the end of the segment that is memory of somebody else."""
    first, *others = rig.layout.runs
    for runs in ((first, *others, first), tuple(others)):
        engine = FaultyCopyEngine(rig.engine)
        with pytest.raises(LayoutError, match=r"768 bytes, and (1024|512) are copied"):
            prove(replace(rig.layout, runs=runs), engine, rig.caches, rig.segment, rig.ledger)
        assert engine.calls == []


def test_an_engine_that_writes_beyond_the_slot_is_found(rig: Rig) -> None:
    class Wide(FaultyCopyEngine):
        def load(self, *arguments: object) -> None:
            super().load(*arguments)  # type: ignore[arg-type]
            rig.segment.slot(2)[100] ^= 1

    with pytest.raises(LayoutError, match="beyond its slot"):
        run_proof(rig, Wide(rig.engine))


def test_three_blocks_are_too_few() -> None:
    rig = Rig.make(blocks=3)
    with pytest.raises(LayoutError, match="4 are needed"):
        run_proof(rig)
