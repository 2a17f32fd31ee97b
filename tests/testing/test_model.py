"""`kvoffload.testing.model`: the same bytes every time, and a tokenizer that a person can read."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from kvoffload.errors import MisuseError
from kvoffload.testing.model import BENCH, R8, SHAPES, TINY, make_model, vocabulary

pytest.importorskip("safetensors")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("torch")


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    first, second = make_model(tmp_path / "a"), make_model(tmp_path / "b")
    names = sorted(file.name for file in first.iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_made_once(tmp_path: Path) -> None:
    first = make_model(tmp_path)
    before = (first / "config.json").stat().st_mtime_ns
    assert make_model(tmp_path) == first
    assert (first / "config.json").stat().st_mtime_ns == before


def test_asked_for_by_several_at_once(tmp_path: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(make_model(tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert len(found) == 3
    assert list(tmp_path.iterdir()) == [found[0]]


def test_other_models_are_elsewhere(tmp_path: Path) -> None:
    paths = {make_model(tmp_path, shape) for shape in (TINY, replace(TINY, seed=1), replace(TINY, dtype="float32"))}
    assert len(paths) == 3
    assert len({(path / "model.safetensors").read_bytes() for path in paths}) == 3


@pytest.mark.parametrize("shape", [replace(TINY, heads=3), replace(TINY, kv_heads=3), replace(TINY, vocab_size=100)])
def test_impossible_shapes(tmp_path: Path, shape: object) -> None:
    with pytest.raises(MisuseError, match="tiny"):
        make_model(tmp_path, shape)  # type: ignore[arg-type]


def test_one_word_is_one_token(tmp_path: Path) -> None:
    path = make_model(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    text = "the water is still here and bibo said so"
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.split())
    assert tokenizer.decode(ids) == text
    assert tokenizer.get_vocab_size() == TINY.vocab_size == json.loads((path / "config.json").read_text())["vocab_size"]
    assert tokenizer.decode(tokenizer.encode("unheard-of").ids, skip_special_tokens=False) == "<unk>"


def test_vocabulary_has_no_word_twice() -> None:
    assert len(set(vocabulary(30_000))) == 30_000


def test_kv_bytes() -> None:
    assert (TINY.kv_bytes_per_token, R8.kv_bytes_per_token, BENCH.kv_bytes_per_token) == (768, 8192, 8192)
    assert sorted(SHAPES) == ["bench", "r8", "tiny"]
