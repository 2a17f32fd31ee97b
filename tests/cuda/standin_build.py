"""Builds the stand-in libcuda with g++ into a cache, once for each state of its sources."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import tempfile
from multiprocessing.pool import ThreadPool
from pathlib import Path

CUDA = Path(__file__).parent.parent.parent / "cuda"
SOURCES = CUDA / "standin"
KERNELS = (CUDA / "kv_copy.cu", CUDA / "host_shim.h", CUDA / "host_shim.cpp")
FLAGS = ("-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvoffload" / "standin"


def build(extra: tuple[str, ...] = ()) -> Path:
    """The shared object for the sources as they are, with more flags for the compiler (sanitizers). Safe in parallel processes.

    Raises RuntimeError with the compiler's words.
    """
    compiler = os.environ.get("CXX", "g++")
    units = [*sorted(SOURCES.glob("*.cpp")), CUDA / "host_shim.cpp"]
    command = [compiler, *FLAGS, *WARNINGS, *extra, "-Wl,-soname,libcuda.so.1"]
    state = hashlib.sha256(repr(command).encode())
    for path in sorted({*SOURCES.iterdir(), *KERNELS}):
        state.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    directory = cache_directory() / state.hexdigest()[:24]
    library = directory / "libcuda.so.1"
    if library.exists():
        return library
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process builds the same: one does, and the other finds it done
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=directory) as scratch:
                _compile(command, units, Path(scratch))
                os.replace(Path(scratch) / library.name, library)
    return library


def _compile(command: list[str], units: list[Path], scratch: Path) -> None:
    """The header that all include first, once; then the files, as many at a time as there are cores."""
    compile_one = [word for word in command if word != "-shared" and not word.startswith("-Wl,")]
    lenient = [word for word in compile_one if word != "-Werror"]  # g++ warns of #pragma once in what it is to compile
    _run([*lenient, "-w", "-x", "c++-header", str(SOURCES / "call.h"), "-o", str(scratch / "call.h.gch")], scratch)
    with ThreadPool(os.cpu_count()) as pool:
        # -include looks in the working directory first, where the compiled header is
        pool.map(lambda unit: _run([*compile_one, *_header(unit), "-c", str(unit)], scratch), units)
    _run([*command, *(f"{unit.stem}.o" for unit in units), "-o", "libcuda.so.1"], scratch)


def _header(unit: Path) -> tuple[str, ...]:
    return ("-include", "call.h") if unit.parent == SOURCES else ()


def _run(command: list[str], directory: Path) -> None:
    done = subprocess.run(command, cwd=directory, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"the stand-in is not built: {' '.join(command)}\n{done.stderr}")
