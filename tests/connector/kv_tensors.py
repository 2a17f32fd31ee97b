"""KV tensors as vLLM 0.32 makes them for a model, by its own functions, in the order in which its GPU runners call them."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch


class _Anything(ModuleType):
    """A package that is not here: vLLM's class is imported with it, and none of it is called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def backend(name: str) -> Any:
    """The class of one of vLLM's attention backends. FlashInfer's own package, which needs a GPU, is stood in for while importing."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if name == "INDEXER":
        return importlib.import_module("vllm.v1.attention.backends.mla.indexer").DeepseekV32IndexerBackend
    before = set(sys.modules)
    stood_in = [part for part in ("flashinfer", "flashinfer.decode", "flashinfer.prefill", "flashinfer.utils") if part not in before]
    if name.startswith("FLASHINFER"):
        sys.modules.update({part: _Anything(part) for part in stood_in})
    try:
        return AttentionBackendEnum[name].get_class()
    finally:
        for part in set(sys.modules) - before:
            if "flashinfer" in part:
                del sys.modules[part]


@dataclass
class Cache:
    """What one worker is given: vLLM's description, and the tensors that it hands to `register_kv_caches`."""

    config: Any
    tensors: dict[str, torch.Tensor]
    kernel_block_sizes: list[int]

    @property
    def memory(self) -> torch.Tensor:
        """All bytes of the allocation."""
        storage = next(iter(self.tensors.values())).untyped_storage()
        return torch.empty(0, dtype=torch.uint8).set_(storage)

    def page(self, name: str, block: int) -> torch.Tensor:
        """The bytes of one layer's block by vLLM's description alone, where a page is one stretch; a view of the memory."""
        [tensor] = [tensor for tensor in self.config.kv_cache_tensors if name in tensor.layers]
        spec = self.spec(name)
        start = tensor.offset + tensor.layers.index(name) * tensor.layer_stride + block * tensor.block_stride
        return self.memory[start : start + spec.num_heads * spec.num_states * spec.state_content_size_bytes]

    def spec(self, name: str) -> Any:
        [group] = self.config.kv_cache_groups
        return getattr(group.kv_cache_spec, "kv_cache_specs", {}).get(name, group.kv_cache_spec)


class Engine:
    """Makes caches of a `VllmConfig`; the model in it does not matter, only its settings do."""

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config = vllm_config

    def layouts(self, backends: Sequence[Any]) -> list[str]:
        """All that vLLM might choose for an engine with these backends."""
        from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts

        return [layout.name for layout in get_supported_kv_cache_layouts(backends)]

    def cache(self, layers: Mapping[str, tuple[Any, Any]], layout: str, blocks: int) -> Cache:
        """``layers``: backend class and spec by layer name. What an engine core and a worker do from specs to registered tensors."""
        from vllm.v1.attention.backends.utils import record_kv_cache_layout, resolve_kv_cache_layout
        from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_kv_cache_groups
        from vllm.v1.worker.utils import AttentionGroup, allocate_kv_cache, customize_attention_spec, prepare_kernel_block_sizes

        specs = {name: customize_attention_spec(kind, spec) for name, (kind, spec) in layers.items()}
        config = copy.deepcopy(self.vllm_config)
        config.cache_config.num_gpu_blocks_override = blocks
        record_kv_cache_layout(config.cache_config, layout)
        resolved = resolve_kv_cache_layout(config, [[layout]], specs.values())
        made = get_kv_cache_config_from_groups(config, get_kv_cache_groups(config, specs), 1 << 30)
        made.kv_cache_layout = config.cache_config.kv_cache_layout
        groups = [_attention_groups(number, group, layers, specs, AttentionGroup) for number, group in enumerate(made.kv_cache_groups)]
        sizes = prepare_kernel_block_sizes(made, groups)
        return Cache(made, allocate_kv_cache(made, torch.device("cpu"), resolved, sizes), sizes)


def _attention_groups(number: int, group: Any, layers: Mapping[str, tuple[Any, Any]], specs: Mapping[str, Any], kind: Any) -> list[Any]:
    """As ``initialize_attn_backend``: one for each backend and spec."""
    found: dict[Any, Any] = {}
    for name in group.layer_names:
        key = layers[name][0].full_cls_name(), specs[name]
        found.setdefault(key, kind(layers[name][0], [], specs[name], number)).layer_names.append(name)
    return list(found.values())
