from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.copy.rigs import layers_of, strided

from kvoffload.errors import LayoutError
from kvoffload.layout import MAX_RUNS, BlockLayout, Run

SIZES = {"L": 3, "B": 6, "H": 2, "N": 4, "C": 8}
PAGE = 2 * 4 * 8


class OnMeta:
    """A tensor of a device that nobody knows."""

    shape = (6, 8)
    dtype = "uint8"
    device = "npu:0"

    def stride(self) -> tuple[int, ...]:
        return (8, 1)

    def element_size(self) -> int:
        return 1

    def data_ptr(self) -> int:
        return 4096


class OnCuda(OnMeta):
    device = "cuda:0"


class OnSecondCuda(OnMeta):
    device = "cuda:1"


def cache(order: str, padding: tuple[int, ...] = (0, 0, 0, 0, 0), itemsize: int = 1) -> dict[str, NDArray[Any]]:
    return layers_of(strided(order, SIZES, padding, itemsize)[1])


def layout_of(tensors: dict[str, Any], blocks: int = 6) -> BlockLayout:
    return BlockLayout.from_tensors(tensors, blocks)


def offsets(layout: BlockLayout, tensors: dict[str, NDArray[Any]]) -> list[int]:
    start = next(iter(tensors.values())).ctypes.data
    return [run.address - start for run in layout.runs]


@pytest.mark.parametrize(
    ("order", "expected", "stride", "size"),
    [
        ("LBHNC", [0, 6 * PAGE, 12 * PAGE], PAGE, PAGE),
        ("LBNHC", [0, 6 * PAGE, 12 * PAGE], PAGE, PAGE),
        ("BLHNC", [0], 3 * PAGE, 3 * PAGE),
        ("BLNHC", [0], 3 * PAGE, 3 * PAGE),
        ("LHBNC", [0, 6 * 32, 12 * 32, 18 * 32, 24 * 32, 30 * 32], 32, 32),
        ("BHLNC", [0], 3 * PAGE, 3 * PAGE),
    ],
)
def test_the_layouts_of_vllm(order: str, expected: list[int], stride: int, size: int) -> None:
    tensors = cache(order)
    layout = layout_of(tensors)
    assert offsets(layout, tensors) == expected
    assert {(run.block_stride, run.size) for run in layout.runs} == {(stride, size)}
    assert layout.payload_bytes == 3 * PAGE
    assert layout.slot_bytes == 4096
    assert layout.names == ("layers.0", "layers.1", "layers.2")


def test_padded_pages_are_not_copied() -> None:
    tensors = cache("LBHNC", (0, 16, 0, 0, 0), itemsize=2)
    layout = layout_of(tensors)
    assert [run.size for run in layout.runs] == [PAGE * 2] * 3
    assert layout.runs[0].block_stride == (PAGE + 16) * 2


def test_a_slice_of_a_larger_storage() -> None:
    storage = np.zeros((6, 3, 4, 8), dtype=np.float32)
    layout = layout_of({"key": storage[:, 1:, :, 2:6]})
    assert len(layout.runs) == 2 * 4
    assert layout.runs[0] == Run(storage.ctypes.data + (32 + 2) * 4, 3 * 32 * 4, 16)


def test_the_slot_is_rounded_to_pages() -> None:
    for size, slot_bytes in ((4032, 4096), (4033, 8192)):
        assert layout_of({"layer": np.zeros((6, size), dtype=np.uint8)}).slot_bytes == slot_bytes


def test_torch_tensors_of_any_type_equal_numpy() -> None:
    storage = torch.zeros(2, 6, 4, 8, dtype=torch.bfloat16)
    tensors = {"a": storage[0], "b": storage[1]}
    layout = layout_of(tensors)
    assert layout.runs == (Run(storage.data_ptr(), 64, 64), Run(storage.data_ptr() + 6 * 64, 64, 64))
    assert layout.device == "cpu"
    assert layout.keep == (tensors["a"], tensors["b"])
    fp8 = torch.zeros(6, 16, dtype=torch.float8_e4m3fn)
    assert layout_of({"a": fp8}).payload_bytes == 16


@pytest.mark.parametrize("tensor", [OnCuda(), OnSecondCuda()])
def test_a_device_of_any_number(tensor: Any) -> None:
    layout = layout_of({"a": tensor})
    assert layout.device == tensor.device
    assert layout.runs == (Run(4096, 8, 8),)


def test_layers_that_share_a_tensor_are_copied_once() -> None:
    first, second = np.zeros((6, 32), np.uint8), np.zeros((6, 32), np.uint8)
    shared = layout_of({"a": first, "b": second, "c": first})
    assert shared.payload_bytes == 64
    assert shared.runs[0].address == first.ctypes.data
    assert shared.names == ("a", "b", "c")
    assert shared.digest() != layout_of({"a": first, "b": second, "c": second}).digest()


