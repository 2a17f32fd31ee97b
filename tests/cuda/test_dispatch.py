from __future__ import annotations

from dataclasses import replace

import pytest
from tests.copy.rigs import ids
from tests.cuda.rigs import CudaRig
from tests.cuda.standin import Machine, Standin

from kvoffload.cuda.dispatch import Direction, DispatchTable, Path
from kvoffload.cuda.settings import CopyMode, GpuCopySettings
from kvoffload.errors import ConfigError

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize(
    ("direction", "piece_bytes", "count", "path"),
    [
        (Direction.LOAD, 28_671, 16, Path.KERNEL),
        (Direction.LOAD, 28_672, 16, Path.DMA),
        (Direction.LOAD, 64, 15, Path.DMA),
        (Direction.LOAD, 64, 1_000_000, Path.KERNEL),
        (Direction.SAVE, 64, 1_000_000, Path.DMA),
    ],
)
def test_the_default_table(direction: Direction, piece_bytes: int, count: int, path: Path) -> None:
    assert DispatchTable(GpuCopySettings()).choose(direction, piece_bytes, count) is path


@pytest.mark.parametrize(("copy", "path"), [(CopyMode.DMA, Path.DMA), (CopyMode.SINGLE, Path.DMA), (CopyMode.KERNEL, Path.KERNEL)])
@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize(("piece_bytes", "count"), [(64, 1), (64, 1000), (1 << 20, 1000)])
def test_what_settings_say_is_done(copy: CopyMode, path: Path, direction: Direction, piece_bytes: int, count: int) -> None:
    assert DispatchTable(GpuCopySettings(copy=copy)).choose(direction, piece_bytes, count) is path


def test_settings_move_the_line() -> None:
    table = DispatchTable(GpuCopySettings(kernel_below_bytes=100, kernel_min_pieces=3))
    assert table.choose(Direction.LOAD, 99, 3) is Path.KERNEL
    assert table.choose(Direction.LOAD, 100, 3) is Path.DMA
    assert table.choose(Direction.LOAD, 99, 2) is Path.DMA


def test_pieces_that_may_never_go_by_kernel() -> None:
    table = DispatchTable(GpuCopySettings())
    assert table.may_choose_kernel(Direction.LOAD, 1000)
    assert not table.may_choose_kernel(Direction.LOAD, 1 << 20)
    assert not table.may_choose_kernel(Direction.SAVE, 1000)


@pytest.mark.parametrize("setting", ["descriptors_per_call", "kernel_blocks", "inflight_bytes", "pin_piece_bytes"])
def test_settings_that_cannot_be(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"gpu.{setting} = 0"):
        replace(GpuCopySettings(), **{setting: 0})  # type: ignore[arg-type]


# ---------------------------------------------------------------- in the engine


def ways(standin: Standin, rig: CudaRig, blocks: int) -> tuple[str, str]:
    """What saves and loads so many blocks of three pieces each."""
    found = []
    numbers = ids(*range(blocks))
    for copy in (
        lambda: rig.engine.save(numbers, numbers, numbers * 0, rig.engine.mark()),
        lambda: rig.engine.load(numbers, numbers, rig.engine.mark()),
    ):
        standin.clear_calls()
        copy()
        used = {"cuLaunchKernel", "cuMemcpyBatchAsync", "cuMemcpyAsync"} & set(standin.functions())
        assert len(used) == 1
        found.append(used.pop())
    return found[0], found[1]


def test_many_small_pieces_are_loaded_by_the_kernel(standin: Standin) -> None:
    rig = CudaRig.plain(standin)
    assert ways(standin, rig, 6) == ("cuMemcpyBatchAsync", "cuLaunchKernel")  # 18 pieces
    assert ways(standin, rig, 5) == ("cuMemcpyBatchAsync", "cuMemcpyBatchAsync")  # 15 pieces
    rig.close()


def test_large_pieces_do_not_even_load_the_kernels(standin: Standin) -> None:
    rig = CudaRig.plain(standin, shape=(28_672,))
    assert standin.calls("cuModuleLoadData") == []
    assert ways(standin, rig, 8) == ("cuMemcpyBatchAsync", "cuMemcpyBatchAsync")
    rig.close()


def test_layouts_that_are_not_aligned_never_go_by_kernel(standin: Standin, caplog: pytest.LogCaptureFixture) -> None:
    rig = CudaRig.plain(standin, GpuCopySettings(copy=CopyMode.KERNEL), shape=(2, 8, 15))
    assert "aligned to 8 only" not in caplog.text
    assert "the kernels move 16 bytes at a time, this layout is aligned to 16 only" not in caplog.text
    assert ways(standin, rig, 8) == ("cuLaunchKernel", "cuLaunchKernel")  # 240 bytes
    rig.close()
    rig = CudaRig.plain(standin, GpuCopySettings(copy=CopyMode.KERNEL), shape=(2, 4, 15))
    assert "the kernels move 16 bytes at a time, this layout is aligned to 8 only" in caplog.text
    assert ways(standin, rig, 8) == ("cuMemcpyBatchAsync", "cuMemcpyBatchAsync")  # 120 bytes
    rig.close()


def test_a_kernel_is_not_given_memory_that_it_knows_under_another_address(standin: Standin) -> None:
    standin.reset(Machine(host_pointer_usable=False))
    rig = CudaRig.plain(standin, GpuCopySettings(copy=CopyMode.KERNEL))
    assert ways(standin, rig, 8) == ("cuMemcpyBatchAsync", "cuMemcpyBatchAsync")
    rig.close()


def test_slots_that_are_not_pinned_go_one_by_one(standin: Standin) -> None:
    rig = CudaRig.plain(standin, GpuCopySettings(pin=False))
    assert ways(standin, rig, 8) == ("cuMemcpyAsync", "cuMemcpyAsync")
    rig.close()


@pytest.mark.parametrize("copy", [CopyMode.DMA, CopyMode.KERNEL])
def test_each_slot_goes_as_it_must_where_some_are_pinned(standin: Standin, copy: CopyMode, caplog: pytest.LogCaptureFixture) -> None:
    slot_bytes = 4096
    standin.reset(Machine(register_total_bytes=3 * slot_bytes))
    rig = CudaRig.plain(standin, GpuCopySettings(copy=copy, pin_piece_bytes=3 * slot_bytes))
    assert rig.segment.slot_bytes == slot_bytes
    before = [rig.block(number) for number in range(8)]
    assert rig.engine.save(ids(*range(8)), ids(*range(8)), ids(*[0] * 8), rig.engine.mark()).all()
    assert [rig.slot(number) for number in range(8)] == before
    rig.engine.load(ids(*range(8)), ids(*range(7, -1, -1)), rig.engine.mark())
    assert [rig.block(number) for number in range(7, -1, -1)] == before
    assert len(standin.calls("cuMemcpyAsync")) == 2 * 5 * 3
    assert "pins no more" in caplog.text
    rig.close()
