"""Layouts that vLLM 0.32 no longer makes, on tensors made as its older versions made them, and what is refused.

These versions are not supported by the connector; where strides leave no doubt the layout is, so that the next version may bring it
back. Tensors had a shape of the attention backend's own, allocated in an order of dimensions of its own (``get_kv_cache_shape``,
``get_kv_cache_stride_order``), and were permuted back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tests.connector.engines import make_vllm_config
from tests.connector.kv_models import MODELS
from tests.connector.kv_tensors import Engine
from tests.copy.rigs import ids

from kvoffload.connector import compat
from kvoffload.connector.halves import WorkerHalf
from kvoffload.copy.host import HostCopyEngine
from kvoffload.copy.proof import prove
from kvoffload.errors import LayoutError
from kvoffload.layout import BlockLayout
from kvoffload.ledger import Ledger
from kvoffload.segment import Segment
from kvoffload.testing.model import TINY, make_model

pytest.importorskip("vllm")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(120)]

B, N, H, D, L = 9, 16, 2, 32, 3


def older(shape: Sequence[int], order: Sequence[int] | None = None, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """As ``_reshape_kv_cache_tensors`` did: raw int8 memory, typed, in physical order, permuted back to ``shape``."""
    order = order or range(len(shape))
    raw = torch.randint(0, 256, (int(np.prod(shape)) * dtype.itemsize,), dtype=torch.uint8)
    physical = raw.view(dtype).view([shape[axis] for axis in order])
    return physical.permute([list(order).index(axis) for axis in range(len(shape))])


HND = (0, 1, 3, 2, 4)
OLDER: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None, int]] = {
    # name: shape, physical order, runs of a block in one layer
    "FlashAttention, K and V outermost": ((2, B, N, H, D), None, 2),
    "FlashAttention, K and V outermost, heads before tokens": ((2, B, N, H, D), HND, 2),
    "FlashAttention, smaller kernel blocks": ((2, 4 * B, N, H, D), None, 2),
    "FlashAttention, K and V inside of heads": ((2, B, N, H, D), (1, 3, 0, 2, 4), 1),
    "FlashInfer, tokens first": ((B, 2, N, H, D), None, 1),
    "FlashInfer, heads first": ((B, 2, N, H, D), HND, 1),
    "FlashInfer, smaller kernel blocks": ((2 * B, 2, N, H, D), HND, 1),
    "Triton": ((B, 2, N, H, D), None, 1),
    "FlexAttention": ((2, B, N, H, D), None, 2),
    "paged attention, flat blocks": ((2, B, N * H * D), None, 2),
    "MLA": ((B, N, 576), None, 1),
    "MLA, smaller kernel blocks": ((4 * B, N, 576), None, 1),
    "layers inside of blocks, in one tensor": ((B, L, 2, N, H, D), None, 1),
    "layers inside of blocks, heads outside of layers": ((B, L, 2, N, H, D), (0, 4, 1, 2, 3, 5), 1),
}


@pytest.mark.parametrize("kind", OLDER)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.float32])
def test_older_layouts(kind: str, dtype: torch.dtype) -> None:
    """0.32 has none of these: there K and V of a token are in one dimension, ``[blocks, heads, tokens, 2 * size]``."""
    shape, order, runs = OLDER[kind]
    tensors = {f"layers.{number}": older(shape, order, dtype) for number in range(2)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    layout = BlockLayout.from_tensors(tensors, B)
    assert len(layout.runs) == 2 * runs
    assert layout.payload_bytes == 2 * tensors["layers.0"].nbytes // B
    segment, ledger = Segment.create(2 * layout.slot_bytes, layout.slot_bytes), Ledger(B)
    engine = HostCopyEngine(layout, segment, ledger)
    prove(layout, engine, tensors, segment, ledger)
    assert all(torch.equal(bits(before[name]), bits(tensor)) for name, tensor in tensors.items())

    assert engine.save(ids(2), ids(1), ids(0), None).all()
    engine.load(ids(1), ids(7), None)
    axis = 1 if shape[0] == 2 else 0
    rows = shape[axis] // B
    for name, tensor in tensors.items():
        expected = bits(before[name]).movedim(axis, 0)
        expected[7 * rows : 8 * rows] = expected[2 * rows : 3 * rows].clone()
        assert torch.equal(expected, bits(tensor).movedim(axis, 0))
    engine.close()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Random bytes may be NaN, which equals nothing."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def test_no_two_of_them_share_blocks() -> None:
    digests = {kind: BlockLayout.from_tensors({"a": older(shape, order)}, B).digest() for kind, (shape, order, _) in OLDER.items()}
    same = {(one, other) for one in digests for other in digests if one < other and digests[one] == digests[other]}
    # The same in memory; backends are told apart by the namespace.
    assert same == {("FlashInfer, tokens first", "Triton"), ("FlashAttention, K and V outermost", "FlexAttention")}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(make_vllm_config(make_model(tmp_path_factory.mktemp("models"), TINY)))


@pytest.fixture
def cache(engine: Engine) -> Any:
    return engine.cache(MODELS["flashinfer, kernel blocks"][0](), "LBNHC", B)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (lambda cache: cache.memory, "does not tell how 9 blocks lie in it"),  # specs with ``has_layer_views`` false get the raw memory
        (lambda cache: cache.memory[:-1], "does not have the 9 blocks"),
        (lambda cache: [cache.memory], "one tensor is expected"),  # Mamba's, before 0.32
        (lambda cache: cache.memory[: 9 * 64].view(3, 3, 64), "does not have the 9 blocks"),
        (lambda cache: cache.memory[: 3 * 9 * 64].view(3, 9, 64), "does not have the 9 blocks"),
        (lambda cache: cache.memory[: 9 * 64].view(9, 64).flip(0)[:, :0], "holds nothing"),
        (lambda cache: cache.memory[:64].expand(9, 64), "overlap"),
        (lambda cache: cache.memory[: 9 * 64].view(9, 64).to("meta"), "device 'meta'"),
        (lambda cache: cache.memory[: 8 * 32 + 64].as_strided((9, 64), (32, 1)), "overlap"),
    ],
)
def test_what_is_not_a_known_layout_is_refused(cache: Any, tensor: Any, reason: str) -> None:
    with pytest.raises(LayoutError, match=reason):
        BlockLayout.from_tensors({"a": tensor(cache)}, B)


@pytest.mark.parametrize("layout", ["LBNHC", "BLHNC"])
def test_tensors_that_are_not_where_vllm_tells_are_refused(engine: Engine, layout: str) -> None:
    """One thing different from what vLLM described, each time."""
    cache = engine.cache(MODELS["mla with indexer"][0](), layout, B)
    names = list(cache.tensors)
    first, second = (cache.tensors[name] for name in names[:2])
    compat.check_placement(cache.tensors, cache.config)
    for wrong, word in (
        ({names[0]: second, names[1]: first}, "not where vLLM tells"),
        ({names[0]: first[1:]}, "not where vLLM tells"),
        ({names[0]: first[:, :, :-1]}, "not where vLLM tells"),
        ({names[0]: first[:, :, :, 1:]}, "not where vLLM tells"),
        ({names[0]: first.clone()}, "not where vLLM tells" if layout == "BLHNC" else None),
        ({names[1]: second.clone()}, "not where vLLM tells"),
        ({names[0]: first.as_strided(first.shape, (first.stride(0) // 2, *first.stride()[1:]))}, "not where vLLM tells"),
        ({"another": first[1:]}, "does not tell where its KV is"),
    ):
        changed = {**cache.tensors, **wrong}
        if word is None:
            compat.check_placement(changed, cache.config)
            continue
        with pytest.raises(LayoutError, match=word):
            compat.check_placement(changed, cache.config)
    with pytest.raises(LayoutError, match="gave no tensor of it"):
        compat.check_placement(dict(list(cache.tensors.items())[1:]), cache.config)


def test_a_worker_compares_what_it_is_given_with_what_vllm_tells(engine: Engine, cache: Any) -> None:
    half = WorkerHalf(engine.vllm_config, cache.config, lambda copier: copier)
    name, tensor = next(iter(cache.tensors.items()))
    with pytest.raises(LayoutError, match="not where vLLM tells"):
        half.register_kv_caches({**cache.tensors, name: tensor[:, :, :32]})
    assert half.host is None


def test_what_vllm_describes_and_we_do_not_know_is_refused(cache: Any) -> None:
    from vllm.v1.kv_cache_interface import HiSparseResidentSpec

    cache.config.kv_cache_tensors[0].host_resident = True
    with pytest.raises(LayoutError, match="a way that is not known"):
        compat.check_placement(cache.tensors, cache.config)
    cache.config.kv_cache_tensors[0].host_resident = False
    cache.config.kv_cache_groups[0].kv_cache_spec = HiSparseResidentSpec(block_size=128, page_size=4096)
    with pytest.raises(LayoutError, match="a way that is not known"):
        compat.check_placement(cache.tensors, cache.config)


def test_a_vllm_that_describes_nothing_is_taken_by_strides_alone(cache: Any) -> None:
    cache.config.kv_cache_tensors = []
    compat.check_placement({"a": older((2, B, N, H, D))}, cache.config)
