"""Telling models and adapters apart by their files, without reading all of a hundred gigabytes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_OF_SUBDIRECTORIES = ("whisper-large-v3/*.safetensors",)
"""The one place below a model's directory that vLLM takes weights from (Kimi-Audio)."""
_SETTINGS = ("*quant*.json", "*.index.json", "*processor*.json", "tekken.json")
"""How weights are quantised, which files are loaded, what is made of an image (Mistral's tokenizers do that themselves)."""
_CHOICES = {
    "hf": ("*.safetensors", "*.bin", "*.pt"),
    "pt": ("*.pt",),
    "mistral": ("consolidated*.safetensors",),
    **dict.fromkeys(("safetensors", "fastsafetensors", "instanttensor", "sharded_state"), ("*.safetensors",)),
}
"""vLLM loads the files of the first pattern that there are any of."""
_SAMPLE_BYTES = 256
_WHOLE_BYTES = 2048
"""A tensor up to this size is read whole: scales and biases are small, and decide much."""
_OPAQUE_SAMPLES = 2048
_HEADER_LIMIT = 100_000_000
"""The format's own limit for a safetensors header."""


def fingerprint_file(path: Path) -> bytes:
    """32 bytes of a weights file's size, header and samples: of every tensor of a safetensors file, evenly spread over any other.

    Two files that differ only between the samples look alike; a user who edits weights so sparsely sets `model.version`.
    """
    digest = blake2b(digest_size=32)
    size = path.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        header = _safetensors_header(file, size) if path.suffix == ".safetensors" else None
        if header is None:
            ranges = _even_ranges(size)
        else:
            digest.update(header)
            ranges = _tensor_ranges(header)
        for offset, length in ranges:
            file.seek(offset)
            digest.update(file.read(length))
    return digest.digest()


def fingerprint_directory(directory: Path, *, with_code: bool = False) -> str | None:
    """A digest of a directory's weights files and settings (and Python files ``with_code``); None without weights."""
    weights = _files(directory, _WEIGHT_FILES)
    if not weights:
        return None
    digest = blake2b(digest_size=32)
    for path in (*weights, *_files(directory, _OF_SUBDIRECTORIES)):
        digest.update(path.relative_to(directory).as_posix().encode() + b"\0" + fingerprint_file(path))
    digest.update(_whole(_files(directory, (*_SETTINGS, *(("*.py",) if with_code else ())))))
    return digest.hexdigest()


def fingerprint_settings(directory: Path) -> str:
    """A digest of the settings beside a model's weights: quantisation, index, processors of items."""
    return _whole(_files(directory, _SETTINGS)).hex()


def chosen_names(directory: Path, load_format: str) -> list[str]:
    """The weights files right in ``directory`` that vLLM loads by ``load_format``, and the indexes that it chooses among them by."""
    if load_format == "auto":
        load_format = "mistral" if any(directory.glob(*_CHOICES["mistral"])) else "hf"
    for pattern in _CHOICES.get(load_format, ()):
        found = _files(directory, (pattern,))
        if found:
            return [path.name for path in (*found, *_files(directory, ("*.index.json",)))]
    return [path.name for path in _files(directory, _WEIGHT_FILES)]


def digest_whole(directory: Path) -> str:
    """A digest of everything in the files right in ``directory``; for adapters, which are small and much alike. Raises OSError."""
    digest = blake2b(digest_size=32)
    for path in sorted(entry for entry in directory.iterdir() if entry.is_file()):
        digest.update(path.name.encode() + b"\0" + path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


Signature = tuple[tuple[str, int, int, int, int], ...]


def signature(directory: Path) -> Signature:
    """Name, inode, size, and times of modification and of change (ns) of each file right in ``directory``. Raises OSError.

    It changes when they do: a file written over by one of the same size and modification time still has another time of change.
    """
    found = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_file():
                stat = entry.stat()
                found.append((entry.name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return tuple(sorted(found))


def hub_snapshot(repository: str, revision: str | None, cache_directory: str | None) -> Path | None:
    """Where a hub's repository is on this machine, at the commit that vLLM has loaded by now (its name); None if it is not there."""
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(snapshot_download(repository, revision=revision, cache_dir=cache_directory, local_files_only=True))
    except Exception:  # every way of not being there: no such name, no such file, offline
        return None
    return snapshot if re.fullmatch(r"[0-9a-f]{40}", snapshot.name) else None


def hub_commit(repository: str, revision: str | None, cache_directory: str | None) -> str | None:
    """The commit of `hub_snapshot`."""
    snapshot = hub_snapshot(repository, revision, cache_directory)
    return None if snapshot is None else snapshot.name


def _whole(paths: list[Path]) -> bytes:
    digest = blake2b(digest_size=32)
    for path in paths:
        digest.update(path.name.encode() + b"\0" + blake2b(path.read_bytes(), digest_size=32).digest())
    return digest.digest()


def _files(directory: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in directory.glob(pattern) if path.is_file()})


def _safetensors_header(file: BinaryIO, size: int) -> bytes | None:
    length = int.from_bytes(file.read(8), "little")
    return file.read(length) if 0 < length <= min(_HEADER_LIMIT, size - 8) else None


def _tensor_ranges(header: bytes) -> Iterator[tuple[int, int]]:
    """Where to read: the start, middle and end of every tensor, by place in the file."""
    base = 8 + len(header)
    places = sorted(entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__")
    for start, end in places:
        length = end - start
        if length <= _WHOLE_BYTES:
            yield base + start, length
        else:
            for offset in (0, (length - _SAMPLE_BYTES) // 2, length - _SAMPLE_BYTES):
                yield base + start + offset, _SAMPLE_BYTES


def _even_ranges(size: int) -> Iterator[tuple[int, int]]:
    step = max(_SAMPLE_BYTES, size // _OPAQUE_SAMPLES)
    for offset in range(0, size, step):
        yield offset, _SAMPLE_BYTES
    yield max(0, size - _SAMPLE_BYTES), _SAMPLE_BYTES
