"""`kvoffload.connector.identity` of multimodal models: what the encoder makes of the same item."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.connector.engines import make_kv_cache_config, make_vllm_config

from kvoffload.connector.identity import namespace_items
from kvoffload.namespace import namespace_digest
from kvoffload.testing.model import TINY, make_model

pytest.importorskip("vllm")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models"), TINY)


def _config(model: Path, **multimodal: Any) -> Any:
    from vllm.config.multimodal import MultiModalConfig

    config = copy.deepcopy(make_vllm_config(model))
    config.model_config.multimodal_config = MultiModalConfig(**multimodal)
    return config


def _digest(config: Any) -> bytes:
    items, unidentified = namespace_items(config, make_kv_cache_config(config))
    assert unidentified == []
    return namespace_digest(items)


def _why_not(config: Any) -> str:
    [reason] = namespace_items(config, make_kv_cache_config(config))[1]
    return str(reason)


def _scales(path: Path, value: float) -> str:
    path.write_text(json.dumps({"blocks.0.attn": {"q": value, "k": value, "v": value}}))
    return str(path)


def test_items_without_hashes(model: Path) -> None:
    config = _config(model)
    usual = _digest(config)
    config.model_config.multimodal_config.mm_processor_cache_gb = 0
    assert _digest(config) == usual  # prefix caching asks for hashes
    config.cache_config.enable_prefix_caching = False
    assert "no hashes" in _why_not(config)


@pytest.mark.parametrize(
    "setting",
    [
        {"mm_processor_kwargs": {"num_crops": 4}},
        {"media_io_kwargs": {"video": {"num_frames": 4}}},
        {"video_pruning_rate": 0.5},
        {"video_pruning_rate": 0.5, "video_pruning_method": "vidcom2"},
        {"mm_encoder_attn_backend": "TORCH_SDPA"},
        {"mm_device_do_normalize": False},
        {"interleave_mm_strings": True},
        {"language_model_only": True},
    ],
)
def test_one_setting(model: Path, setting: dict[str, Any]) -> None:
    assert _digest(_config(model, **setting)) != _digest(_config(model))


def test_the_scales_of_the_encoder_are_its_files(model: Path, tmp_path: Path) -> None:
    one, same, other = _scales(tmp_path / "a.json", 0.5), _scales(tmp_path / "b.json", 0.5), _scales(tmp_path / "c.json", 0.25)
    first, second, third = (_digest(_config(model, mm_encoder_attn_dtype="fp8", mm_encoder_fp8_scale_path=it)) for it in (one, same, other))
    assert first == second
    assert len({first, third, _digest(_config(model))}) == 3


def test_scales_that_follow_what_was_seen(model: Path) -> None:
    assert "mm_encoder_fp8_scale_path" in _why_not(_config(model, mm_encoder_attn_dtype="fp8"))


def test_scales_that_are_gone(model: Path, tmp_path: Path) -> None:
    config = _config(model, mm_encoder_attn_dtype="fp8", mm_encoder_fp8_scale_path=_scales(tmp_path / "a.json", 0.5))
    (tmp_path / "a.json").unlink()
    assert "a.json" in _why_not(config)


def test_the_library_that_processes_items(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, images = _digest(make_vllm_config(model)), _digest(_config(model))
    monkeypatch.setattr("transformers.__version__", "99.0.0")
    assert _digest(make_vllm_config(model)) == text
    assert _digest(_config(model)) != images


def test_items_that_another_engine_encodes(model: Path) -> None:
    """Its weights and settings are not known here."""
    from vllm.config.ec_transfer import ECTransferConfig

    config = _config(model)
    usual = _digest(config)
    config.ec_transfer_config = ECTransferConfig(ec_connector="ECExampleConnector", ec_role="ec_producer")
    assert _digest(config) == usual
    config.ec_transfer_config = ECTransferConfig(ec_connector="ECExampleConnector", ec_role="ec_consumer")
    assert "ec_transfer_config" in _why_not(config)


def test_processors_of_the_repositorys_own(model: Path) -> None:
    usual = _digest(_config(model))
    config = _config(model)
    config.model_config.trust_remote_code = True
    assert _digest(config) != usual


def test_a_tokenizer_from_elsewhere(model: Path, tmp_path: Path) -> None:
    """Mistral's tokenizers process images too."""
    usual = _digest(_config(model))
    config = _config(model)
    config.model_config.tokenizer = str(shutil.copytree(model, tmp_path / "tokenizer"))
    same_elsewhere = _digest(config)
    (tmp_path / "tokenizer" / "tekken.json").write_text("{}")
    assert len({usual, same_elsewhere, _digest(config)}) == 3
    config.model_config.tokenizer = "not/there"
    assert "tokenizer" in _why_not(config)
