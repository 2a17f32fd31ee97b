"""The kernels' own source, compiled for this CPU, against numpy and torch."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.cuda.kernels.cases import Check, cases
from tests.cuda.kernels.large import LARGE
from tests.cuda.kernels.shim import KERNELS, SOURCE, Geometry, Launch, Shim, build_shim

pytestmark = pytest.mark.cuda

CHECKS = {**cases(), **LARGE}


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Shim:
    return Shim(ctypes.CDLL(str(build_shim(tmp_path_factory.mktemp("shim")))))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_every_byte_is_as_numpy_has_it(shim: Shim, check: Check, kernel: str) -> None:
    check(shim, kernel)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("order", ["LBHNC", "BLHNC", "LHBNC"])
def test_blocks_of_torch_tensors(shim: Shim, order: str, reverse: bool) -> None:
    """Layers, blocks, heads, tokens, bytes in three of vLLM's orders: a page whole, pages of all layers together, heads outside blocks."""
    layers, num_blocks, heads, page = 3, 11, 2, 16 * 2 * 48
    sizes = {"L": layers, "B": num_blocks, "H": heads, "N": page, "C": 1}
    torch.manual_seed(3)
    raw = torch.randint(0, 256, [sizes[axis] for axis in order], dtype=torch.uint8)
    kv = raw.permute([order.index(axis) for axis in "LBHNC"])  # as if L, B, H, N, C
    slots = torch.randint(0, 256, (7, 64 + layers * heads * page + 32), dtype=torch.uint8)
    runs = [
        (kv[layer, 0, head].data_ptr(), kv.stride(1), page, 64 + (layer * heads + head) * page)
        for layer in range(layers)
        for head in range(heads)
    ]
    blocks, slot_ids = torch.tensor([10, 0, 4, 7]), torch.tensor([2, 6, 0, 3])
    launch = Launch(
        runs=np.array(runs, dtype=np.uint64),
        blocks=blocks.numpy().astype(np.uint64),
        slots=slot_ids.numpy().astype(np.uint64),
        num_blocks=num_blocks,
        num_slots=len(slots),
        slot_base=slots.data_ptr(),
        slot_bytes=slots.stride(0),
    )
    payload = slice(64, 64 + layers * heads * page)
    pages = kv.transpose(0, 1)  # B, L, H, N, C

    wanted = slots.clone()
    wanted[slot_ids, payload] = pages.index_select(0, blocks).reshape(len(blocks), -1)
    shim.launch("kv_gather", launch, Geometry(5, 32, reverse))
    assert torch.equal(slots, wanted)

    slots.random_(0, 256)
    restored = pages.clone().index_copy_(0, blocks, slots.index_select(0, slot_ids)[:, payload].reshape(len(blocks), *pages.shape[1:]))
    shim.launch("kv_scatter", launch, Geometry(5, 32, reverse))
    assert torch.equal(pages, restored)


def test_a_round_trip_restores_every_block(shim: Shim) -> None:
    random = np.random.default_rng(4)
    kv = random.integers(0, 256, (40, 3 * 208), dtype=np.uint8)
    slots = np.zeros((40, 1024), dtype=np.uint8)
    runs = np.array([[kv.ctypes.data + 208 * run, 3 * 208, 208, 64 + 208 * run] for run in range(3)], dtype=np.uint64)
    blocks, slot_ids = (random.permutation(40).astype(np.uint64) for _ in range(2))
    launch = Launch(runs, blocks, slot_ids, 40, 40, slots.ctypes.data, 1024)
    before = kv.copy()
    shim.launch("kv_gather", launch, Geometry(12, 32))
    kv[:] = 0
    shim.launch("kv_scatter", launch, Geometry(7, 5, reverse=True))
    assert np.array_equal(kv, before)


def test_parameters_are_as_wide_as_the_header_says(shim: Shim) -> None:
    """Pointer, 4 bytes, two pointers, 4 bytes, four of 8: what a launch packs, and what `Launch` packs."""
    for kernel in KERNELS:
        assert shim.parameter_bytes(kernel) == [8, 4, 8, 8, 4, 8, 8, 8, 8]
    launch = Launch(*(np.zeros((1, 4), dtype=np.uint64),) * 3, 1, 1, 0, 0)
    assert [ctypes.sizeof(value) for value in launch.parameters()] == shim.parameter_bytes("kv_gather")
    assert shim.parameter_bytes("kv_gathers") is None


@pytest.mark.parametrize(
    ("kernel", "geometry"),
    [("kv_copy", Geometry(1, 1)), ("kv_gather", Geometry(0, 1)), ("kv_gather", Geometry(1, 0)), ("kv_scatter", Geometry(1, 1025))],
)
def test_what_no_gpu_takes_is_refused(shim: Shim, kernel: str, geometry: Geometry) -> None:
    ids = np.zeros(1, dtype=np.uint64)
    with pytest.raises(ValueError, match="was not launched"):
        shim.launch(kernel, Launch(np.zeros((1, 4), dtype=np.uint64), ids, ids, 0, 0, 0, 0), geometry)


@pytest.mark.parametrize("word", ["__syncthreads();", "__shared__ int x;", "atomicAdd(&run, 1);", "__shfl_sync(0, 0, 0);"])
def test_a_kernel_whose_threads_meet_does_not_compile(tmp_path: Path, word: str) -> None:
    """The shim runs threads one after another, which would be a lie for such a kernel."""
    mutant = tmp_path / "kv_copy.cu"
    mutant.write_text(SOURCE.read_text().replace("const uint64_t step =", f"{word}\n    const uint64_t step ="))
    with pytest.raises(RuntimeError, match=re.escape(re.split(r"[ (]", word)[0])):
        build_shim(tmp_path, source=mutant)
