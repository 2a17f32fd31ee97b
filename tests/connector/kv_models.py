"""Models by the specs that vLLM's layers give of them, with the layouts that come of it: the table of `test_layouts`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.connector.kv_tensors import backend

LAYERS, HEADS = 3, 2
Layers = dict[str, tuple[Any, Any]]


def attention(block_size: int = 32, **fields: Any) -> Any:
    """As `Attention.get_kv_cache_spec` makes it."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return FullAttentionSpec(**{"block_size": block_size, "num_kv_heads": HEADS, "head_size": 64, "dtype": torch.bfloat16, **fields})


def quantized(dtype: str, **fields: Any) -> Any:
    """As `Attention.get_kv_cache_spec` makes it of a ``kv_cache_dtype``."""
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
    from vllm.v1.kv_cache_interface import get_kv_quant_mode

    return attention(**{"dtype": STR_DTYPE_TO_TORCH_DTYPE[dtype], "kv_quant_mode": get_kv_quant_mode(dtype), **fields})


def latent(dtype: str = "auto", block_size: int = 64, **fields: Any) -> Any:
    """As `MLAAttention.get_kv_cache_spec` makes it."""
    import torch
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
    from vllm.v1.kv_cache_interface import MLAAttentionSpec, get_kv_quant_mode

    made = {
        "block_size": block_size,
        "num_kv_heads": 1,
        "max_tp_shards": 1,
        "head_size": 576,
        "dtype": torch.bfloat16 if dtype == "auto" else STR_DTYPE_TO_TORCH_DTYPE[dtype],
        "cache_dtype_str": dtype,
        "kv_quant_mode": get_kv_quant_mode(dtype),
        "state_content_bytes": {"fp8_ds_mla": 656, "nvfp4_ds_mla": 352}.get(dtype),
    }
    return MLAAttentionSpec(**{**made, **fields})


def indexer(block_size: int = 64) -> Any:
    """As `DeepseekV32IndexerCache.get_kv_cache_spec` makes it: 128 bytes of fp8 and a scale for each token."""
    import torch
    from vllm.v1.kv_cache_interface import MLAAttentionSpec, SparseCacheRole

    return MLAAttentionSpec(
        block_size=block_size, num_kv_heads=1, max_tp_shards=1, head_size=132, dtype=torch.uint8, cache_role=SparseCacheRole.INDEXER
    )


def uniform(kind: str, spec: Any) -> Layers:
    return {f"model.layers.{number}.self_attn.attn": (backend(kind), spec) for number in range(LAYERS)}


def sparse(dtype: str, kind: str = "FLASHMLA_SPARSE", block_size: int = 64) -> Layers:
    """DeepSeek V3.2: latent layers, each with an indexer that has a smaller page of its own."""
    found = uniform(kind, latent(dtype, block_size))
    for number in range(LAYERS):
        found[f"model.layers.{number}.self_attn.indexer.k_cache"] = backend("INDEXER"), indexer(block_size)
    return found


def two_widths(kind: str) -> Layers:
    """Layers that differ in head size, in turns."""
    return {f"model.layers.{number}.self_attn.attn": (backend(kind), attention(head_size=64 if number % 2 else 128)) for number in range(4)}


ANY = "LBNHC:3 LBHNC:3 BLNHC:1 BLHNC:1 BHLNC:1 LHBNC:6"
ANY_LATENT = "LBNHC:3 LBHNC:3 BLNHC:1 BLHNC:1 BHLNC:1 LHBNC:3"
MIXED_PAGES = "LBNHC:6 LBHNC:6 BLNHC:1 BLHNC:1 BHLNC:0 LHBNC:0"

