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
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvoffload" / "standin"


def build(extra: tuple[str, ...] = ()) -> Path:
    """The shared object for the sources as they are, with more flags for the compiler (sanitizers). Safe in parallel processes.

    Raises RuntimeError with the compiler's words.
    """
    compiler = os.environ.get("CXX", "g++")
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
                _compile(command, Path(scratch))
                os.replace(Path(scratch) / library.name, library)
    return library


def _compile(command: list[str], scratch: Path) -> None:
    """In few units, each of many files: nearly all of the time goes into headers that all of them include."""
    sources = sorted(SOURCES.glob("*.cpp"))
    alone = [SOURCES / "symbols.cpp", CUDA / "host_shim.cpp"]  # they declare the same functions otherwise
    together = [source for source in sources if source not in alone]
    units = [*alone]
    for group in (together[::2], together[1::2]):
        unit = scratch / f"unit_{len(units)}.cpp"
        unit.write_text("".join(f'#include "{source}"\n' for source in group))
        units.append(unit)
    compile_one = [word for word in command if word != "-shared" and not word.startswith("-Wl,")]
    with ThreadPool(os.cpu_count()) as pool:
        pool.map(lambda unit: _run([*compile_one, "-c", str(unit)], scratch), reversed(units))
    _run([*command, *(f"{unit.stem}.o" for unit in units), "-o", "libcuda.so.1"], scratch)


def _run(command: list[str], directory: Path) -> None:
    done = subprocess.run(command, cwd=directory, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"the stand-in is not built: {' '.join(command)}\n{done.stderr}")


if __name__ == "__main__":
    print(build())  # noqa: T201
