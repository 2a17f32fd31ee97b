"""`kvoffload.connector.refusals`: one thing different from an engine that is served, each time, on vLLM's own config objects."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.connector.engines import CONNECTOR, make_kv_cache_config, make_vllm_config

from kvoffload.connector import compat
from kvoffload.connector.refusals import warnings, why_not
from kvoffload.testing.model import TINY, make_model

pytest.importorskip("vllm")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models"), TINY)


@pytest.fixture(scope="module")
def served(model: Path) -> tuple[Any, Any]:
    config = make_vllm_config(model)
    return config, make_kv_cache_config(config)


def test_the_plain_case_is_served(served: tuple[Any, Any]) -> None:
    assert why_not(*served) is None
    assert warnings(served[0]) == []


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is 2"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2"),
        ({"data_parallel_size": 2}, "data_parallel_size is 2"),
        ({"kv_transfer_config": {**CONNECTOR, "kv_role": "kv_producer"}}, "kv_producer"),
        ({"kv_transfer_config": {**CONNECTOR, "kv_role": "kv_consumer"}}, "kv_consumer"),
        ({"kv_transfer_config": {**CONNECTOR, "kv_connector_extra_config": {"connectors": []}}}, "MultiConnector"),
        ({"kv_transfer_config": None}, "no kv_transfer_config"),
        ({"runner": "pooling"}, "pooling"),
        ({"kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
        ({"kv_offloading_size": 1}, "kv_offloading_size"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}}, "ngram"),
    ],
)
def test_engine_arguments_refused(model: Path, served: tuple[Any, Any], arguments: dict[str, Any], word: str) -> None:
    reason = why_not(make_vllm_config(model, **arguments), served[1])
    assert reason is not None
    assert word in reason


def _set(path: str, value: object) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        *parents, name = path.split(".")
        for parent in parents:
            config = getattr(config, parent)
        object.__setattr__(config, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "word"),
    [
        # What vLLM itself does not let anyone ask for with this model or on this platform.
        (_set("parallel_config.decode_context_parallel_size", 2), "decode_context_parallel_size is 2"),
        (_set("parallel_config.prefill_context_parallel_size", 2), "prefill_context_parallel_size is 2"),
        (_set("parallel_config.nnodes", 2), "nnodes is 2"),
        (_set("parallel_config.enable_elastic_ep", True), "enable_elastic_ep"),
        (_set("model_config.enable_sleep_mode", True), "enable_sleep_mode"),
        (_set("model_config.is_encoder_decoder", True), "encoder-decoder"),
        (_set("model_config.hf_text_config.num_kv_shared_layers", 2), "2 layers share"),
        (_set("kv_transfer_config.kv_connector", "MultiConnector"), "MultiConnector"),
        (_set("diffusion_config", object()), "diffusion"),
    ],
)
def test_settings_refused(model: Path, served: tuple[Any, Any], change: Callable[[Any], None], word: str) -> None:
    config = copy.deepcopy(make_vllm_config(model))
    change(config)
    reason = why_not(config, served[1])
    assert reason is not None
    assert word in reason


def test_hybrid_model_refused(served: tuple[Any, Any]) -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, MambaSpec, SlidingWindowSpec

    config, cache = served
    [group] = cache.kv_cache_groups
    full: FullAttentionSpec = group.kv_cache_spec
    mamba = MambaSpec(block_size=32, shapes=((4, 4),), dtypes=(full.dtype,))
    window = SlidingWindowSpec(block_size=32, num_kv_heads=full.num_kv_heads, head_size=full.head_size, dtype=full.dtype, sliding_window=64)
    for other, word in ((mamba, "MambaSpec"), (window, "SlidingWindowSpec")):
        both = dataclasses.replace(cache, kv_cache_groups=[group, KVCacheGroupSpec(["other"], other)])
        reason = why_not(config, both)
        assert reason is not None
        assert "2 KV cache groups" in reason
        assert word in reason
        alone = why_not(config, dataclasses.replace(cache, kv_cache_groups=[KVCacheGroupSpec(["other"], other)]))
        assert alone is not None
        assert word in alone


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ({"sliding_window": 64}, "sliding window"),
        ({"attention_chunk_size": 64}, "chunked attention"),
        ({"non_causal": True}, "non_causal"),
        ({"tokens_per_state": 4}, "compressed"),
    ],
)
def test_full_attention_with_a_twist_refused(served: tuple[Any, Any], spec: dict[str, Any], word: str) -> None:
    reason = why_not(served[0], make_kv_cache_config(served[0], **spec))
    assert reason is not None
    assert word in reason


def test_groups_refused(served: tuple[Any, Any]) -> None:
    config, cache = served
    [group] = cache.kv_cache_groups
    for changed, word in (
        ([], "no KV cache"),
        ([dataclasses.replace(group, is_eagle_group=True)], "draft model"),
        ([dataclasses.replace(group, enable_kv_transfer=False)], "special role"),
        ([dataclasses.replace(group, host_resident=True)], "special role"),
    ):
        reason = why_not(config, dataclasses.replace(cache, kv_cache_groups=changed))
        assert reason is not None
        assert word in reason
    assert why_not(config, None) == "vLLM gave no kv_cache_config"


def test_latent_attention_and_uniform_groups_are_served(served: tuple[Any, Any]) -> None:
    """Their pages are opaque bytes; layers of one group may differ in size."""
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec, MLAAttentionSpec, UniformTypeKVCacheSpecs

    config, cache = served
    full = cache.kv_cache_groups[0].kv_cache_spec
    latent = MLAAttentionSpec(block_size=32, num_kv_heads=1, head_size=576, dtype=full.dtype)
    wide = dataclasses.replace(full, head_size=64)
    uniform = UniformTypeKVCacheSpecs(block_size=32, kv_cache_specs={"a": full, "b": wide})
    for spec in (latent, uniform):
        assert why_not(config, dataclasses.replace(cache, kv_cache_groups=[KVCacheGroupSpec(["a", "b"], spec)])) is None
    twisted = UniformTypeKVCacheSpecs(block_size=32, kv_cache_specs={"a": full, "b": dataclasses.replace(full, sliding_window=64)})
    assert "sliding" in str(why_not(config, dataclasses.replace(cache, kv_cache_groups=[KVCacheGroupSpec(["a", "b"], twisted)])))


def test_every_reason_is_told(model: Path, served: tuple[Any, Any]) -> None:
    config = make_vllm_config(model, tensor_parallel_size=2, kv_transfer_config={**CONNECTOR, "kv_role": "kv_producer"})
    reason = why_not(config, None)
    assert reason is not None
    assert reason.count("; ") == 2


def test_version_comes_first(served: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "SUPPORTED", ((0, 1),))
    assert "0.1.x" in str(why_not(*served))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"kv_transfer_config": {**CONNECTOR, "kv_load_failure_policy": "fail"}}, 'finish_reason "error"'),
        ({"enable_prefix_caching": False}, "prefix caching is off"),
    ],
)
def test_warnings_say_what_would_happen(model: Path, served: tuple[Any, Any], arguments: dict[str, Any], word: str) -> None:
    config = make_vllm_config(model, **arguments)
    [text] = warnings(config)
    assert word in text
    assert why_not(config, served[1]) is None


def test_the_default_policy_is_warned_of(model: Path) -> None:
    transfer = {name: value for name, value in CONNECTOR.items() if name != "kv_load_failure_policy"}
    assert "recompute" in warnings(make_vllm_config(model, kv_transfer_config=transfer))[0]
