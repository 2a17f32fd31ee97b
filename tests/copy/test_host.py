from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.copy.rigs import WAIT_S, Rig, ids

import kvoffload
from kvoffload.copy.host import HostCopyEngine
from kvoffload.errors import LayoutError
from kvoffload.layout import BlockLayout
from kvoffload.ledger import Ledger
from kvoffload.segment import Segment


def test_parts_that_do_not_fit() -> None:
    layout = BlockLayout.from_tensors({"a": np.zeros((4, 64), np.uint8)}, 4)
    with pytest.raises(LayoutError, match="slots of 8192 bytes"):
        HostCopyEngine(layout, Segment.create(1 << 16, 8192), Ledger(4))
    with pytest.raises(LayoutError, match="5 blocks"):
        HostCopyEngine(layout, Segment.create(1 << 16, 4096), Ledger(5))


class Copying:
    """Runs a copy in a thread and finds out, from this one, whether its memory can be seen half done.

    With the interpreter lock held through the native call no Python code could ever see that.
    """

    def __init__(self, copy: Callable[[], object], first: NDArray[np.uint8], last: NDArray[np.uint8]) -> None:
        self._copy, self._first, self._last = copy, first, last
        self.result: object = None

    def _run(self) -> None:
        self.result = self._copy()

    def is_seen_half_done(self, meanwhile: Callable[[], None] = lambda: None) -> bool:
        """``meanwhile`` is called after ``first`` was written and, if True is returned, before ``last`` was."""
        self._first[:] = self._last[:] = 0
        thread = threading.Thread(target=self._run)
        thread.start()
        while thread.is_alive() and not self._first[0]:
            pass
        meanwhile()
        is_half_done = bool(self._first[0]) and not self._last[0]
        thread.join(WAIT_S)
        return is_half_done


ATTEMPTS = 200
"""A busy machine may not run the looking thread while the copy runs, some 10 ms: try again."""


def big_rig() -> Rig:
    """Three blocks of 64 MiB, all ones."""
    rig = Rig.on({"a": np.ones((3, 64 << 20), np.uint8)}, 3, 2)
    rig.segment.array[:] = 1
    return rig


def test_the_interpreter_lock_is_released_while_saving() -> None:
    rig = big_rig()
    first, last = rig.segment.slot(0)[64:65], rig.segment.slot(1)[64 + (64 << 20) - 1 :][:1]
    copying = Copying(lambda: rig.engine.save(ids(0, 1), ids(0, 1), ids(0, 0), None), first, last)
    assert any(copying.is_seen_half_done() for _ in range(ATTEMPTS))
    rig.close()


def test_the_interpreter_lock_is_released_while_loading() -> None:
    rig = big_rig()
    copying = Copying(lambda: rig.engine.load(ids(0, 1), ids(0, 1), None), rig.caches["a"][0, :1], rig.caches["a"][1, -1:])
    assert any(copying.is_seen_half_done() for _ in range(ATTEMPTS))
    rig.close()


def test_a_save_and_a_load_run_at_the_same_time() -> None:
    rig = big_rig()
    loading = Copying(lambda: rig.engine.load(ids(0), ids(2), None), rig.caches["a"][2, :1], rig.caches["a"][2, -1:])
    first, last = rig.segment.slot(1)[64:65], rig.segment.slot(1)[64 + (64 << 20) - 1 :][:1]
    saving = Copying(lambda: rig.engine.save(ids(1), ids(1), ids(0), None), first, last)
    is_saving, seen = False, list[bool]()
    for _ in range(ATTEMPTS):
        # The load begins after the save has, and is seen half done before the save ends.
        is_saving = saving.is_seen_half_done(lambda: seen.append(loading.is_seen_half_done()))
        if is_saving and seen[-1]:
            break
    assert is_saving
    assert seen[-1]
    rig.close()


def test_a_bump_while_a_block_is_read_is_seen() -> None:
    # Bumped after the first byte of block 1 was read and before its last: too late for a check that comes before the copy. Block 0 is
    # through by then, and its flag says so: each epoch is compared right after its own block.
    rig = big_rig()
    slot = rig.segment.slot(1)
    planned = ids(0, 0)

    def save() -> object:
        return rig.engine.save(ids(0, 1), ids(0, 1), planned, None)

    copying = Copying(save, slot[64:65], slot[64 + (64 << 20) - 1 :][:1])
    for _ in range(ATTEMPTS):
        planned[:] = rig.ledger.epochs([0, 1])
        if copying.is_seen_half_done(lambda: rig.ledger.bump([0, 1])):
            break
    else:
        pytest.fail("never seen half done")
    assert isinstance(copying.result, np.ndarray)
    assert copying.result.tolist() == [True, False]
    rig.close()


SOURCES = Path(kvoffload.__file__).parent


def python(code: str, root: Path = SOURCES.parent, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(root), **environment},
        capture_output=True,
        text=True,
        timeout=WAIT_S * 2,
        check=False,
    )


def test_without_a_writable_cache_it_still_compiles(tmp_path: Path) -> None:
    # Where numba may want to write there is a file, or /proc: root cannot make a directory there either.
    shutil.copytree(SOURCES, tmp_path / "kvoffload", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "kvoffload" / "copy" / "__pycache__").write_text("no directory")
    code = """
from kvoffload.copy.native import compile_kernels
from kvoffload.observe.logs import configure
configure("info")
print(compile_kernels().save.nopython_signatures[0].return_type)
"""
    nowhere = {"NUMBA_CACHE_DIR": "/proc/nothing", "HOME": "/proc/nothing", "XDG_CACHE_HOME": "/proc/nothing"}
    done = python(code, tmp_path, PYTHONDONTWRITEBYTECODE="1", **nowhere)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "int64"
    assert "compiling without numba's cache" in done.stderr


def test_without_native_code_it_is_refused() -> None:
    code = "from kvoffload.copy.native import compile_kernels\ntry: compile_kernels()\nexcept Exception as error: print(repr(error))"
    assert "UnsupportedError('NUMBA_DISABLE_JIT" in python(code, NUMBA_DISABLE_JIT="1").stdout


def test_without_numba_it_is_refused() -> None:
    code = """
import sys
sys.modules["numba"] = None
import numpy as np
from kvoffload.copy.host import HostCopyEngine
from kvoffload.layout import BlockLayout
from kvoffload.ledger import Ledger
from kvoffload.segment import Segment
layout = BlockLayout.from_tensors({"a": np.zeros((4, 64), np.uint8)}, 4)
try:
    HostCopyEngine(layout, Segment.create(1 << 16, 4096), Ledger(4))
except Exception as error:
    print(type(error).__name__, error)
"""
    assert "UnsupportedError copying on the CPU backend needs numba" in python(code).stdout
