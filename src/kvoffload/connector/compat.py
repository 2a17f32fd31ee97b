"""What differs between vLLM's versions and platforms, in one place: nothing else in kvoffload asks for a version.

Nothing of vLLM is imported at module level: the connector class is imported in the API server too, and must stay cheap there.
"""

from __future__ import annotations

import platform as machine
import re
from typing import TYPE_CHECKING, Any

from kvoffload.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SUPPORTED = ((0, 32),)
"""Minor versions of vLLM whose hooks were read and run against; any patch release of them is taken. Made to grow."""


def vllm_version() -> str:
    """The version of the vLLM that is installed, such as ``0.32.0+cpu``."""
    import vllm

    return str(vllm.__version__)


def minor_version(version: str) -> tuple[int, int] | None:
    """``(0, 32)`` of ``0.32.0+cpu``; None of what is not a release or release candidate (a development build)."""
    found = re.match(r"(\d+)\.(\d+)\.\d+(?:rc\d+|\.post\d+)?(?:\+[\w.]+)?$", version)
    return (int(found[1]), int(found[2])) if found else None


def check_version(version: str | None = None) -> str | None:
    """Why this vLLM (the installed one, unless ``version`` is given) cannot be served, or None."""
    version = vllm_version() if version is None else version
    if minor_version(version) in SUPPORTED:
        return None
    names = ", ".join(f"{major}.{minor}.x" for major, minor in SUPPORTED)
    return f"vLLM {version} is not supported: this kvoffload was made for, and tested with, {names}"


def tells_of_sleep(version: str | None = None) -> bool:
    """Whether this vLLM tells connectors that the engine goes to sleep (its hooks came with 0.33)."""
    minor = minor_version(vllm_version() if version is None else version)
    return minor is not None and minor >= (0, 33)


def is_inside_multi_connector() -> bool:
    """Whether the worker half of this process is one of several connectors.

    MultiConnector gives each child a config that looks like the child's own, so only the group tells; it is set once the worker
    half is built, that is from `register_kv_caches` on.
    """
    from vllm.distributed.kv_transfer import kv_transfer_state

    group = getattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", None)
    return type(group).__name__ == "MultiConnector"


def attention_identity(vllm_config: VllmConfig, spec: Any) -> dict[str, str]:
    """What decides how K and V lie within a block page, beside the page's shape: device, attention backend, packing.

    ``spec`` is a layer's attention spec. The same in every process of an engine. Raises UnsupportedError where it cannot be told.
    """
    from vllm.platforms import current_platform

    found = {"device": str(current_platform.device_type), "machine": machine.machine()}
    if current_platform.is_cpu():
        return found | _cpu_packing(vllm_config, spec)
    capability = current_platform.get_device_capability()
    if capability is None:
        raise UnsupportedError(f"device {found['device']!r} does not tell its capability")
    return found | {"capability": capability.as_version_str(), "backend": _selected_backend(vllm_config, spec)}


def _cpu_packing(vllm_config: VllmConfig, spec: Any) -> dict[str, str]:
    """The CPU backend packs K and V by instruction set, which is also part of why two machines may not share blocks."""
    import torch
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    if isinstance(spec, MLAAttentionSpec):
        has_amx = torch.cpu._is_amx_tile_supported()
        return {"backend": "AMX_MLA" if has_amx else "CPU_MLA", "packing": "amx" if has_amx else "plain"}
    dtype = vllm_config.model_config.dtype
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedError(f"the model's dtype is not resolved: {dtype!r}")
    isa = _get_attn_isa(dtype, spec.block_size, spec.head_size, vllm_config.cache_config.cache_dtype)
    return {"backend": "CPU_ATTN", "packing": str(isa)}


def _selected_backend(vllm_config: VllmConfig, spec: Any) -> str:
    """The backend that vLLM selects for such a layer; not run on a GPU yet."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    chosen = vllm_config.attention_config.backend
    if chosen is not None:
        return str(chosen.name)
    try:
        with set_current_vllm_config(vllm_config):
            backend = get_attn_backend(
                spec.head_size,
                vllm_config.model_config.dtype,
                vllm_config.cache_config.cache_dtype,
                use_mla=isinstance(spec, MLAAttentionSpec),
            )
    except Exception as error:
        raise UnsupportedError(f"vLLM's choice of an attention backend cannot be told: {error}") from error
    return str(backend.get_name())
