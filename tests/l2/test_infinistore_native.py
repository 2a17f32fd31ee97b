"""The compiled loops in numba's cache. What they do is tested through the client."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kvoffload


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_change_in_any_of_its_files_compiles_the_loops_again(tmp_path: Path) -> None:
    """numba by itself would look at the loops' own file alone."""
    package = tmp_path / "src" / "kvoffload"
    shutil.copytree(Path(kvoffload.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))

    def compiled() -> set[str]:
        environ = {**os.environ, "PYTHONPATH": str(package.parent), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
        script = "from kvoffload.l2 import infinistore_native as native; print(native.__file__); native.loops()"
        answer = subprocess.run([sys.executable, "-c", script], env=environ, check=True, capture_output=True, text=True)
        assert str(package) in answer.stdout
        return {path.name for path in (tmp_path / "cache").rglob("infinistore_native.*.nbc")}

    first = compiled()
    assert len(first) == 3
    assert compiled() == first
    for name in ("infinistore_socket.py", "infinistore_wire.py"):
        before = compiled()
        with (package / "l2" / name).open("a") as file:
            file.write("# changed")
        assert len(compiled()) == len(before) + 3
