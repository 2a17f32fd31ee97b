"""What differs between vLLM's versions and platforms, in one place: nothing else in kvoffload asks for a version.

Nothing of vLLM is imported at module level: the connector class is imported in the API server too, and must stay cheap there.
"""

from __future__ import annotations

import platform as machine
import re
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from kvoffload.errors import LayoutError, UnsupportedError

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

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


class Placement(NamedTuple):
    """Where vLLM says that a layer's blocks are, in bytes of the one allocation that holds all layers."""

    offset: int
    """Of block 0."""
    block_stride: int
    block_bytes: int
    """Of a block that hold KV: its padding is not counted."""


def placements(kv_cache_config: KVCacheConfig) -> dict[str, Placement]:
    """Of each layer (vLLM tells it since 0.29). Raises LayoutError where it tells of a cache that kvoffload does not know."""
    from vllm.v1.kv_cache_interface import compute_layer_kv_cache_shape_bytes

    specs = {name: group.kv_cache_spec for group in kv_cache_config.kv_cache_groups for name in group.layer_names}
    found = {}
    for tensor in kv_cache_config.kv_cache_tensors:
        for number, name in enumerate(tensor.layers):
            spec = specs.get(name)
            spec = getattr(spec, "kv_cache_specs", {name: spec}).get(name)
            if spec is None or tensor.host_resident or not spec.has_layer_views:
                raise LayoutError(f"layer {name}: vLLM keeps its KV in a way that is not known")
            page = prod(compute_layer_kv_cache_shape_bytes(spec, 1)[1:])
            found[name] = Placement(tensor.offset + number * tensor.layer_stride, tensor.block_stride, page)
    return found


def check_placement(kv_caches: Mapping[str, torch.Tensor], kv_cache_config: KVCacheConfig) -> None:
    """Raise LayoutError unless the tensors are where vLLM's own description says, with their blocks as it says.

    A layer that shares the tensor of another may be told of once. Nothing is checked where vLLM describes nothing.
    """
    told = placements(kv_cache_config)
    if not told:
        return
    if missing := sorted(told.keys() - kv_caches.keys()):
        raise LayoutError(f"layer {missing[0]}: vLLM tells of its KV and gave no tensor of it")
    known = {(kv_caches[name].data_ptr(), tuple(kv_caches[name].shape), kv_caches[name].stride()) for name in told}
    for name, tensor in kv_caches.items():
        if name not in told:
            if (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) not in known:
                raise LayoutError(f"layer {name}: vLLM gave a tensor of it and does not tell where its KV is")
            continue
        rows, rest = divmod(tensor.shape[0], kv_cache_config.num_blocks)
        size = tensor.element_size()
        found = Placement(
            tensor.data_ptr() - tensor.untyped_storage().data_ptr(),
            tensor.stride(0) * size * rows,
            prod(tensor.shape[1:]) * size * rows,
        )
        if rest or found != told[name]:
            raise LayoutError(f"layer {name}: its KV is not where vLLM tells: told {told[name]}, found {found} in {tensor.shape[0]} rows")


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
