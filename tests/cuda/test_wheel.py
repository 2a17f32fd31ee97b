"""What is installed: a wheel for every platform, with the kernels as data, that needs no compiler and no GPU."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.cuda

TREE = Path(__file__).parents[2]

PROGRAM = """
import sys
import numpy as np
import kvoffload
from kvoffload.copy.choose import make_engine, why_no_gpu
from kvoffload.cuda.settings import GpuCopySettings
from kvoffload.layout import BlockLayout
from kvoffload.ledger import Ledger
from kvoffload.segment import Segment

layout = BlockLayout.from_tensors({"layer": np.zeros((4, 64), np.uint8)}, 4)
engine = make_engine(layout, Segment.create(4 * layout.slot_bytes, layout.slot_bytes), Ledger(4), GpuCopySettings())
print(kvoffload.__file__, engine.name, why_no_gpu(), sep="\\n")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(where)], cwd=TREE, check=True, capture_output=True)
    (made,) = where.iterdir()
    return made


def test_one_wheel_fits_all_and_has_the_kernels_and_their_source(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        for name, source in (("kv_copy.fatbin", "src/kvoffload/cuda/kv_copy.fatbin"), ("kv_copy.cu", "cuda/kv_copy.cu")):
            assert archive.read(f"kvoffload/cuda/{name}") == (TREE / source).read_bytes()
    assert not [name for name in names if name.endswith((".so", ".pyd"))]


def test_without_a_gpu_it_takes_the_host_engine_and_says_why(wheel: Path, tmp_path: Path) -> None:
    """In a process that has neither the stand-in nor a compiler."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    file, engine, reason = done.stdout.splitlines()
    assert file.startswith(str(tmp_path))
    assert engine == "host"
    assert "CUDA" in reason
