"""The fatbin that is shipped: what its sources give, byte for byte, and in its machine code what the kernels promise."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cuda.kernels.mutants import one_source
from tests.cuda.kernels.shim import CUDA, KERNELS, SOURCE, Shim, build_shim

from cuda import build, sass

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(300)]


def script(tree: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """cuda/build.py of a copy of the tree: what it answers and says."""
    command = [sys.executable, str(tree / "cuda" / "build.py"), *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what belongs to the fatbin, in a place of its own."""
    (tmp_path / "cuda").mkdir()
    for name in ("build.py", "kv_copy.cu", "kv_copy.lock"):
        shutil.copy(CUDA / name, tmp_path / "cuda" / name)
    fatbin = fatbin_of(tmp_path)
    fatbin.parent.mkdir(parents=True)
    shutil.copy(build.FATBIN, fatbin)
    return tmp_path


@pytest.fixture
def other_nvcc(tmp_path: Path) -> str:
    """One that says it is of another version, and cannot do more."""
    path = tmp_path / "nvcc"
    path.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Cuda compilation tools, release 12.8, V12.8.61"\n')
    path.chmod(0o755)
    return str(path)


def fatbin_of(tree: Path) -> Path:
    return tree / Path(build.FATBIN).relative_to(CUDA.parent)


def test_the_sources_give_what_is_committed_wherever_they_are(tree: Path) -> None:
    """The build that was committed and this one: another directory, another file, and flags in the environment that do not count."""
    code, words = script(tree, "--check", NVCC_APPEND_FLAGS="-lineinfo")
    assert code == build.SAME, words
    assert build.sha256(build.FATBIN) in words


def test_other_sources_than_the_committed_are_found_without_a_compiler(tree: Path) -> None:
    source = tree / "cuda" / "kv_copy.cu"
    source.write_text(source.read_text() + "// changed\n")
    code, words = script(tree, "--check", NVCC="no-such-compiler")
    assert code == build.DIFFERS
    assert "does not fit" in words


def test_another_fatbin_than_the_sources_give_is_found(tree: Path) -> None:
    """Even where somebody wrote its hash into the lock. One architecture is enough to see it."""
    fatbin, lock, builder = fatbin_of(tree), tree / "cuda" / "kv_copy.lock", tree / "cuda" / "build.py"
    assert script(tree, "--check", NVCC="no-such-compiler")[0] == build.NOT_COMPARED
    fatbin.write_bytes(fatbin.read_bytes()[:-1] + b"?")
    assert script(tree, "--check", NVCC="no-such-compiler")[0] == build.DIFFERS
    builder.write_text(re.sub(r"(?m)^ARCHITECTURES = .*$", "ARCHITECTURES = (90,)", builder.read_text()))
    lock.write_text(json.dumps({**json.loads(lock.read_text()), "fatbin": build.sha256(fatbin), "architectures": [90]}))
    code, words = script(tree, "--check")
    assert code == build.DIFFERS
    assert "is not what nvcc" in words


def test_another_compiler_is_no_proof_and_this_is_said(tree: Path, other_nvcc: str) -> None:
    code, words = script(tree, "--check", NVCC=other_nvcc)
    assert code == build.NOT_COMPARED
    assert "nvcc 12.8.61 is here, 13.0.88 built them" in words
    code, words = script(tree, "--check", NVCC="no-such-compiler")
    assert code == build.NOT_COMPARED
    assert "no no-such-compiler on PATH" in words


def test_another_compiler_does_not_write_what_is_shipped(tree: Path, other_nvcc: str) -> None:
    before = {path: path.read_bytes() for path in tree.rglob("kv_copy.*")}
    code, words = script(tree, NVCC=other_nvcc)
    assert code == build.DIFFERS
    assert "13.0.88 is pinned" in words
    assert {path: path.read_bytes() for path in tree.rglob("kv_copy.*")} == before


def test_machine_code_is_as_promised() -> None:
    assert sass.gate() == []


def test_gate_and_build_speak_of_the_same_architectures() -> None:
    assert (sass.ARCHITECTURES, sass.PTX) == (build.ARCHITECTURES, build.PTX)
    assert sass.KERNELS == KERNELS


def test_parameters_in_the_fatbin_are_those_of_the_shim(tmp_path: Path) -> None:
    ptx = subprocess.run([sass.tool("cuobjdump"), "-ptx", str(build.FATBIN)], capture_output=True, text=True, check=True).stdout
    shim = Shim(ctypes.CDLL(str(build_shim(tmp_path))))
    for kernel in KERNELS:
        bits = re.findall(rf"\.param \.u(\d+) {kernel}_param_\d+", ptx.partition(f".entry {kernel}(")[2].partition(")")[0])
        assert [int(width) // 8 for width in bits] == shim.parameter_bytes(kernel)


STEP = "const uint64_t step = blockDim.x;"


def changed(*changes: tuple[str, str]) -> str:
    text = SOURCE.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([("#define KV_UNROLL 4", "#define KV_UNROLL 32")], "spill"),
        ([(STEP, f"{STEP} uint4 kept[2] = {{}}; kept[step & 1] = *src; *dst = kept[words & 1];")], "Local memory used"),
        ([(STEP, f"{STEP} int unused;")], "never referenced"),
    ],
    ids=["registers spilled", "an array in local memory", "a warning"],
)
def test_what_the_compiler_warns_of_is_an_error(tmp_path: Path, changes: list[tuple[str, str]], words: str) -> None:
    source = tmp_path / "kv_copy.cu"
    source.write_text(changed(*changes))
    with pytest.raises(build.BuildError, match=words):
        build.build(tmp_path / "x.fatbin", source, architectures=(90,))


