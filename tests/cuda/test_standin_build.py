"""The stand-in as a program: built once, by one of many, in the words of the real cuda.h, and at peace with being used badly."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cuda import standin_build
from tests.cuda.standin import Code, Standin
from tests.cuda.standin_build import build, cache_directory

pytestmark = pytest.mark.cuda

TREE = Path(__file__).parent.parent.parent


def find_header() -> Path | None:
    """cuda.h of a toolkit that is new enough to have batches."""
    nvcc = shutil.which("nvcc")
    places = [Path(nvcc).resolve().parent.parent / "include"] if nvcc else []
    places += sorted(Path("/usr/local").glob("cuda*/include"))
    places += [site / "nvidia" / "cu13" / "include" for site in map(Path, sys.path) if site.name == "site-packages"]
    places += [site / "triton" / "backends" / "nvidia" / "include" for site in map(Path, sys.path) if site.name == "site-packages"]
    for place in places:
        header = place / "cuda.h"
        if header.exists() and (version := re.search(r"#define CUDA_VERSION (\d+)", header.read_text())) and int(version[1]) >= 12080:
            return header
    return None


def test_its_numbers_are_those_of_cuda_h(tmp_path: Path) -> None:
    """And its structures have the same layout, as a static_assert in C++ says."""
    header = find_header()
    if header is None:
        pytest.skip("no cuda.h of CUDA 12.8 or newer here")
    source = (standin_build.SOURCES / "abi.h").read_text()
    names = re.findall(r"(?m)^    ([A-Z_]+) = \d+,$", source)
    assert len(names) > 20
    known = {name: name.replace("CAPTURE_", "STREAM_CAPTURE_") if name.startswith("CAPTURE_") else name for name in names}
    pairs = {f"standin::{name}": f"CUDA_ERROR_{there}" for name, there in known.items() if name != "SUCCESS"}
    pairs |= {
        "standin::STREAM_NON_BLOCKING": "CU_STREAM_NON_BLOCKING",
        "standin::EVENT_BLOCKING_SYNC": "CU_EVENT_BLOCKING_SYNC",
        "standin::EVENT_DISABLE_TIMING": "CU_EVENT_DISABLE_TIMING",
        "standin::HOST_PORTABLE": "CU_MEMHOSTREGISTER_PORTABLE",
        "standin::HOST_DEVICEMAP": "CU_MEMHOSTREGISTER_DEVICEMAP",
        "standin::HOST_WRITECOMBINED": "CU_MEMHOSTALLOC_WRITECOMBINED",
        "standin::REGISTER_IOMEMORY": "CU_MEMHOSTREGISTER_IOMEMORY",
        "standin::REGISTER_READ_ONLY": "CU_MEMHOSTREGISTER_READ_ONLY",
        "standin::CAPTURE_GLOBAL": "CU_STREAM_CAPTURE_MODE_GLOBAL",
        "standin::CAPTURE_THREAD_LOCAL": "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL",
        "standin::CAPTURE_RELAXED": "CU_STREAM_CAPTURE_MODE_RELAXED",
        "standin::CAPTURE_STATUS_NONE": "CU_STREAM_CAPTURE_STATUS_NONE",
        "standin::CAPTURE_STATUS_ACTIVE": "CU_STREAM_CAPTURE_STATUS_ACTIVE",
        "standin::CAPTURE_STATUS_INVALIDATED": "CU_STREAM_CAPTURE_STATUS_INVALIDATED",
        "standin::ORDER_STREAM": "CU_MEMCPY_SRC_ACCESS_ORDER_STREAM",
        "standin::ORDER_DURING_API_CALL": "CU_MEMCPY_SRC_ACCESS_ORDER_DURING_API_CALL",
        "standin::ORDER_ANY": "CU_MEMCPY_SRC_ACCESS_ORDER_ANY",
        "standin::LOCATION_LAST": "CU_MEM_LOCATION_TYPE_HOST_NUMA_CURRENT",
        "standin::COPY_PREFER_OVERLAP": "CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE",
        "standin::PROC_SUCCESS": "CU_GET_PROC_ADDRESS_SUCCESS",
        "standin::PROC_NOT_FOUND": "CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND",
        "standin::PROC_VERSION_NOT_SUFFICIENT": "CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT",
        "standin::LAUNCH_PARAM_BUFFER": "CU_LAUNCH_PARAM_BUFFER_POINTER_AS_INT",
        "standin::LAUNCH_PARAM_BUFFER_SIZE": "CU_LAUNCH_PARAM_BUFFER_SIZE_AS_INT",
        "standin::MEMORYTYPE_HOST": "CU_MEMORYTYPE_HOST",
        "standin::MEMORYTYPE_DEVICE": "CU_MEMORYTYPE_DEVICE",
        "sizeof(standin::CopyAttributes)": "sizeof(CUmemcpyAttributes)",
        "offsetof(standin::CopyAttributes, target_hint)": "offsetof(CUmemcpyAttributes, dstLocHint)",
        "offsetof(standin::CopyAttributes, flags)": "offsetof(CUmemcpyAttributes, flags)",
    }
    lines = ['#include "cuda.h"', f'#include "{standin_build.SOURCES / "abi.h"}"']
    lines += [f'static_assert((long long)({ours}) == (long long)({theirs}), "{theirs}");' for ours, theirs in pairs.items()]
    check = tmp_path / "check.cpp"
    check.write_text("\n".join(lines) + "\n")
    done = subprocess.run(["g++", "-std=c++17", "-fsyntax-only", f"-I{header.parent}", str(check)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_control_s_codes_are_those_of_cuda_bindings(standin: Standin) -> None:
    from cuda.bindings import driver

    names = {code: getattr(driver.CUresult, f"CUDA_{'ERROR_' if code else ''}{code.name}") for code in Code}
    assert {code: int(known) for code, known in names.items()} == {code: int(code) for code in Code}
    assert [driver.cuGetErrorName(known)[1].decode() for known in names.values()] == [known.name for known in names.values()]


def test_every_source_is_a_small_file() -> None:
    assert [path.name for path in standin_build.SOURCES.iterdir() if len(path.read_text().splitlines()) > 400] == []


def test_it_is_built_once(standin: Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build()
    assert built.is_relative_to(cache_directory())
    before = built.stat().st_mtime_ns
    assert build().stat().st_mtime_ns == before
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RuntimeError, match="the stand-in is not built: false"):
        build()


def run(script: str, *, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{TREE / 'src'}{os.pathsep}{TREE}"}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=TREE, timeout=timeout_s)


def test_a_process_ends_whatever_its_streams_do(standin: Standin) -> None:
    """Held streams, a thread that is blocked for ever, work that has not run."""
    done = run(
        "import threading\n"
        "import numpy as np\n"
        "from tests.cuda.standin import load\n"
        "standin = load()\n"
        "from cuda.bindings import driver\n"
        "driver.cuInit(0)\n"
        "context = driver.cuDevicePrimaryCtxRetain(0)[1]\n"
        "driver.cuCtxSetCurrent(context)\n"
        "kv = np.zeros(64, np.uint8)\n"
        "standin.device_memory(kv)\n"
        "stream = driver.cuStreamCreate(1)[1]\n"
        "standin.hold(int(stream))\n"
        "driver.cuMemsetD8Async(kv.ctypes.data, 1, 64, stream)\n"
        "def wait():\n"
        "    driver.cuCtxSetCurrent(context)\n"
        "    driver.cuStreamSynchronize(stream)\n"
        "threading.Thread(target=wait, daemon=True).start()\n"
        "standin.wait_blocked('cuStreamSynchronize')\n"
        "print('the end')\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "the end\n", "")


def test_in_a_fork_there_is_no_cuda(standin: Standin) -> None:
    done = run(
        "import os\n"
        "from tests.cuda.standin import load\n"
        "standin = load()\n"
        "from cuda.bindings import driver\n"
        "assert int(driver.cuInit(0)[0]) == 0\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(int(driver.cuInit(0)[0]))\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert (done.returncode, done.stdout) == (0, f"{int(Code.NOT_INITIALIZED)}\n"), done.stderr


def test_it_does_not_share_a_process_with_another_libcuda(standin: Standin) -> None:
    done = run(
        f"import ctypes\nctypes.CDLL({str(build())!r})\n"
        "from tests.cuda.standin import load\n"
        "try:\n"
        "    load()\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    assert "another libcuda is in this process" in done.stdout, done.stderr
