"""`kvoffload.connector.weights`: what a fingerprint sees of a file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvoffload.connector import weights

safetensors = pytest.importorskip("safetensors.numpy")
import numpy as np  # noqa: E402

PATTERN = np.arange(5000, dtype=np.float32)


def _save(path: Path, **changes: np.ndarray) -> Path:
    safetensors.save_file({"first": PATTERN, "second": PATTERN * 2, "scale": np.ones(1, np.float32), **changes}, path)
    return path


def _changed(index: int) -> np.ndarray:
    copy = PATTERN * 2
    copy[index] += 1
    return copy


def test_equal_files_are_equal(tmp_path: Path) -> None:
    assert weights.fingerprint_file(_save(tmp_path / "a.safetensors")) == weights.fingerprint_file(_save(tmp_path / "b.safetensors"))


@pytest.mark.parametrize("index", [0, 2500, 4999])
def test_every_tensor_is_sampled_at_start_middle_and_end(tmp_path: Path, index: int) -> None:
    usual = weights.fingerprint_file(_save(tmp_path / "a.safetensors"))
    assert weights.fingerprint_file(_save(tmp_path / "b.safetensors", second=_changed(index))) != usual


def test_small_tensors_are_read_whole(tmp_path: Path) -> None:
    usual = weights.fingerprint_file(_save(tmp_path / "a.safetensors", scale=np.zeros(500, np.float32)))
    for index in range(0, 500, 83):
        scale = np.zeros(500, np.float32)
        scale[index] = 1
        assert weights.fingerprint_file(_save(tmp_path / "b.safetensors", scale=scale)) != usual


def test_names_and_shapes_count(tmp_path: Path) -> None:
    usual = weights.fingerprint_file(_save(tmp_path / "a.safetensors"))
    assert weights.fingerprint_file(_save(tmp_path / "b.safetensors", second=(PATTERN * 2).reshape(50, 100))) != usual
    safetensors.save_file({"first": PATTERN, "third": PATTERN * 2, "scale": np.ones(1, np.float32)}, tmp_path / "c.safetensors")
    assert weights.fingerprint_file(tmp_path / "c.safetensors") != usual


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 8 + b"no header", bytes(8)])
def test_a_malformed_header_is_just_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    usual = weights.fingerprint_file(path)
    path.write_bytes(content + b"!")
    assert weights.fingerprint_file(path) != usual


def test_other_formats_are_sampled_evenly(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    content = bytearray(os.urandom(1 << 20))
    path.write_bytes(content)
    usual = weights.fingerprint_file(path)
    for index in (0, (1 << 19) + 1, (1 << 20) - 1):
        content[index] ^= 1
        path.write_bytes(content)
        assert weights.fingerprint_file(path) != usual
        content[index] ^= 1


def test_directories(tmp_path: Path) -> None:
    assert weights.fingerprint_directory(tmp_path) is None
    _save(tmp_path / "a.safetensors")
    usual = weights.fingerprint_directory(tmp_path)
    (tmp_path / "README.md").write_text("nothing to do with it")
    (tmp_path / "code.py").write_text("x = 1")
    assert weights.fingerprint_directory(tmp_path) == usual
    with_code = weights.fingerprint_directory(tmp_path, with_code=True)
    assert with_code != usual
    (tmp_path / "code.py").write_text("x = 2")
    assert weights.fingerprint_directory(tmp_path, with_code=True) != with_code
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    assert weights.fingerprint_directory(tmp_path) != usual


@pytest.mark.parametrize(
    "name",
    [
        *("model.safetensors.index.json", "consolidated.safetensors.index.json", "quantization_config.json"),
        *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "tekken.json"),
    ],
)
def test_settings_count_whole(tmp_path: Path, name: str) -> None:
    _save(tmp_path / "a.safetensors")
    without = weights.fingerprint_settings(tmp_path)
    found = set()
    for content in ("{}", '{"a": 1}'):
        (tmp_path / name).write_text(content)
        found.add((weights.fingerprint_directory(tmp_path), weights.fingerprint_settings(tmp_path)))
    assert len({whole for whole, _ in found}) == 2
    assert len({settings for _, settings in found} | {without}) == 3


def test_tokenizers_and_templates_do_not_count(tmp_path: Path) -> None:
    """Tokens are in the keys."""
    _save(tmp_path / "a.safetensors")
    usual = weights.fingerprint_directory(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (tmp_path / name).write_text("{}")
    assert weights.fingerprint_directory(tmp_path) == usual


@pytest.mark.parametrize(
    ("load_format", "names"),
    [
        ("auto", ["consolidated.safetensors", "model.safetensors.index.json"]),
        ("mistral", ["consolidated.safetensors", "model.safetensors.index.json"]),
        ("hf", ["consolidated.safetensors", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"]),
        ("pt", ["old.pt", "model.safetensors.index.json"]),
        ("gguf", ["consolidated.safetensors", "model-1.safetensors", "model-2.safetensors", "old.bin", "old.pt"]),
    ],
)
def test_the_files_that_a_format_chooses(tmp_path: Path, load_format: str, names: list[str]) -> None:
    for name in ("model-1.safetensors", "model-2.safetensors", "consolidated.safetensors", "old.bin", "old.pt", "readme.md"):
        (tmp_path / name).touch()
    (tmp_path / "model.safetensors.index.json").touch()
    assert weights.chosen_names(tmp_path, load_format) == names


def test_older_files_are_chosen_where_there_are_no_others(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    assert [weights.chosen_names(tmp_path, it) for it in ("auto", "hf")] == [["pytorch_model.bin"]] * 2


def test_whole_digest_and_signature(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(bytes(3 << 20))
    digest, signature = weights.digest_whole(tmp_path), weights.signature(tmp_path)
    assert (weights.digest_whole(tmp_path), weights.signature(tmp_path)) == (digest, signature)
    with path.open("r+b") as file:
        file.seek(2_345_678)
        file.write(b"\1")
    assert weights.digest_whole(tmp_path) != digest
    assert weights.signature(tmp_path) != signature
    with pytest.raises(OSError, match="absent"):
        weights.signature(tmp_path / "absent")


def test_no_commit_without_a_copy(tmp_path: Path) -> None:
    assert weights.hub_commit("some/model", None, str(tmp_path)) is None
    assert weights.hub_commit("no repository at all", None, str(tmp_path)) is None