def test_one_block_only_stride() -> None:
    assert layout_of({"a": np.zeros((1, 32), np.uint8)}, blocks=1).payload_bytes == 32


def test_the_digest_tells_what_a_slot_means_and_not_where_it_is() -> None:
    base = layout_of(cache("LBHNC")).digest()
    assert len(base) == 16
    assert base == layout_of(cache("LBHNC")).digest()  # other memory
    others = [
        layout_of(cache("LBNHC")),
        layout_of(cache("LBHNC", (0, 8, 0, 0, 0))),
        layout_of(cache("LBHNC", itemsize=2)),
        layout_of({name.replace("layers", "model"): tensor for name, tensor in cache("LBHNC").items()}),
        layout_of(dict(reversed(cache("LBHNC").items()))),
        layout_of({name: tensor.view(np.int8) for name, tensor in cache("LBHNC").items()}),
    ]
    digests = {layout.digest() for layout in others}
    assert len(digests) == len(others)
    assert base not in digests


def plain() -> NDArray[np.uint8]:
    return np.zeros((6, 8), np.uint8)


BASE = np.zeros(4096, np.uint8)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({}, "no KV tensors"),
        ({"a": np.zeros((3, 6, 8), np.uint8)}, "does not have the 6 blocks, or a multiple of them, as dimension 0"),
        ({"a": np.zeros((8, 6), np.uint8)}, "does not have the 6 blocks"),
        ({"a": np.zeros((12, 8), np.uint8)}, "does not tell how 6 blocks lie in it"),
        ({"a": np.zeros(6 * 8, np.uint8)}, "does not tell how 6 blocks lie in it"),
        ({"a": np.zeros((2, 12), np.uint8)}, "does not tell how 6 blocks lie in it"),
        ({"a": plain(), "b": np.zeros((5, 8), np.uint8)}, "layer b: shape"),
        ({"a": np.zeros((), np.uint8)}, "does not have the 6 blocks"),
        ({"a": np.zeros((6, 0), np.uint8)}, "holds nothing"),
        ({"a": [plain(), plain()]}, "one tensor is expected"),
        ({"a": OnMeta()}, "device 'npu:0'"),
        ({"a": plain(), "b": OnCuda()}, "on several devices: cpu, cuda:0"),
        ({"a": OnCuda(), "b": OnSecondCuda()}, "on several devices: cuda:0, cuda:1"),
        ({"a": np.lib.stride_tricks.as_strided(BASE, (6, 8), (0, 1))}, "overlap"),
        ({"a": np.lib.stride_tricks.as_strided(BASE, (6, 8), (4, 1))}, "overlap"),
        ({"a": np.lib.stride_tricks.as_strided(BASE, (6, 8, 2), (16, 1, 1))}, "overlap"),
        ({"a": plain()[::-1]}, "overlap or run backwards"),
        ({"a": np.lib.stride_tricks.as_strided(BASE.view(np.uint16), (6, 4), (9, 2))}, "no multiples"),
        ({"a": BASE[:48].reshape(6, 8), "b": BASE[40:88].reshape(6, 8)}, "over each other"),
        ({"a": BASE[:96].reshape(6, 16)[:, :9], "b": BASE[:96].reshape(6, 16)[:, 8:]}, "over each other"),
        ({"a": BASE[:96].reshape(6, 16)[:, :8], "b": BASE[12:108].reshape(6, 16)[:, :8]}, "over each other"),
        ({"a": BASE[:96].reshape(6, 16)[:, :8], "b": BASE[8:80].reshape(6, 12)[:, :4]}, "over each other"),
        ({"a": np.zeros((6, MAX_RUNS + 1, 2), np.uint8)[:, :, :1]}, "pieces"),
        ({f"{n}": np.zeros((6, MAX_RUNS // 2, 2), np.uint8)[:, :, :1] for n in range(3)}, "fragmented"),
    ],
)
def test_what_is_not_understood_is_refused(tensors: dict[str, Any], reason: str) -> None:
    with pytest.raises(LayoutError, match=reason):
        layout_of(tensors)


@pytest.mark.parametrize(
    ("start", "stride", "sizes", "expected"),
    [
        (0, 64, (32, 32), 16),
        (0, 64, (32, 16), 16),
        (8, 64, (32, 16), 8),  # the address
        (0, 60, (16, 16), 4),  # the stride from block to block
        (0, 64, (18, 32), 2),  # a size, which also moves the next run in the slot
        (0, 64, (32, 7), 1),
        (16, 65, (32, 16), 1),
    ],
)
def test_the_widest_access_is_told(start: int, stride: int, sizes: tuple[int, int], expected: int) -> None:
    memory = np.zeros(2048, np.uint8)
    start += -memory.ctypes.data % 64
    near, far = memory[start:], memory[start + 1024 :]
    views = [np.lib.stride_tricks.as_strided(part, (6, size), (stride, 1)) for part, size in zip((near, far), sizes, strict=True)]
    assert layout_of({"a": views[0], "b": views[1]}).alignment == expected


def test_layers_in_between_each_other_lie_in_a_slot_as_in_memory() -> None:
    storage = BASE[:96].reshape(6, 16)
    first, second = storage[:, :8], storage[:, 8:]
    layout = layout_of({"b": second, "a": first})
    assert layout.runs == (Run(storage.ctypes.data, 16, 16),)
    assert layout.digest() != layout_of({"a": first, "b": second}).digest()
    apart = layout_of({"b": second[:, :7], "a": first[:, :7]})
    assert [run.address - storage.ctypes.data for run in apart.runs] == [0, 8]


def test_the_order_of_what_lies_in_between_counts() -> None:
    """Two layers of the same shape and strides, each in the other's place: their slots differ, so must their digests."""
    storage = BASE[:96].reshape(6, 16)
    first, second = storage[:, :7], storage[:, 8:15]
    assert layout_of({"a": first, "b": second}).digest() != layout_of({"a": second, "b": first}).digest()


def test_apart_in_memory_layers_lie_as_registered() -> None:
    """Where an allocator puts them is chance, and must not be seen in a slot."""
    low, high = BASE[:48].reshape(6, 8), BASE[1024:1072].reshape(6, 8)
    one, other = layout_of({"a": low, "b": high}), layout_of({"a": high, "b": low})
    assert [run.address for run in one.runs] == [low.ctypes.data, high.ctypes.data]
    assert [run.address for run in other.runs] == [high.ctypes.data, low.ctypes.data]
    assert one.digest() == other.digest()


def test_the_number_of_blocks_does_not_count_in_the_digest() -> None:
    """Engines have as many blocks as their memory holds, and must be able to share them."""
    for order in ("LBHNC", "BLHNC", "LHBNC", "BHLNC"):
        few, many = (layout_of(layers_of(strided(order, SIZES | {"B": blocks}, (0,) * 5)[1]), blocks) for blocks in (6, 7))
        assert few.digest() == many.digest(), order
    apart = [layout_of({"a": np.zeros((2, blocks, 4, 8), np.uint8)}, blocks).digest() for blocks in (6, 7)]
    assert apart[0] == apart[1]


def test_the_order_of_what_is_outside_of_blocks_counts() -> None:
    """Heads outside of K and V, or K and V outside of heads, and blocks inside of both: strides beyond a block, and in one order."""
    inner, outer = np.zeros((2, 3, 6, 8), np.uint8).transpose(0, 2, 1, 3), np.zeros((3, 2, 6, 8), np.uint8).transpose(1, 2, 0, 3)
    assert inner.shape == outer.shape == (2, 6, 3, 8)
    assert layout_of({"a": inner}).digest() != layout_of({"a": outer}).digest()


def test_blocks_behind_k_and_v() -> None:
    tensor = np.zeros((2, 6, 4, 8), np.uint8)
    layout = layout_of({"a": tensor})
    assert layout.runs == (Run(tensor.ctypes.data, 32, 32), Run(tensor.ctypes.data + 6 * 32, 32, 32))
    assert layout.digest() != layout_of({"a": tensor.swapaxes(0, 1)}).digest()


def test_smaller_blocks_of_the_kernel() -> None:
    tensor = np.zeros((12, 2, 4, 8), np.uint8)
    assert layout_of({"a": tensor}).runs == (Run(tensor.ctypes.data, 128, 128),)
    padded = np.zeros((12, 80), np.uint8)[:, :64].reshape(12, 8, 8, copy=False)
    assert layout_of({"a": padded}).runs == (Run(padded.ctypes.data, 160, 64), Run(padded.ctypes.data + 80, 160, 64))
    both = np.zeros((2, 12, 4, 8), np.uint8)
    assert layout_of({"a": both}).runs == (Run(both.ctypes.data, 64, 64), Run(both.ctypes.data + 12 * 32, 64, 64))
    whole = layout_of({"a": np.zeros((6, 4, 4, 8), np.uint8)})
    assert layout_of({"a": tensor}).digest() != whole.digest()


@pytest.mark.parametrize("shape", [(2, 2, 4, 8), (2, 4, 4, 8)])
def test_what_could_be_either_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError, match="could be dimension 0 or 1"):
        layout_of({"a": np.zeros(shape, np.uint8)}, 2)