MODELS: dict[str, tuple[Callable[[], Layers], str]] = {
    "flash attention": (lambda: uniform("FLASH_ATTN", attention()), ANY),
    "flash attention fp8": (lambda: uniform("FLASH_ATTN", quantized("fp8")), ANY),
    "flash attention float32": (lambda: uniform("FLASH_ATTN", quantized("float32")), ANY),
    "flash attention, values narrower": (
        lambda: uniform("FLASH_ATTN_DIFFKV", attention(head_size_v=32)),
        "LBNHC:3 LBHNC:3 BLNHC:1 BLHNC:1 BHLNC:1 LHBNC:6",
    ),
    "flash attention, two widths": (lambda: two_widths("FLASH_ATTN"), "LBNHC:4 LBHNC:4 BLNHC:1 BLHNC:1 BHLNC:0 LHBNC:0"),
    "flash attention, padded": (
        lambda: uniform("FLASH_ATTN", attention(page_size_padded=1 << 15)),
        "LBNHC:3 LBHNC:3 BLNHC:3 BLHNC:3 BHLNC:0 LHBNC:0",
    ),
    "flash attention, blocks aligned": (
        lambda: uniform("FLASH_ATTN", attention(block_stride_alignment=20480)),
        "LBNHC:3 LBHNC:3 BLNHC:1 BLHNC:1 BHLNC:1 LHBNC:0",
    ),
    "flashinfer": (lambda: uniform("FLASHINFER", attention()), ANY),
    "flashinfer, kernel blocks": (lambda: uniform("FLASHINFER", attention(128)), "LBNHC:3 LBHNC:3 BLNHC:1 BLHNC:1 BHLNC:1 LHBNC:0"),
    "flashinfer fp8": (lambda: uniform("FLASHINFER", quantized("fp8_e5m2")), ANY),
    "flashinfer nvfp4": (lambda: uniform("FLASHINFER", quantized("nvfp4")), "LBNHC:3 LBHNC:3 BLNHC:1 BLHNC:1 BHLNC:1 LHBNC:12"),
    "triton": (lambda: uniform("TRITON_ATTN", attention()), ANY),
    "triton int8 with scales": (
        lambda: uniform("TRITON_ATTN", quantized("int8_per_token_head")),
        "LBNHC:3 LBHNC:3 BLNHC:1 BLHNC:1 BHLNC:1 LHBNC:6",
    ),
    "triton fp8 with scales": (
        lambda: uniform("TRITON_ATTN", quantized("fp8_per_token_head")),
        "LBNHC:3 LBHNC:3 BLNHC:1 BLHNC:1 BHLNC:1 LHBNC:6",
    ),
    "triton int4 with scales": (
        lambda: uniform("TRITON_ATTN", quantized("int4_per_token_head")),
        "LBNHC:3 LBHNC:3 BLNHC:1 BLHNC:1 BHLNC:1 LHBNC:6",
    ),
    "flex attention": (lambda: uniform("FLEX_ATTENTION", attention()), "LBNHC:3"),
    "turboquant": (lambda: uniform("TURBOQUANT", quantized("turboquant_k8v4", head_size=128)), "LBNHC:3"),
    "split K and V (ROCm)": (lambda: uniform("ROCM_ATTN", attention()), "LHBNC:6 LBHNC:3"),
    "split K and V (B12X)": (lambda: uniform("B12X", attention(64)), "LBHNC:3 BLHNC:1"),
    "cpu": (lambda: uniform("CPU_ATTN", attention()), "LBHNC:3"),
    "mla": (lambda: uniform("TRITON_MLA", latent()), ANY_LATENT),
    "mla fp8": (lambda: uniform("TRITON_MLA", latent("fp8")), ANY_LATENT),
    "mla, kernel blocks": (lambda: uniform("FLASHMLA", latent(block_size=256)), ANY_LATENT),
    "mla fp8_ds_mla": (lambda: uniform("FLASHMLA_SPARSE", latent("fp8_ds_mla")), ANY_LATENT),
    "mla with indexer": (lambda: sparse("auto"), MIXED_PAGES),
    "mla fp8_ds_mla with indexer": (lambda: sparse("fp8_ds_mla"), MIXED_PAGES),
    "mla nvfp4_ds_mla with indexer": (lambda: sparse("nvfp4_ds_mla"), MIXED_PAGES),
    "mla with indexer, kernel blocks": (lambda: sparse("auto", block_size=128), MIXED_PAGES),
}
"""Layers by name, and the layouts that their backends allow with the runs of a block in each: 0 where vLLM itself refuses the model."""
