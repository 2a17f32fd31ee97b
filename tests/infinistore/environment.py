"""What the real InfiniStore server needs: a virtual environment of its own, and the stand-in for libibverbs built by gcc.

Both live in `.nox/infinistore-<python>`, are made on first use (half a minute, from the package index), and are shared by sessions
that run at once. Nothing but the standard library is imported here: `python -m tests.infinistore.environment` prepares it from anywhere.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
HOME = HERE.parent.parent / ".nox" / f"infinistore-{PYTHON}"

INFINISTORE = "infinistore==0.2.35"
"""Installed without what it names as dependencies: neither the server nor the native client imports torch or pybind11."""
IMPORTED = ("uvloop==0.22.1", "fastapi", "uvicorn", "numpy")
"""With uvloop 0.23 the server aborts on its first client: the wheel brings its own libuv and runs it on uvloop's loop."""
LIBRARY_NAME = "libibverbs.so.1"


class NotRun(Exception):
    """The real server cannot run here; the text says what is missing."""


@dataclass(frozen=True, slots=True)
class Environment:
    """Where the server's Python and the stand-in are. `libverbs` is to be preloaded, by the native client too."""

    python: Path
    libverbs: Path


def prepare(home: Path = HOME) -> Environment:
    """Make it, or bring it up to date. Raises NotRun."""
    if sys.platform != "linux":
        raise NotRun("it runs on Linux only")
    if PYTHON not in ("3.11", "3.12"):
        raise NotRun(f"its wheels are for Python 3.11 and 3.12, this is {PYTHON}")
    try:
        home.mkdir(parents=True, exist_ok=True)
        with open(home.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return Environment(python=_installed(home), libverbs=built(home))
    except OSError as error:
        raise NotRun(f"{home} cannot be made: {error}") from error


def _installed(home: Path) -> Path:
    python, stamp = home / "bin" / "python", home / "installed"
    wanted = " ".join((sys.version, INFINISTORE, *IMPORTED))
    if stamp.exists() and stamp.read_text() == wanted and python.exists():
        return python
    pip = (str(python), "-m", "pip", "--disable-pip-version-check", "--retries", "1", "--timeout", "20", "install", "--quiet")
    _run("no virtual environment", sys.executable, "-m", "venv", "--clear", str(home))
    _run("pip found no server", *pip, "--no-deps", INFINISTORE)
    _run("pip found nothing it imports", *pip, *IMPORTED)
    stamp.write_text(wanted)
    return python


def built(home: Path) -> Path:
    """The stand-in, from `verbs.c`. The library's name has the digest of what it was built from, so that an older one is never taken."""
    sources = [HERE / "verbs.c", HERE / "verbs.map"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    library = home / f"verbs-{digest}.so"
    if library.exists():
        return library
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise NotRun("no C compiler; install gcc")
    half = library.with_suffix(".half")
    names = (f"-Wl,-soname,{LIBRARY_NAME}", f"-Wl,--version-script={sources[1]}", "-o", str(half), str(sources[0]))
    _run(
        "the stand-in for libibverbs does not build; install gcc, libc6-dev and libibverbs-dev",
        *(compiler, "-std=c11", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC", *names),
    )
    return half.rename(library)


def _run(trouble: str, *command: str) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        errors = [line for line in said if "error" in line.lower()]
        raise NotRun(f"{trouble}: {(errors or said or ['it said nothing'])[0].strip()}")


if __name__ == "__main__":
    try:
        sys.stdout.write(f"InfiniStore server: {prepare().python}\n")
    except NotRun as reason:
        sys.exit(f"InfiniStore server not run: {reason}")
