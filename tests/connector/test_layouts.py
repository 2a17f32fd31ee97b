"""`BlockLayout` on KV tensors as vLLM makes them: specs customized by its real backends, placed, allocated and viewed by its own code.

What `vllm.v1.worker.gpu_model_runner` and `vllm.v1.worker.gpu.attn_utils` do on a GPU is done here with device "cpu"; nothing in it
asks for the device. Which layouts a backend allows is asked of the backend.
"""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from tests.connector.engines import make_vllm_config
from tests.connector.kv_models import MODELS
from tests.connector.kv_tensors import Cache, Engine
from tests.copy.rigs import ids

from kvoffload.connector import compat
from kvoffload.connector.identity import namespace_items
from kvoffload.copy.host import HostCopyEngine
from kvoffload.copy.plan import plan_of
from kvoffload.copy.proof import prove
from kvoffload.layout import HEADER_BYTES, BlockLayout, Run
from kvoffload.ledger import Ledger
from kvoffload.namespace import namespace_digest
from kvoffload.runtime.shared import Shared
from kvoffload.segment import Segment
from kvoffload.testing.model import TINY, make_model

pytest.importorskip("vllm")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(120)]

BLOCKS = 9
CASES = [(model, *made.split(":")) for model, (_, layouts) in MODELS.items() for made in layouts.split()]
SERVED = [(model, layout, int(runs)) for model, layout, runs in CASES if runs != "0"]
REFUSED = [(model, layout) for model, layout, runs in CASES if runs == "0"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(make_vllm_config(make_model(tmp_path_factory.mktemp("models"), TINY)))


def made(engine: Engine, model: str, layout: str, blocks: int = BLOCKS) -> Cache:
    cache = engine.cache(MODELS[model][0](), layout, blocks)
    torch.manual_seed(5)
    cache.memory.copy_(torch.randint(0, 256, cache.memory.shape, dtype=torch.uint8))
    return cache


@pytest.mark.parametrize("model", MODELS)
def test_which_layouts_the_backends_allow(engine: Engine, model: str) -> None:
    layers, layouts = MODELS[model]
    assert sorted(engine.layouts([kind for kind, _ in layers().values()])) == sorted(made.split(":")[0] for made in layouts.split())


@pytest.mark.parametrize(("model", "layout"), REFUSED)
def test_what_vllm_itself_refuses(engine: Engine, model: str, layout: str) -> None:
    """So that the table holds whatever can be met."""
    with pytest.raises((ValueError, AssertionError), match=r"mixed page sizes|Page padding|dense, unpadded pages|cannot pad pages"):
        made(engine, model, layout)


@pytest.mark.parametrize(("model", "layout", "runs"), SERVED)
def test_blocks_as_vllm_describes_and_views_them(engine: Engine, model: str, layout: str, runs: int) -> None:
    from vllm.v1.kv_cache_interface import group_kernel_blocks

    cache = made(engine, model, layout)
    before = cache.memory.clone()
    compat.check_placement(cache.tensors, cache.config)
    found = BlockLayout.from_tensors(cache.tensors, BLOCKS)
    assert len(found.runs) == runs
    pages = {name: placement.block_bytes for name, placement in compat.placements(cache.config).items()}
    assert found.payload_bytes == sum(pages.values())  # without padding
    assert found.alignment == 16

    segment, ledger = Segment.create(4 * found.slot_bytes, found.slot_bytes), Ledger(BLOCKS)
    copier = HostCopyEngine(found, segment, ledger)
    prove(found, copier, cache.tensors, segment, ledger)
    assert torch.equal(cache.memory, before)

    segment.array[:] = 0x5A
    assert copier.save(ids(2), ids(1), ids(0), copier.mark()).all()
    assert torch.equal(cache.memory, before)
    if layout[:2] in ("LB", "BL"):  # a page is one stretch: a slot has them as vLLM's arithmetic places them, one behind the other
        order = sorted(pages, key=lambda name: compat.placements(cache.config)[name].offset) if layout[0] == "B" else list(cache.tensors)
        held = segment.slot(1)[HEADER_BYTES : HEADER_BYTES + found.payload_bytes]
        assert held.tobytes() == b"".join(cache.page(name, 2).numpy().tobytes() for name in order)
    copier.load(ids(1), ids(7), copier.mark())
    expected = before.clone()
    for tensor in cache.tensors.values():
        size = tensor.element_size()
        raw = expected.view(tensor.dtype) if size > 1 else expected
        view = torch.as_strided(raw, tensor.shape, tensor.stride(), tensor.storage_offset())
        blocks = group_kernel_blocks(view, BLOCKS)  # what vLLM takes for a block of the scheduler
        blocks[7] = blocks[2]
    assert torch.equal(cache.memory, expected)  # and nothing else: padding, other blocks
    copier.close()


@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC"])
def test_kernel_blocks_are_rows_of_a_block(engine: Engine, layout: str) -> None:
    """FlashInfer's kernels have blocks of 64 tokens at most; the scheduler's of 128 are two rows of the tensor each."""
    cache = made(engine, "flashinfer, kernel blocks", layout)
    assert cache.kernel_block_sizes == [64]
    tensor = next(iter(cache.tensors.values()))
    assert tensor.shape[0] == 2 * BLOCKS
    [run, *_] = BlockLayout.from_tensors(cache.tensors, BLOCKS).runs
    row = tensor.stride(0) * tensor.element_size()
    assert run == Run(tensor.data_ptr(), 2 * row, 2 * row)


def test_blocks_outermost_are_one_run_with_or_without_padding(engine: Engine) -> None:
    cache = made(engine, "mla with indexer, kernel blocks", "BLHNC")
    found = BlockLayout.from_tensors(cache.tensors, BLOCKS)
    [run] = found.runs
    assert run.block_stride == cache.memory.numel() // BLOCKS
    assert run.block_stride > run.size  # the end of a block is vLLM's padding
    assert plan_of(found).tolist() == [[cache.memory.data_ptr(), run.block_stride, found.payload_bytes, HEADER_BYTES]]


def test_layers_that_share_the_kv_of_others(engine: Engine) -> None:
    """As ``get_shared_kv_cache_layers`` has them: the same tensor under another name, of which vLLM's description does not tell."""
    cache = made(engine, "flash attention", "BLHNC")
    alone = BlockLayout.from_tensors(cache.tensors, BLOCKS)
    first = next(iter(cache.tensors.values()))
    shared = {**cache.tensors, "model.layers.3.self_attn.attn": first}
    compat.check_placement(shared, cache.config)
    both = BlockLayout.from_tensors(shared, BLOCKS)
    assert both.runs == alone.runs
    assert both.digest() != alone.digest()


def shared_digest(engine: Engine, model: str, layout: str, blocks: int) -> bytes:
    """What blocks in the second tier are kept under, as both halves of a connector make it together."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.core.kv_cache_utils import generate_scheduler_kv_cache_config

    cache = made(engine, model, layout, blocks)
    config = engine.vllm_config
    kinds = {kind.get_name() for kind, _ in MODELS[model][0]().values()}
    config.attention_config.backend = next((kind for kind in AttentionBackendEnum if kind.name in kinds), None)
    items, unidentified = namespace_items(config, generate_scheduler_kv_cache_config([cache.config]))
    config.attention_config.backend = None
    assert not unidentified
    assert items["kv layout"] == layout
    found = BlockLayout.from_tensors(cache.tensors, blocks)
    return Shared(namespace_digest(items), found.digest(), found.payload_bytes, ()).digest()


def test_no_two_of_all_these_share_blocks(engine: Engine) -> None:
    """Whatever differs: backend, layout, type, sizes, kernel blocks, padding. But the number of blocks may."""
    digests = {(model, layout): shared_digest(engine, model, layout, BLOCKS) for model, layout, _ in SERVED}
    same = [pair for pair in combinations(digests, 2) if digests[pair[0]] == digests[pair[1]]]
    assert same == []
    for model in ("flash attention", "split K and V (ROCm)", "mla with indexer", "flashinfer, kernel blocks"):
        for served, layout, _ in SERVED:
            if served == model:
                assert shared_digest(engine, model, layout, BLOCKS + 4) == digests[model, layout]


@pytest.mark.parametrize("model", ["flash attention", "flashinfer nvfp4", "flashinfer, kernel blocks", "mla with indexer"])
def test_the_layout_alone_tells_layouts_apart(engine: Engine, model: str) -> None:
    """Where they are not the same in memory, which they are with one head."""
    layouts = [layout for served, layout, _ in SERVED if served == model]
    digests = {layout: BlockLayout.from_tensors(made(engine, model, layout).tensors, BLOCKS).digest() for layout in layouts}
    same = {pair for pair in combinations(digests, 2) if digests[pair[0]] == digests[pair[1]]}
    assert same == ({("LBNHC", "LBHNC"), ("BLNHC", "BLHNC")} if model == "mla with indexer" else set())
