"""`kvoffload.connector.identity` of models that a hub names: a commit is what is in the repository, the files are what was loaded of it."""

from __future__ import annotations

import copy
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

FIRST, SECOND = "a" * 40, "b" * 40
NAME = "some/model"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models"), TINY)


@pytest.fixture
def cache(model: Path, tmp_path: Path) -> Path:
    """A hub's cache with two commits of one repository; main is the first."""
    repository = tmp_path / "models--some--model"
    for commit in (FIRST, SECOND):
        shutil.copytree(model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(FIRST)
    return tmp_path


def _config(model: Path, cache: Path, **load: Any) -> Any:
    config = copy.deepcopy(make_vllm_config(model))
    config.model_config.model, config.load_config.download_dir = NAME, str(cache)
    for name, value in load.items():
        setattr(config.load_config, name, value)
    return config


def _digest(config: Any) -> bytes:
    items, unidentified = namespace_items(config, make_kv_cache_config(config))
    assert unidentified == []
    return namespace_digest(items)


def _why_not(config: Any) -> str:
    [reason] = namespace_items(config, make_kv_cache_config(config))[1]
    return str(reason)


def test_the_commit_is_the_identity(model: Path, cache: Path) -> None:
    config = _config(model, cache)
    usual = _digest(config)
    assert _digest(_config(model, cache)) == usual
    config.model_config.revision = FIRST
    assert _digest(config) == usual
    config.model_config.revision = SECOND
    assert _digest(config) != usual


def test_where_the_cache_is_and_what_else_is_in_it_does_not_matter(model: Path, cache: Path, tmp_path: Path) -> None:
    usual = _digest(_config(model, cache))
    elsewhere = shutil.copytree(cache, tmp_path / "elsewhere")
    (elsewhere / "models--some--model" / "snapshots" / FIRST / "pytorch_model.bin").touch()
    (elsewhere / "models--some--model" / "snapshots" / FIRST / "README.md").touch()
    assert _digest(_config(model, elsewhere)) == usual


@pytest.mark.parametrize("name", ["another.safetensors", "consolidated.safetensors", "model.safetensors.index.json"])
def test_which_files_of_a_commit_are_loaded_matters(model: Path, cache: Path, name: str) -> None:
    usual = _digest(_config(model, cache))
    (cache / "models--some--model" / "snapshots" / FIRST / name).write_text("{}")
    assert _digest(_config(model, cache)) != usual


def test_how_they_are_loaded_matters(model: Path, cache: Path) -> None:
    (cache / "models--some--model" / "snapshots" / FIRST / "model.pt").touch()
    ways: list[dict[str, Any]] = [{}, {"load_format": "hf"}, {"load_format": "pt"}, {"ignore_patterns": ["*.bin"]}]
    assert len({_digest(_config(model, cache, **way)) for way in ways}) == len(ways)


def test_weights_from_another_hub(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, local = _config(model, cache), make_vllm_config(model)
    usual = _digest(local)
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "1")
    assert "ModelScope" in _why_not(config)
    assert _digest(local) == usual


@pytest.mark.parametrize(("revision", "commit"), [("main", FIRST), (SECOND, SECOND), ("c" * 40, "c" * 40), ("moved", None)])
def test_the_revision_of_a_models_code(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, revision: str, commit: str | None
) -> None:
    """It may be another than that of the weights, and a branch moves."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    config, named = _config(model, cache), _config(model, cache)
    config.model_config.code_revision, named.model_config.code_revision = revision, commit
    _digest(config)  # no code of the repository runs
    config.model_config.trust_remote_code = named.model_config.trust_remote_code = True
    if commit is None:
        assert "--code-revision" in _why_not(config)
    else:
        assert _digest(config) == _digest(named)


def test_two_revisions_of_a_models_code(model: Path, cache: Path) -> None:
    found = set()
    for revision in (None, FIRST, SECOND):
        config = _config(model, cache)
        config.model_config.trust_remote_code, config.model_config.code_revision = True, revision
        found.add(_digest(config))
    assert len(found) == 3


def test_a_tower_from_another_repository(model: Path, cache: Path) -> None:
    """Some models take theirs from a repository that their config names, at whatever its main branch is."""
    config = _config(model, cache)
    config.model_config.hf_config.audio_model_id = NAME
    usual = _digest(config)
    (cache / "models--some--model" / "refs" / "main").write_text(SECOND)
    config.model_config.revision = FIRST  # the weights beside it are the same ones
    assert _digest(config) != usual