BROKEN = {
    "registers spilled": ([("#define KV_UNROLL 4", "#define KV_UNROLL 32")], r"STL\S* found"),
    "local memory": (
        [(STEP, f"{STEP} uint4 kept[2] = {{}}; kept[step & 1] = __ldcs(src); __stcs(dst, kept[words & 1]);")],
        "bytes of stack",
    ),
    "generic loads": ([("__ldcs(src + first + k * step)", "src[first + k * step]")], r"LD\.E\.128 found"),
    "generic stores": ([("__stcs(dst + first + k * step, word[k])", "dst[first + k * step] = word[k]")], r"ST\.E\.128 found"),
    "narrow words": ([("uint4", "uint2")], r"4 LDG\.E\.EF\.128 expected, 0 found"),
    "the read-only path": ([("__ldcs(", "__ldg(")], r"LDG\.E\.128\.CONSTANT found"),
    "fewer loads at once": ([("#define KV_UNROLL 4", "#define KV_UNROLL 3")], "4 LDG.E.EF.128 expected, 3 found"),
    "a table read again": (
        [("item += items_per_step;", "item += items_per_step + (blocks[0] == slot);")],
        r"6 LDG\.E\.64 expected, 7 found",
    ),
    "a table in other widths": ([("uint64_t offset; ", "uint32_t offset, other; ")], r"LDG\.E found"),
    "a barrier": ([(STEP, f"{STEP} __syncthreads();")], r"BAR\S* found"),
    "shared memory": ([(STEP, f"{STEP} __shared__ volatile int x; x = 1;")], "bytes of shared memory"),
    "an atomic": ([(STEP, f"{STEP} atomicAdd(reinterpret_cast<unsigned*>(dst), 1u);")], r"(ATOM|RED)\S* found"),
    "a call": ([("at += runs_per_step;", "at += runs_per_step % count; at %= runs[0].size;")], r"CALL\S* found"),
    "too many registers": (
        [("__launch_bounds__(1024)", "__launch_bounds__(128)"), ("#define KV_UNROLL 4", "#define KV_UNROLL 16")],
        "registers used",
    ),
    "nothing": ([], "^$"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the gate says of each kernel in `BROKEN`, built without the compiler's own warnings: the gate alone stands in the way."""
    directory = tmp_path_factory.mktemp("broken")
    source, fatbin = directory / "broken.cu", directory / "broken.fatbin"
    source.write_text(one_source([changed(*changes) for changes, _ in BROKEN.values()]))
    build.build(fatbin, source, architectures=(100,), flags=())
    problems = {code.kernel: "\n".join(sass.broken(code)) for code in sass.disassemble(fatbin)}
    return {name: problems[f"m{index}_kv_gather"] for index, name in enumerate(BROKEN)}


@pytest.mark.parametrize("name", BROKEN)
def test_the_gate_sees(found: dict[str, str], name: str) -> None:
    """Negative controls."""
    assert re.search(BROKEN[name][1], found[name]), found[name]


def test_the_gate_says_where(tmp_path: Path) -> None:
    fatbin, source = tmp_path / "broken.fatbin", tmp_path / "kv_copy.cu"
    source.write_text(changed(("#define KV_UNROLL 4", "#define KV_UNROLL 5"), ("kv_scatter(", "kv_scattered(")))
    build.build(fatbin, source, architectures=(90,))
    assert sass.gate(fatbin, (90,)) == [
        "sm_90 kv_scatter: missing",
        "sm_90 kv_scattered: not expected here",
        *(
            f"sm_90 {kernel}: 4 {opcode} expected, 5 found"
            for kernel in ("kv_scattered", "kv_gather")
            for opcode in ("LDG.E.EF.128", "STG.E.EF.128")
        ),
    ]


def test_the_gate_sees_an_architecture_and_a_ptx_that_are_not_there(tmp_path: Path) -> None:
    cubin = tmp_path / "one.cubin"
    subprocess.run([build.nvcc(), "-std=c++17", "-arch=sm_90", "-cubin", "-o", str(cubin), str(SOURCE)], check=True)
    problems = sass.gate(cubin, (80, 90))
    assert problems == ["sm_80 kv_gather: missing", "sm_80 kv_scatter: missing", "compute_80: no PTX for GPUs that come later"]


def test_the_script_says_what_is_broken(tmp_path: Path) -> None:
    fatbin = tmp_path / "one.fatbin"
    build.build(fatbin, architectures=(90,))
    done = subprocess.run([sys.executable, str(CUDA / "sass.py"), str(fatbin)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "sm_120 kv_gather: missing" in done.stdout
