from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.copy.rigs import ids
from tests.cuda.rigs import CudaRig, Running
from tests.cuda.standin import BatchOrder, Call, Code, Machine, Standin, Symbol

from kvoffload.cuda.driver import CudaError
from kvoffload.cuda.settings import CopyMode, GpuCopySettings

pytestmark = pytest.mark.cuda

STREAM, ANY = 1, 3  # CUmemcpySrcAccessOrder
DMA = GpuCopySettings(copy=CopyMode.DMA)


def there_and_back(rig: CudaRig) -> None:
    """Through the slots into other blocks."""
    before = [rig.block(number) for number in range(3)]
    rig.engine.save(ids(0, 1, 2), ids(5, 6, 7), ids(0, 0, 0), rig.engine.mark())
    rig.engine.load(ids(5, 6, 7), ids(3, 4, 5), rig.engine.mark())
    assert [rig.block(number) for number in (3, 4, 5)] == before


def batches(standin: Standin) -> list[Call]:
    return standin.calls("cuMemcpyBatchAsync")


@pytest.mark.parametrize("order", list(BatchOrder))
@pytest.mark.parametrize(
    ("machine", "form"),
    [
        (Machine(), "12080"),
        (Machine(driver_version=12080), "12080"),
        (Machine(batch_12080=Symbol.MISSING), "13000"),
    ],
)
def test_which_form_of_the_call(standin: Standin, machine: Machine, form: str, order: BatchOrder) -> None:
    standin.reset(replace(machine, batch_order=order))
    rig = CudaRig.plain(standin, DMA)
    there_and_back(rig)
    assert [call.arguments["form"] for call in batches(standin)] == [form, form]
    assert standin.calls("cuMemcpyAsync") == []
    rig.close()


@pytest.mark.parametrize(
    "machine",
    [
        Machine(batch_12080=Symbol.MISSING, batch_13000=Symbol.MISSING),
        Machine(driver_version=12040),
    ],
)
def test_a_driver_without_batches(standin: Standin, machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    standin.reset(machine)
    rig = CudaRig.plain(standin, DMA)
    there_and_back(rig)
    assert batches(standin) == []
    assert len(standin.calls("cuMemcpyAsync")) == 2 * 3 * 3
    assert "no cuMemcpyBatchAsync" in caplog.text
    rig.close()


def test_batches_that_turn_out_not_to_work_are_not_tried_again(standin: Standin, caplog: pytest.LogCaptureFixture) -> None:
    standin.reset(Machine(batch_12080=Symbol.UNSUPPORTED))
    rig = CudaRig.plain(standin, DMA)
    there_and_back(rig)
    there_and_back(rig)
    assert [call.code for call in batches(standin)] == [Code.NOT_SUPPORTED]
    assert caplog.text.count("batches of copies do not work here") == 1
    rig.close()


def test_no_batch_where_settings_say_so(standin: Standin, caplog: pytest.LogCaptureFixture) -> None:
    rig = CudaRig.plain(standin, GpuCopySettings(copy=CopyMode.SINGLE))
    there_and_back(rig)
    assert batches(standin) == []
    assert caplog.text == ""
    rig.close()


def test_saves_are_read_in_stream_order_and_loads_at_any_time(standin: Standin) -> None:
    rig = CudaRig.plain(standin, DMA)
    there_and_back(rig)
    save, load = batches(standin)
    assert set(save.arguments["orders"]) == {STREAM}
    assert set(load.arguments["orders"]) == {ANY}
    assert save.arguments["attributes"] == load.arguments["attributes"] == 1
    assert save.arguments["stream"] != load.arguments["stream"]
    rig.close()


def test_descriptors_are_capped(standin: Standin) -> None:
    rig = CudaRig.plain(standin, replace(DMA, descriptors_per_call=50), blocks=64, slots=64)
    everything = np.arange(64, dtype=np.int64)
    assert rig.engine.save(everything, everything, np.zeros(64, np.int64), rig.engine.mark()).all()
    assert [call.arguments["count"] for call in batches(standin)] == [50, 50, 50, 42]
    assert [rig.slot(number) for number in range(64)] == [rig.block(number) for number in range(64)]
    rig.close()


def test_as_many_descriptors_as_a_call_may_have_are_one_call(standin: Standin) -> None:
    rig = CudaRig.plain(standin, replace(DMA, descriptors_per_call=24))
    everything = np.arange(8, dtype=np.int64)
    rig.engine.save(everything, everything, np.zeros(8, np.int64), rig.engine.mark())
    assert [call.arguments["count"] for call in batches(standin)] == [24]
    rig.close()


def test_nothing_to_copy_is_no_call_at_all(standin: Standin) -> None:
    rig = CudaRig.plain(standin, DMA)
    mark = rig.engine.mark()
    standin.clear_calls()
    rig.engine.save(ids(), ids(), ids(), mark)
    rig.engine.load(ids(), ids(), mark)
    assert standin.functions() == []
    rig.close()


@pytest.mark.parametrize("copy", [CopyMode.DMA, CopyMode.SINGLE, CopyMode.KERNEL])
def test_only_so_many_bytes_are_under_way_at_once(standin: Standin, copy: CopyMode) -> None:
    """Two windows of two blocks each (768 bytes a block), until the first has ended."""
    settings = GpuCopySettings(copy=copy, inflight_bytes=4 * 768)
    rig = CudaRig.plain(standin, settings)
    before = [rig.block(number) for number in range(8)]
    lane = rig.lane("save")
    standin.hold(lane)
    everything = np.arange(8, dtype=np.int64)
    saving = Running(lambda: rig.engine.save(everything, everything, np.zeros(8, np.int64), rig.engine.mark()))
    standin.wait_blocked("cuEventSynchronize")
    kinds = standin.stream(lane).kinds
    assert kinds.count("record") == 2
    assert kinds.count({CopyMode.DMA: "batch", CopyMode.SINGLE: "copy", CopyMode.KERNEL: "kernel"}[copy]) == (
        2 * 2 * 3 if copy is CopyMode.SINGLE else 2
    )
    standin.release(lane)
    assert saving.result().all()
    assert [rig.slot(number) for number in range(8)] == before
    rig.close()


def test_a_piece_larger_than_what_may_be_under_way_goes_alone(standin: Standin) -> None:
    rig = CudaRig.plain(standin, replace(DMA, inflight_bytes=2))
    there_and_back(rig)
    assert {call.arguments["count"] for call in batches(standin)} == {1}
    rig.close()


@pytest.mark.parametrize("form", ["12080", "13000"])
def test_the_copy_that_was_wrong_is_named_where_the_driver_tells(standin: Standin, form: str) -> None:
    standin.reset(Machine(batch_12080=Symbol.PRESENT if form == "12080" else Symbol.MISSING))
    rig = CudaRig.plain(standin, DMA)
    standin.forget(rig.memory.pop(1))
    where = " at copy 1 of a batch" if form == "12080" else ""
    with pytest.raises(CudaError, match=rf"cuMemcpyBatchAsync failed{where}: CUDA_ERROR_INVALID_VALUE"):
        rig.engine.save(ids(0), ids(0), ids(0), rig.engine.mark())
    standin.expect("batch-pageable")
    rig.close()
