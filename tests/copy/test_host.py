from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.copy.rigs import WAIT_S, Rig, ids, layers_of, strided

import kvoffload
from kvoffload.copy.host import HostCopyEngine
from kvoffload.errors import CopyError, LayoutError
from kvoffload.layout import HEADER_BYTES, BlockLayout
from kvoffload.ledger import Ledger
from kvoffload.segment import Segment


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig.make()
    yield made
    made.close()


@settings(deadline=None)
@given(
    order=st.permutations("LBHNC"),
    sizes=st.tuples(st.integers(1, 3), st.integers(3, 5), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)),
    padding=st.lists(st.integers(0, 3), min_size=5, max_size=5),
    itemsize=st.sampled_from([1, 2, 4, 8]),
    data=st.data(),
)
def test_any_strided_layout(order: list[str], sizes: tuple[int, ...], padding: list[int], itemsize: int, data: st.DataObject) -> None:
    memory, view = strided("".join(order), dict(zip("LBHNC", sizes, strict=True)), padding, itemsize)
    blocks = view.shape[1]
    source, target = data.draw(st.permutations(range(blocks)))[:2]
    rig = Rig.on(layers_of(view), blocks, 3)
    rig.segment.array[:] = 0x5A
    expected = memory.copy()

    assert rig.engine.save(ids(source), ids(1), ids(0), None).tolist() == [True]
    assert np.array_equal(memory, expected)
    around = np.delete(rig.segment.array, np.s_[rig.segment.slot_bytes : 2 * rig.segment.slot_bytes])
    assert (around == 0x5A).all()
    assert not rig.segment.slot(1)[:HEADER_BYTES].any()
    assert (rig.segment.slot(1)[HEADER_BYTES + rig.layout.payload_bytes :] == 0x5A).all()

    rig.engine.load(ids(1), ids(target), None)
    # The same as this assignment, and no other byte of the memory, padding and guards included.
    start = (view.ctypes.data - memory.ctypes.data) // itemsize
    expected_view = np.lib.stride_tricks.as_strided(expected[start:], view.shape, view.strides)
    expected_view[:, target] = expected_view[:, source].copy()
    assert np.array_equal(memory, expected)
    rig.close()


def test_a_batch_goes_where_it_says(rig: Rig) -> None:
    before = [rig.block(number) for number in range(8)]
    flags = rig.engine.save(ids(5, 1, 3), ids(0, 7, 2), ids(0, 0, 0), rig.engine.mark())
    assert flags.tolist() == [True, True, True]
    assert [rig.slot(slot) for slot in (0, 7, 2)] == [before[5], before[1], before[3]]
    rig.engine.load(ids(7, 0, 2), ids(6, 2, 5), None)
    assert [rig.block(number) for number in (6, 2, 5)] == [before[1], before[5], before[3]]
    assert [rig.block(number) for number in (0, 1, 3, 4, 7)] == [before[number] for number in (0, 1, 3, 4, 7)]


def test_the_same_slot_may_be_read_twice(rig: Rig) -> None:
    rig.engine.save(ids(4, 4), ids(0, 1), ids(0, 0), None)
    rig.engine.load(ids(0, 0), ids(2, 3), None)
    assert rig.block(2) == rig.block(3) == rig.block(4)


def test_nothing_to_copy(rig: Rig) -> None:
    assert rig.engine.save(ids(), ids(), ids(), None).tolist() == []
    rig.engine.load(ids(), ids(), None)


def test_flags_follow_the_ledger(rig: Rig) -> None:
    rig.ledger.bump([1, 2])
    rig.ledger.bump([2])
    flags = rig.engine.save(ids(1, 2, 3, 4), ids(0, 1, 2, 3), ids(1, 1, 0, 7), None)
    assert flags.tolist() == [True, False, True, False]


def test_another_ledger_takes_over(rig: Rig) -> None:
    scheduler_s = Ledger(8)
    scheduler_s.bump([3])
    rig.engine.use_ledger(scheduler_s)
    assert rig.engine.save(ids(3, 4), ids(0, 1), ids(1, 0), None).tolist() == [True, True]
    scheduler_s.close()  # the engine holds its memory
    assert rig.engine.save(ids(3, 4), ids(0, 1), ids(0, 0), None).tolist() == [False, True]
    with pytest.raises(LayoutError, match="9 blocks"):
        rig.engine.use_ledger(Ledger(9))


@pytest.mark.parametrize(
    ("blocks", "slots", "reason"),
    [
        ((0, 8), (0, 1), "names block 8, there are 8"),
        ((-1, 2), (0, 1), "names block -1"),
        ((0, 1), (0, 8), "names slot 8, there are 8"),
        ((0, 1), (-9, 1), "names slot -9"),
        ((0, 1), (3, 3), "names a destination twice"),
        ((0, 1), (3,), "a save of 2 blocks into 1 slots"),
    ],
)
def test_a_wrong_save_touches_nothing(rig: Rig, blocks: tuple[int, ...], slots: tuple[int, ...], reason: str) -> None:
    rig.segment.array[:] = 1
    for _ in range(2):  # a refused call leaves nothing behind that refuses a later one, or lets it pass
        with pytest.raises(CopyError, match=reason):
            rig.engine.save(ids(*blocks), ids(*slots), ids(*[0] * len(blocks)), None)
    assert (rig.segment.array == 1).all()
    assert rig.engine.save(ids(0, 1), ids(3, 1), ids(0, 0), None).all()


@pytest.mark.parametrize(
    ("slots", "blocks", "reason"),
    [
        ((0, 1), (2, 8), "names block 8"),
        ((0, 8), (2, 3), "names slot 8"),
        ((0, 1), (5, 5), "names a destination twice"),
        ((0, 1), (5,), "a load of 2 slots into 1 blocks"),
    ],
)
def test_a_wrong_load_touches_nothing(rig: Rig, slots: tuple[int, ...], blocks: tuple[int, ...], reason: str) -> None:
    before = [rig.block(number) for number in range(8)]
    for _ in range(2):
        with pytest.raises(CopyError, match=reason):
            rig.engine.load(ids(*slots), ids(*blocks), None)
    assert [rig.block(number) for number in range(8)] == before
    rig.engine.load(ids(0, 1), ids(5, 2), None)


def test_what_are_not_ids(rig: Rig) -> None:
    with pytest.raises(CopyError, match="one-dimensional"):
        rig.engine.load(np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int64), None)
    with pytest.raises(CopyError, match="not ids"):
        rig.engine.load([2**70], [1], None)  # type: ignore[arg-type]


def test_a_closed_engine_copies_no_more(rig: Rig) -> None:
    rig.engine.close()
    with pytest.raises(CopyError, match="closed"):
        rig.engine.save(ids(1), ids(1), ids(0), None)
    with pytest.raises(CopyError, match="closed"):
        rig.engine.load(ids(1), ids(1), None)


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
