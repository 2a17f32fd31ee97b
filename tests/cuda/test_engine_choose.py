from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest
from tests.cuda.rigs import CudaRig, aligned
from tests.cuda.standin import Machine, Standin

from kvoffload.copy.choose import make_engine
from kvoffload.copy.cuda import CudaCopyEngine, Gpu
from kvoffload.copy.host import HostCopyEngine
from kvoffload.cuda.driver import Driver
from kvoffload.cuda.pinned import PinnedSegment
from kvoffload.cuda.settings import GpuCopySettings
from kvoffload.errors import LayoutError, UnsupportedError
from kvoffload.layout import BlockLayout
from kvoffload.ledger import Ledger
from kvoffload.segment import Segment

pytestmark = pytest.mark.cuda


@pytest.fixture
def layout() -> BlockLayout:
    """In ordinary memory; 4096 bytes a slot."""
    return BlockLayout.from_tensors({"a": aligned((8, 256))}, 8)


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = Segment.create(8 * 4096, 4096)
    yield made
    made.close()


def test_ordinary_memory_is_copied_by_the_host_engine(standin: Standin, layout: BlockLayout, segment: Segment) -> None:
    engine = make_engine(layout, segment, Ledger(8))
    assert isinstance(engine, HostCopyEngine)
    assert standin.functions() == []
    assert engine.prepare_slots(5) == 5
    engine.close()


def test_memory_of_a_gpu_is_copied_by_that_gpu(standin: Standin) -> None:
    standin.reset(Machine(devices=2))
    rig = CudaRig.plain(standin)
    assert rig.cuda.gpu.driver.ordinal == 0
    other = make_engine(replace(rig.layout, device="cuda:1"), rig.segment, rig.ledger, GpuCopySettings(pin=False), lambda: rig.stream)
    assert isinstance(other, CudaCopyEngine)
    assert other.gpu.driver.ordinal == 1
    other.close()
    rig.close()


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("cuda:1", "no CUDA: there is no GPU 1"),
        ("cuda:x", "no copy engine for KV on device 'cuda:x'"),
        ("xpu:0", "no copy engine for KV on device 'xpu:0'"),
    ],
)
def test_devices_that_are_not_there(standin: Standin, layout: BlockLayout, segment: Segment, device: str, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        make_engine(replace(layout, device=device), segment, Ledger(8), GpuCopySettings(), lambda: 0)
    standin.check()


def test_parts_that_do_not_fit_leave_nothing(standin: Standin, layout: BlockLayout, segment: Segment) -> None:
    on_gpu = replace(layout, device="cuda:0")
    with closing(Segment.create(1 << 16, 8192)) as wide, pytest.raises(LayoutError, match="slots of 8192 bytes"):
        make_engine(on_gpu, wide, Ledger(8), GpuCopySettings(), lambda: 0)
    with pytest.raises(LayoutError, match="9 blocks"):
        make_engine(on_gpu, segment, Ledger(9), GpuCopySettings(), lambda: 0)
    driver = Driver.open(0)
    with pytest.raises(LayoutError, match="this is on cpu"):
        CudaCopyEngine(
            layout, segment, Ledger(8), Gpu(driver, PinnedSegment(driver, segment, piece_bytes=4096), lambda: 0), GpuCopySettings()
        )
    standin.check()
