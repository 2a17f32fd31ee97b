"""`kvoffload.connector.identity`: engines that differ in one thing have different namespaces; equal ones equal ones, anywhere."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from tests.connector.engines import make_kv_cache_config, make_vllm_config

from kvoffload.connector.identity import config_digest, namespace_items, plain
from kvoffload.errors import UnsupportedError
from kvoffload.namespace import namespace_digest
from kvoffload.testing.model import TINY, make_model

pytest.importorskip("vllm")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models"), TINY)


def _digest(config: Any, cache: Any = None, namespace: str = "", version: str | None = None) -> bytes:
    items, unidentified = namespace_items(config, cache or make_kv_cache_config(config), namespace, version)
    assert unidentified == []
    return namespace_digest(items)


@pytest.fixture(scope="module")
def usual(model: Path) -> bytes:
    return _digest(make_vllm_config(model))


def test_equal_engines_are_equal(model: Path, usual: bytes) -> None:
    assert _digest(make_vllm_config(model)) == usual


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_model_len": 1024},
        {"max_num_seqs": 3},
        {"max_num_batched_tokens": 64, "enable_chunked_prefill": True},
        {"enable_prefix_caching": False},
        {"seed": 7},
        {"served_model_name": "other"},
        {"num_gpu_blocks_override": 40},
        {"distributed_executor_backend": "mp"},
        {"prefix_caching_hash_algo": "sha256_cbor"},
        {"model_loader_extra_config": {"enable_multithread_load": True, "num_threads": 2}},
        {"safetensors_load_strategy": "eager"},
        {"kernel_config": {"enable_jit_warmup": False}},
    ],
)
def test_what_does_not_matter(model: Path, usual: bytes, arguments: dict[str, Any]) -> None:
    config = make_vllm_config(model, **arguments)
    assert _digest(config, make_kv_cache_config(config, blocks=33)) == usual


def test_where_the_files_are_does_not_matter(model: Path, usual: bytes, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(model, tmp_path / "copy")
    assert _digest(make_vllm_config(elsewhere)) == usual


def test_another_process_agrees(model: Path, usual: bytes) -> None:
    program = (
        "import sys; from tests.connector.engines import *; from kvoffload.connector.identity import namespace_items;"
        "from kvoffload.namespace import namespace_digest; config = make_vllm_config(sys.argv[1]);"
        "items, bad = namespace_items(config, make_kv_cache_config(config)); sys.stderr.write('=' + namespace_digest(items).hex())"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "PYTHONHASHSEED": "77"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(model)], env=environment, capture_output=True, text=True, timeout=110, check=True
    )
    assert done.stderr.rpartition("=")[2] == usual.hex()


@pytest.mark.parametrize(
    "arguments",
    [
        {"dtype": "float32"},
        {"kv_cache_dtype": "fp8"},
        {"block_size": 64},
        {"hf_overrides": {"rope_theta": 5000.0}},
        {"hf_overrides": {"rms_norm_eps": 1e-6}},
        {"hf_overrides": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}},
        {"quantization": "fp8_per_tensor"},
        {"model_impl": "transformers"},
        {"enable_lora": True},
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"code_revision": "abc"},
        {"attention_backend": "FLASH_ATTN"},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        {"additional_config": {"a": 1}},
        {"kv_cache_dtype_skip_layers": ["0"]},
        {"load_format": "hf"},
        {"load_format": "pt"},
        {"load_format": "mistral"},
        {"load_format": "sharded_state"},
        {"ignore_patterns": ["*.bin"]},
        {"safetensors_load_strategy": "torchao"},
        {"linear_backend": "triton"},
        {"moe_backend": "triton"},
    ],
)
def test_one_engine_argument(model: Path, usual: bytes, arguments: dict[str, Any]) -> None:
    assert _digest(make_vllm_config(model, **arguments)) != usual


@pytest.mark.parametrize(
    "setting", ["enable_mixed_moe_lora_format", "enable_moe_shared_loras", "enable_tower_connector_lora", "target_modules"]
)
def test_one_setting_of_adapters(model: Path, setting: str) -> None:
    usual = make_vllm_config(model, enable_lora=True)
    other = copy.deepcopy(usual)
    setattr(other.lora_config, setting, ["q_proj", "k_proj"] if setting == "target_modules" else True)
    assert _digest(other) != _digest(usual)


def test_a_models_own_code(model: Path) -> None:
    config = copy.deepcopy(make_vllm_config(model))
    config.model_config.hf_config.auto_map = {"AutoConfig": "configuration.Config"}
    without = _digest(config)
    config.model_config.trust_remote_code = True
    assert _digest(config) != without


@pytest.fixture
def of_outside(model: Path) -> Iterator[Callable[[str], Any]]:
    """An engine whose model is implemented as ``module:class`` says, which no vLLM brings."""
    from vllm import ModelRegistry

    def make(where: str) -> Any:
        ModelRegistry.register_model("OfOutside", where)
        config = copy.deepcopy(make_vllm_config(model))
        config.model_config._model_info = replace(config.model_config._model_info, architecture="OfOutside")
        return config

    yield make
    ModelRegistry.models.pop("OfOutside", None)


def test_an_implementation_from_outside_vllm(usual: bytes, of_outside: Callable[[str], Any]) -> None:
    """Plugins may replace vLLM's own; their packages' versions tell them apart."""
    found = {_digest(of_outside(where)) for where in ("pytest.models:One", "pytest.models:Two", "numpy.models:One")}
    assert len(found | {usual}) == 4


def test_an_implementation_of_no_package(of_outside: Callable[[str], Any]) -> None:
    config = of_outside("no_package_of_this_name:Model")
    [reason] = namespace_items(config, make_kv_cache_config(config))[1]
    assert "no_package_of_this_name" in reason


def test_a_prefix_cache_that_is_off_may_have_any_hash(model: Path, usual: bytes) -> None:
    assert _digest(make_vllm_config(model, enable_prefix_caching=False, prefix_caching_hash_algo="xxhash")) == usual


def test_the_longest_prompt_matters_with_scaled_positions(model: Path) -> None:
    scaled = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    short = make_vllm_config(model, hf_overrides=scaled, max_model_len=512)
    long = make_vllm_config(model, hf_overrides=scaled, max_model_len=1024)
    assert _digest(short) != _digest(long)


@pytest.mark.parametrize("field", [{"head_size": 64}, {"num_kv_heads": 1}, {"page_size_padded": 1 << 20}, {"block_size": 96}])
def test_one_field_of_the_cache(model: Path, usual: bytes, field: dict[str, Any]) -> None:
    config = make_vllm_config(model)
    assert _digest(config, make_kv_cache_config(config, **field)) != usual


def test_layers_and_layout(model: Path, usual: bytes) -> None:
    config = make_vllm_config(model)
    cache = make_kv_cache_config(config)
    [group] = cache.kv_cache_groups
    assert _digest(config, replace(cache, kv_cache_layout="BLHNC")) != usual
    assert _digest(config, replace(cache, kv_cache_groups=[replace(group, layer_names=group.layer_names[:2])])) != usual
    assert _digest(config, replace(cache, kv_cache_groups=[replace(group, layer_names=group.layer_names[::-1])])) != usual


def test_what_the_user_says(model: Path, usual: bytes) -> None:
    config = make_vllm_config(model)
    found = {
        usual,
        _digest(config, namespace="a"),
        _digest(config, version="a"),
        _digest(config, namespace="b"),
        _digest(config, version="b"),
    }
    assert len(found) == 5


def test_another_minor_version(model: Path, usual: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_vllm_config(model)
    monkeypatch.setattr("kvoffload.connector.compat.vllm_version", lambda: "0.32.7")
    assert _digest(config) == usual
    monkeypatch.setattr("kvoffload.connector.compat.vllm_version", lambda: "0.33.0")
    assert _digest(config) != usual


def test_another_instruction_set(model: Path, usual: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_vllm_config(model)
    monkeypatch.setattr("vllm.v1.attention.backends.cpu_attn._get_attn_isa", lambda *_: "amx")
    assert _digest(config) != usual


def _flip_weight(directory: Path) -> None:
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _append_weight(directory: Path) -> None:
    with (directory / "model.safetensors").open("ab") as file:
        file.write(b"\0")


def _second_file(directory: Path) -> None:
    shutil.copy(directory / "model.safetensors", directory / "another.safetensors")


def _quant_settings(directory: Path) -> None:
    (directory / "hf_quant_config.json").write_text("{}")


def _index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {}}')


def _image_processor(directory: Path) -> None:
    (directory / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')


def _processor(directory: Path) -> None:
    (directory / "processor_config.json").write_text("{}")


def _video_processor(directory: Path) -> None:
    (directory / "video_preprocessor_config.json").write_text("{}")


def _mistral_images(directory: Path) -> None:
    (directory / "tekken.json").write_text('{"image": {"max_image_size": 512}}')


def _second_encoder(directory: Path) -> None:
    (directory / "whisper-large-v3").mkdir()
    shutil.copy(directory / "model.safetensors", directory / "whisper-large-v3" / "model.safetensors")


def _other_config(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))


IN_THE_FILES = [
    _flip_weight,
    _append_weight,
    _second_file,
    _quant_settings,
    _index,
    _image_processor,
    _processor,
    _video_processor,
    _mistral_images,
    _second_encoder,
    _other_config,
]


@pytest.mark.parametrize("change", IN_THE_FILES)
def test_one_thing_in_the_files(model: Path, usual: bytes, tmp_path: Path, change: Callable[[Path], None]) -> None:
    directory = shutil.copytree(model, tmp_path / "copy")
    change(directory)
    assert _digest(make_vllm_config(directory)) != usual


def test_another_seed_is_another_model(usual: bytes, tmp_path: Path) -> None:
    assert _digest(make_vllm_config(make_model(tmp_path, replace(TINY, seed=21)))) != usual


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda config, empty: setattr(config.load_config, "load_format", "dummy"), "random"),
        (lambda config, empty: setattr(config.load_config, "load_format", "tensorizer"), "tensorizer"),
        (lambda config, empty: setattr(config.load_config, "load_format", "npcache"), "npcache"),
        (lambda config, empty: setattr(config.load_config, "model_loader_extra_config", {"pattern": "../{part}"}), "pattern"),
        (lambda config, empty: setattr(config.model_config.hf_config, "audio_model_id", "not/there"), "not/there"),
        (lambda config, empty: setattr(config.cache_config, "prefix_caching_hash_algo", "xxhash"), "xxhash"),
        (lambda config, empty: setattr(config.model_config, "model_weights", "s3://somewhere"), "local files"),
        (lambda config, empty: setattr(config.model_config, "model", "not/there"), "hub cache"),
        (lambda config, empty: setattr(config.model_config, "model", str(empty)), "no weights files"),
        (lambda config, empty: setattr(config, "weight_transfer_config", object()), "run time"),
        (lambda config, empty: setattr(config, "additional_config", {"x": object()}), "additional config"),
        (lambda config, empty: setattr(config.model_config.hf_config, "odd", object()), "model config"),
    ],
)
def test_what_cannot_be_identified_is_named(model: Path, tmp_path: Path, change: Callable[[Any, Path], None], word: str) -> None:
    config = copy.deepcopy(make_vllm_config(model))
    change(config, tmp_path)
    items, unidentified = namespace_items(config, make_kv_cache_config(config))
    assert any(word in reason for reason in unidentified)
    namespace_digest(items)  # the rest still makes a namespace


def test_the_origin_of_a_config_does_not_matter(model: Path) -> None:
    config = copy.deepcopy(make_vllm_config(model).model_config.hf_config)
    before = config_digest(config)
    config._name_or_path = "elsewhere"
    config.text_config = {"_name_or_path": "there", "x": [1]}
    with_text = config_digest(config)
    config.text_config = {"_name_or_path": "here", "x": [1]}
    assert config_digest(config) == with_text != before


class _Colour(Enum):
    RED = object()


@dataclass
class _Pair:
    left: int
    right: object


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        (1.5, 1.5),
        ("a", "a"),
        (b"\x01", "01"),
        (_Colour.RED, "RED"),
        (Fraction(1, 2), "1/2"),
        ({1: (2, 3)}, {"1": [2, 3]}),
        ({"b", "a"}, ["a", "b"]),
        (_Pair(1, {"x": None}), {"left": 1, "right": {"x": None}}),
    ],
)
def test_plain(value: object, expected: object) -> None:
    assert plain(value) == expected


def test_plain_refuses_what_others_would_not_share() -> None:
    with pytest.raises(UnsupportedError, match="type object"):
        plain({"a": [object()]})
