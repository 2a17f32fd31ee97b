"""What of vLLM's environment variables and kernel settings decides the bytes of KV.

vLLM 0.32 has some 280 variables. Those are counted that change how weights or activations are quantised, which experts see a token,
which implementation of a layer runs, how KV lies in a page, or what is read of a media file. Those are not that change the order of
the same operations (as another batch does), or nothing between tokens and KV.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from kvoffload.connector.plain import plain
from kvoffload.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

COUNTED: Final = tuple(
    """
    VLLM_B12X_MOE_FP4_FORCE_A16 VLLM_BATCH_INVARIANT VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER VLLM_CPU_INT4_W4A8
    VLLM_DEEPEPLL_NVFP4_DISPATCH VLLM_DEEPEP_V2_ALLOW_MULTIPLE_REDUCTION VLLM_DISABLED_KERNELS
    VLLM_DISABLE_DSV4_MEGAMOE_SHARED_EXPERT_FUSION VLLM_ENABLE_FLA_PACKED_RECURRENT_DECODE VLLM_ENABLE_HPC_OPS
    VLLM_FLASHINFER_MOE_A2A_LOW_PRECISION_COMBINE VLLM_FLOAT32_MATMUL_PRECISION VLLM_GDN_DECODE_KERNEL
    VLLM_HUMMING_INPUT_QUANT_CONFIG VLLM_HUMMING_MOE_GEMM_TYPE VLLM_HUMMING_ONLINE_QUANT_CONFIG VLLM_HUMMING_USE_F16_ACCUM
    VLLM_KIMI_K3_AUX_ATTN_RES_STREAM VLLM_MARLIN_INPUT_DTYPE VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE VLLM_MEDIA_CONNECTOR
    VLLM_MLA_DISABLE VLLM_MOE_USE_DEEP_GEMM VLLM_MXFP4_EMULATION_DEQUANT_AT_LOAD VLLM_MXFP8_EMULATION_DEQUANT_AT_LOAD
    VLLM_PLUGINS VLLM_PP_LAYER_PARTITION VLLM_ROCM_AITER_MEGA_MOE_FUSE_SHARED_EXPERTS VLLM_ROCM_AITER_MLA_ASM_PADDING
    VLLM_ROCM_AITER_MLA_DCP_VERIFY VLLM_ROCM_FP8_MFMA_PAGE_ATTN VLLM_ROCM_MONO_DECODE VLLM_ROCM_QUICK_REDUCE_CAST_BF16_TO_FP16
    VLLM_ROCM_QUICK_REDUCE_MAX_SIZE_BYTES_MB VLLM_ROCM_QUICK_REDUCE_MIN_SIZE_BYTES_MB VLLM_ROCM_QUICK_REDUCE_QUANTIZATION
    VLLM_ROCM_QUICK_REDUCE_QUANTIZATION_MIN_SIZE_KB VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT VLLM_ROCM_USE_AITER
    VLLM_ROCM_USE_AITER_FP4BMM VLLM_ROCM_USE_AITER_FP4_ASM_GEMM VLLM_ROCM_USE_AITER_FP8BMM
    VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS VLLM_ROCM_USE_AITER_LINEAR VLLM_ROCM_USE_AITER_LINEAR_HIPBMM
    VLLM_ROCM_USE_AITER_MHA VLLM_ROCM_USE_AITER_MLA VLLM_ROCM_USE_AITER_MOE VLLM_ROCM_USE_AITER_MOE_A4W4_DSV4
    VLLM_ROCM_USE_AITER_MOE_SITUV2 VLLM_ROCM_USE_AITER_RMSNORM VLLM_ROCM_USE_AITER_TRITON_GEMM VLLM_ROCM_USE_AITER_TRITON_ROPE
    VLLM_ROCM_USE_AITER_TRITON_SPARSE_MLA VLLM_ROCM_USE_AITER_UNIFIED_ATTENTION VLLM_ROCM_USE_SKINNY_GEMM
    VLLM_SSM_CONV_STATE_LAYOUT VLLM_USE_DEEP_GEMM VLLM_USE_DEEP_GEMM_E8M0 VLLM_USE_DEEP_GEMM_TMA_ALIGNED_SCALES
    VLLM_USE_FLASHINFER_MOE_INT4 VLLM_USE_FUSED_MOE_GROUPED_TOPK VLLM_USE_HW_AGNOSTIC VLLM_USE_OINK_OPS VLLM_USE_TRITON_AWQ
    VLLM_VIDEO_LOADER_BACKEND VLLM_XPU_INC_WNA16_BACKEND
    """.split()  # noqa: SIM905
)

_SETS = ("VLLM_DISABLED_KERNELS", "VLLM_PLUGINS")
"""Lists whose order says nothing."""

_WARM_UP = frozenset(
    "enable_flashinfer_autotune enable_rocm_segmented_attn_autotune enable_cutedsl_warmup enable_jit_warmup".split()  # noqa: SIM905
)


def variables() -> dict[str, Any]:
    """The values in force of the variables that count, defaults included. Raises UnsupportedError.

    Read as vLLM reads them: a setting given as a file is its content.
    """
    from vllm import envs

    found = {}
    for name in COUNTED:
        if name in envs.environment_variables:
            found[name] = _value(envs, name)
    strategy = _value(envs, "VLLM_MOE_ROUTING_SIMULATION_STRATEGY")
    if strategy:
        raise UnsupportedError(f"the experts are simulated (VLLM_MOE_ROUTING_SIMULATION_STRATEGY is {strategy})")
    return found


def kernels(vllm_config: VllmConfig) -> dict[str, Any]:
    """The kernels chosen for layers, but not how they are warmed up. Raises UnsupportedError."""
    settings: dict[str, Any] = plain(vllm_config.kernel_config)
    return {name: value for name, value in settings.items() if name not in _WARM_UP}


def _value(envs: Any, name: str) -> Any:
    try:
        value = plain(getattr(envs, name))
    except Exception as error:  # a variable's reader may raise anything: its text is the user's
        raise UnsupportedError(f"{name} cannot be read: {error}") from error
    return sorted(value) if name in _SETS and value is not None else value
