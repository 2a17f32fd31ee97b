"""`kvoffload.copy.proof` on plans that a wrong idea of a layout would give: each is refused, and nothing of it is left behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.copy.rigs import layers_of, strided

from kvoffload.copy.host import HostCopyEngine
from kvoffload.copy.proof import prove
from kvoffload.errors import LayoutError
from kvoffload.layout import BlockLayout, Run
from kvoffload.ledger import Ledger
from kvoffload.segment import Segment

BLOCKS = 8
SIZES = {"L": 3, "B": BLOCKS, "H": 2, "N": 4, "C": 16}
Caches = dict[str, Any]


def caches(order: str, padding: tuple[int, ...] = (0, 0, 0, 0, 0)) -> Caches:
    return layers_of(strided(order, SIZES, padding)[1])


def k_and_v_apart() -> Caches:
    return {"a": np.random.default_rng(3).integers(0, 256, (2, BLOCKS, 4, 16), dtype=np.uint8)}


def kernel_blocks() -> Caches:
    return {"a": np.random.default_rng(3).integers(0, 256, (2 * BLOCKS, 2, 4, 16), dtype=np.uint8)}


def run_proof(tensors: Caches, runs: tuple[Run, ...] | None = None) -> None:
    """With the right plan, or with ``runs`` as a whole layout that believes in them."""
    layout = BlockLayout.from_tensors(tensors, BLOCKS)
    if runs is not None:
        layout = replace(layout, runs=runs, payload_bytes=sum(run.size for run in runs))
    segment, ledger = Segment.create(1 << 16, layout.slot_bytes), Ledger(BLOCKS)
    prove(layout, HostCopyEngine(layout, segment, ledger), tensors, segment, ledger)


def runs_of(tensors: Caches) -> tuple[Run, ...]:
    return BlockLayout.from_tensors(tensors, BLOCKS).runs


def changed(tensors: Caches, index: int, **fields: int) -> tuple[Run, ...]:
    runs = runs_of(tensors)
    return tuple(replace(run, **fields) if number == index % len(runs) else run for number, run in enumerate(runs))


def swapped(tensors: Caches) -> tuple[Run, ...]:
    first, second, *others = runs_of(tensors)
    return second, first, *others


def halves_swapped(tensors: Caches) -> tuple[Run, ...]:
    [run] = runs_of(tensors)
    half = run.size // 2
    return Run(run.address + half, run.block_stride, half), Run(run.address, run.block_stride, half)


def with_padding(tensors: Caches) -> tuple[Run, ...]:
    return tuple(replace(run, size=run.block_stride) for run in runs_of(tensors))


def as_if_padded_elsewhere(tensors: Caches) -> tuple[Run, ...]:
    """As many bytes as a block has, beginning in the padding of the one before it."""
    first, *others = runs_of(tensors)
    return first, *(replace(run, address=run.address - (run.block_stride - run.size)) for run in others)


def joined(tensors: Caches) -> tuple[Run, ...]:
    """K and V taken for neighbours, as they are where blocks are outermost: ``[blocks, 2, ...]``."""
    first, second = runs_of(tensors)
    return (Run(first.address, first.block_stride + second.block_stride, first.size + second.size),)


PADDED = (0, 16, 0, 0, 0)
WRONG: dict[str, tuple[Callable[[], Caches], Callable[[Caches], tuple[Run, ...]]]] = {
    "half the stride": (lambda: caches("LBHNC"), lambda made: changed(made, 1, block_stride=64)),
    "no stride": (lambda: caches("LBHNC"), lambda made: changed(made, 1, block_stride=0)),
    "the stride without its padding": (lambda: caches("LBHNC", PADDED), lambda made: changed(made, 1, block_stride=128)),
    "the stride of one layer, blocks outermost": (lambda: caches("BLHNC"), lambda made: changed(made, 0, block_stride=128)),
    "the stride of the kernel's blocks": (kernel_blocks, lambda made: changed(made, 0, block_stride=128)),
    "one of the kernel's blocks": (kernel_blocks, lambda made: changed(made, 0, size=128)),
    "heads for blocks": (lambda: caches("LBHNC"), lambda made: changed(made, 1, block_stride=64, size=64)),
    "K and V for blocks": (k_and_v_apart, joined),
    "V missing": (k_and_v_apart, lambda made: runs_of(made)[:1]),
    "K twice": (k_and_v_apart, lambda made: runs_of(made)[:1] * 2),
    "K and V in each other's place": (k_and_v_apart, swapped),
    "layers in each other's place": (lambda: caches("LBHNC"), swapped),
    "heads in each other's place": (lambda: caches("LHBNC"), swapped),
    "halves of a block in each other's place": (lambda: caches("BLHNC"), halves_swapped),
    "a layer missing": (lambda: caches("LBHNC"), lambda made: runs_of(made)[1:]),
    "a head missing": (lambda: caches("LHBNC"), lambda made: runs_of(made)[:-1]),
    "a run too short": (lambda: caches("BLHNC"), lambda made: changed(made, 0, size=368)),
    "a run too long": (lambda: caches("LHBNC"), lambda made: changed(made, 0, size=80)),
    "padding copied": (lambda: caches("LBHNC", PADDED), with_padding),
    "padding copied, blocks outermost": (lambda: caches("BLHNC", (16, 0, 0, 0, 0)), with_padding),
    "padding on the wrong side": (lambda: caches("LBHNC", PADDED), as_if_padded_elsewhere),
    "padding between layers copied": (
        lambda: caches("BLHNC", (0, 16, 0, 0, 0)),
        lambda made: (Run(runs_of(made)[0].address, runs_of(made)[0].block_stride, 3 * 128 + 2 * 16),),
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_idea_of_a_layout_is_found(mistake: str) -> None:
    make, wrong = WRONG[mistake]
    tensors = make()
    run_proof(tensors)
    kept = {name: tensor.copy() for name, tensor in tensors.items()}
    with pytest.raises(LayoutError, match="proof failed"):
        run_proof(tensors, wrong(tensors))
    assert all(np.array_equal(kept[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
@pytest.mark.parametrize(
    "make",
    [
        lambda memory: memory[: 2 * BLOCKS * 64].view(2, BLOCKS, 4, 16),
        lambda memory: memory[: 2 * BLOCKS * 64].view(2 * BLOCKS, 4, 4, 4),
        lambda memory: memory[: 4 * BLOCKS * 64].view(2, 2 * BLOCKS, 4, 16),
        lambda memory: memory[: 2 * BLOCKS * 80].view(2 * BLOCKS, 5, 16)[:, :4],
        lambda memory: memory[: 4 * BLOCKS * 64].view(2, 2 * BLOCKS, 4, 16).transpose(2, 3),
    ],
    ids=["K and V apart", "kernel blocks", "both", "padded kernel blocks", "transposed"],
)
def test_torch_tensors_are_gone_through_by_their_own_blocks(dtype: torch.dtype, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    memory = torch.randint(0, 256, (16384,), dtype=torch.uint8).view(dtype)
    before = memory.clone()
    tensors = {"a": make(memory)}
    run_proof(tensors)
    with pytest.raises(LayoutError, match="proof failed"):
        run_proof(tensors, changed(tensors, -1, block_stride=32))
    assert torch.equal(memory.view(torch.uint8), before.view(torch.uint8))


def test_a_slot_of_tensors_in_between_each_other_is_in_order_of_address() -> None:
    """In any order of registration, and with tensors apart before, between and behind them."""
    storage = np.random.default_rng(2).integers(0, 256, (BLOCKS, 4, 16), dtype=np.uint8)
    alone = [np.random.default_rng(seed).integers(0, 256, (BLOCKS, 32), dtype=np.uint8) for seed in (4, 5)]
    tensors = {"d": storage[:, 3], "x": alone[0], "a": storage[:, 0], "y": alone[1], "c": storage[:, 2], "same as c": storage[:, 2]}
    run_proof(tensors)
    layout = BlockLayout.from_tensors(tensors, BLOCKS)
    start = storage.ctypes.data
    assert layout.runs == (
        Run(start, 64, 16),
        Run(start + 32, 64, 32),
        Run(alone[0].ctypes.data, 32, 32),
        Run(alone[1].ctypes.data, 32, 32),
    )
