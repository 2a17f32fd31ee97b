"""Build kv_copy.cu into the fatbin that the wheel ships, or say whether the committed one is what the sources give.

    python cuda/build.py                  build, and write the fatbin and kv_copy.lock
    python cuda/build.py --check          0: the same bytes; 1: they differ; 3: no nvcc of the pinned version, so bytes were not compared
    python cuda/build.py --output FILE    build with the nvcc that is here, whatever its version

Wants nvcc on PATH (or named by $NVCC) and nothing else. Equal sources and an equal nvcc give equal bytes, wherever they are built.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "kv_copy.cu"
LOCK = HERE / "kv_copy.lock"
FATBIN = HERE.parent / "src" / "kvoffload" / "cuda" / "kv_copy.fatbin"

PINNED_NVCC = "13.0.88"
ARCHITECTURES = (80, 86, 89, 90, 100, 103, 120)
PTX = 80
"""The one architecture in PTX, and the oldest: a driver compiles it for every GPU that none of the above fits."""

WARNINGS = ("-Werror", "all-warnings", "-Xptxas", "-warn-spills,-warn-lmem-usage,-Werror")
SAME, DIFFERS, NOT_COMPARED = 0, 1, 3


class BuildError(Exception):
    """nvcc is missing or did not compile; the text is nvcc's, or says what to install."""


def nvcc() -> str:
    """The compiler's path. BuildError where there is none."""
    wanted = os.environ.get("NVCC", "nvcc")
    found = shutil.which(wanted)
    if found is None:
        raise BuildError(f"no {wanted} on PATH: install the CUDA toolkit {PINNED_NVCC} or name its compiler in $NVCC")
    return found


def nvcc_version(compiler: str) -> str:
    """Like ``13.0.88``."""
    found = re.search(r"\bV(\d+\.\d+\.\d+)", run([compiler, "--version"], HERE))
    if found is None:
        raise BuildError(f"{compiler} --version names no version")
    return found[1]


def run(command: Sequence[str], directory: Path) -> str:
    # Flags from the environment would change the bytes.
    environment = {name: value for name, value in os.environ.items() if name not in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)} failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def build(output: Path, source: Path = SOURCE, architectures: Sequence[int] = ARCHITECTURES, flags: Sequence[str] = WARNINGS) -> None:
    """Compile ``source`` into a fatbin at ``output``. BuildError with the compiler's words; a spilled register is one of its errors."""
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
    targets.append(f"-gencode=arch=compute_{PTX},code=compute_{PTX}")
    # The source is named without its directory, or a path would be a part of the bytes.
    command = [nvcc(), "-std=c++17", "-O3", *targets, *flags, "--no-compress", "--fatbin", "-o", str(output.resolve()), source.name]
    run(command, source.resolve().parent)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "missing"


def lock_of(fatbin: Path, version: str) -> dict[str, str | list[int]]:
    """What belongs together: the compiler, the sources and the bytes that they gave."""
    return {
        "nvcc": version,
        "source": sha256(SOURCE),
        "fatbin": sha256(fatbin),
        "architectures": [*ARCHITECTURES],
        "ptx": [PTX],
    }


def check() -> tuple[int, str]:
    """An exit code and what it means, in words."""
    lock = json.loads(LOCK.read_text()) if LOCK.exists() else {}
    if lock != lock_of(FATBIN, PINNED_NVCC):
        return DIFFERS, f"{LOCK.name} does not fit {SOURCE.name} and {FATBIN.name}: run cuda/build.py and commit all three"
    fits = f"{LOCK.name} fits {SOURCE.name} and {FATBIN.name}, but bytes were not compared"
    try:
        version = nvcc_version(nvcc())
    except BuildError as error:
        return NOT_COMPARED, f"{fits}: {error}"
    if version != PINNED_NVCC:
        return NOT_COMPARED, f"{fits}: nvcc {version} is here, {PINNED_NVCC} built them"
    with tempfile.TemporaryDirectory() as directory:
        fresh = Path(directory) / FATBIN.name
        build(fresh)
        if sha256(fresh) != lock["fatbin"]:
            return DIFFERS, f"{FATBIN.name} is not what nvcc {version} makes of {SOURCE.name}: run cuda/build.py and commit what it writes"
    return SAME, f"{FATBIN.name} is what nvcc {version} makes of {SOURCE.name}: {lock['fatbin']}"


def write() -> str:
    version = nvcc_version(nvcc())
    if version != PINNED_NVCC:
        raise BuildError(f"nvcc {version} is here and {PINNED_NVCC} is pinned: --output builds elsewhere; to ship its bytes, move the pin")
    FATBIN.parent.mkdir(parents=True, exist_ok=True)
    build(FATBIN)
    LOCK.write_text(json.dumps(lock_of(FATBIN, version)) + "\n")
    return summary(FATBIN)


def summary(fatbin: Path) -> str:
    names = ", ".join(f"sm_{number}" for number in ARCHITECTURES)
    return f"{fatbin}: {fatbin.stat().st_size} bytes for {names} and PTX for compute_{PTX}, sha256 {sha256(fatbin)}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="build kv_copy.fatbin from kv_copy.cu")
    parser.add_argument("--check", action="store_true", help="write nothing; say whether the committed fatbin is what the sources give")
    parser.add_argument("--output", type=Path, help="build with whatever nvcc is here into this file, and leave what is committed alone")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.check:
            code, words = check()
        elif chosen.output:
            build(chosen.output)
            code, words = SAME, summary(chosen.output)
        else:
            code, words = SAME, write()
    except BuildError as error:
        code, words = DIFFERS, str(error)
    sys.stdout.write(f"{words}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
