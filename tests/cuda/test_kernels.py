from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
from tests.copy.rigs import ids
from tests.cuda.rigs import CudaRig
from tests.cuda.standin import Code, Machine, Standin

from kvoffload.cuda.driver import CudaError
from kvoffload.cuda.kernels import load_image
from kvoffload.cuda.settings import CopyMode, GpuCopySettings

pytestmark = pytest.mark.cuda

KERNEL = GpuCopySettings(copy=CopyMode.KERNEL)


def round_trip(standin: Standin, copy: CopyMode, shape: tuple[int, ...], layers: int) -> tuple[str, str]:
    """Digests of all slots and all blocks after a save of half of the blocks into random slots and a load into the others."""
    settings = GpuCopySettings(copy=copy, descriptors_per_call=13, inflight_bytes=1 << 16)
    rig = CudaRig.plain(standin, settings, blocks=40, slots=40, layers=layers, shape=shape)
    rig.segment.array[:] = 0x5A
    random = np.random.default_rng(5)
    blocks, slots = random.permutation(40).astype(np.int64), random.permutation(40).astype(np.int64)[:20]
    assert rig.engine.save(blocks[:20], slots, np.zeros(20, np.int64), rig.engine.mark()).all()
    rig.engine.load(slots, blocks[20:], rig.engine.mark())
    found = rig.segment.array.tobytes(), b"".join(rig.block(number) for number in range(40))
    rig.close()
    return hashlib.sha256(found[0]).hexdigest(), hashlib.sha256(found[1]).hexdigest()


@pytest.mark.parametrize("is_reverse", [False, True])
@pytest.mark.parametrize("shape", [(16,), (2, 8, 16), (3, 4096, 16)])
@pytest.mark.parametrize("layers", [1, 7])
def test_kernels_and_dma_leave_the_same_bytes(standin: Standin, shape: tuple[int, ...], layers: int, is_reverse: bool) -> None:
    standin.configure(kernel_reverse=is_reverse)
    by_kernel = round_trip(standin, CopyMode.KERNEL, shape, layers)
    assert standin.calls("cuMemcpyBatchAsync") == []
    assert standin.calls("cuLaunchKernel")
    assert by_kernel == round_trip(standin, CopyMode.DMA, shape, layers)


def test_the_grid_is_small_and_not_larger_than_the_work(standin: Standin) -> None:
    rig = CudaRig.plain(standin, GpuCopySettings(copy=CopyMode.KERNEL, kernel_blocks=5))
    for count in (1, 8):
        rig.engine.load(ids(*range(count)), ids(*range(count)), rig.engine.mark())
    assert [call.arguments["grid"] for call in standin.calls("cuLaunchKernel")] == [3, 5]
    rig.close()


def test_saves_gather_and_loads_scatter_each_in_its_own_stream(standin: Standin) -> None:
    rig = CudaRig.plain(standin, KERNEL)
    rig.engine.save(ids(1), ids(1), ids(0), rig.engine.mark())
    rig.engine.load(ids(1), ids(2), rig.engine.mark())
    calls = standin.calls("cuLaunchKernel")
    assert [call.arguments["kernel"] for call in calls] == ["kv_gather", "kv_scatter"]
    assert [call.arguments["stream"] for call in calls] == [rig.lane("save"), rig.lane("load")]
    rig.close()


def test_all_is_loaded_before_the_first_step(standin: Standin) -> None:
    rig = CudaRig.plain(standin, KERNEL)
    unsafe = {"cuModuleLoadData", "cuModuleGetFunction", "cuMemAlloc", "cuMemHostAlloc", "cuMemcpyHtoD", "cuStreamCreateWithPriority"}
    assert unsafe <= set(standin.functions())
    standin.clear_calls()
    rig.engine.save(ids(1), ids(1), ids(0), rig.engine.mark())
    rig.engine.load(ids(1), ids(2), rig.engine.mark())
    assert unsafe.isdisjoint(standin.functions())
    rig.close()


def test_no_kernel_is_faster_than_the_table_that_it_reads(standin: Standin) -> None:
    """It is copied from ordinary memory in the default stream, which no stream of ours waits for."""
    standin.delay(0, 0.2)
    rig = CudaRig.plain(standin, KERNEL)
    rig.engine.save(ids(1), ids(1), ids(0), rig.engine.mark())
    assert rig.slot(1) == rig.block(1)
    rig.close()


def test_the_image_is_a_fatbin() -> None:
    assert load_image()[:4] == (0xBA55ED50).to_bytes(4, "little")


@pytest.mark.parametrize(
    "fail",
    [
        lambda standin: standin.fail("cuModuleLoadData", Code.NO_BINARY_FOR_GPU),
        lambda standin: standin.fail("cuModuleGetFunction", Code.NOT_FOUND, at=2),
        lambda standin: standin.fail("cuMemAlloc", Code.OUT_OF_MEMORY),
        lambda standin: standin.fail("cuMemcpyHtoD", Code.UNKNOWN),
        lambda standin: standin.fail("cuMemHostAlloc", Code.OUT_OF_MEMORY),
    ],
    ids=["image", "function", "device memory", "runs", "ids"],
)
def test_without_kernels_dma_does_it(standin: Standin, fail: Callable[[Standin], None], caplog: pytest.LogCaptureFixture) -> None:
    standin.reset(Machine())
    fail(standin)
    rig = CudaRig.plain(standin)
    assert "blocks are copied by DMA" in caplog.text
    before = [rig.block(number) for number in range(8)]
    rig.engine.save(ids(*range(8)), ids(*range(8)), ids(*[0] * 8), rig.engine.mark())
    rig.engine.load(ids(*range(8)), ids(*range(7, -1, -1)), rig.engine.mark())
    assert [rig.block(number) for number in range(7, -1, -1)] == before
    assert standin.calls("cuLaunchKernel") == []
    rig.close()


def test_a_launch_that_fails_is_an_error_and_the_last_one(standin: Standin, caplog: pytest.LogCaptureFixture) -> None:
    rig = CudaRig.plain(standin, KERNEL)
    standin.fail("cuLaunchKernel", Code.LAUNCH_OUT_OF_RESOURCES)
    with pytest.raises(CudaError, match="cuLaunchKernel failed: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"):
        rig.engine.load(ids(1), ids(2), rig.engine.mark())
    assert "the copy kernel cannot be started" in caplog.text
    rig.engine.save(ids(3), ids(1), ids(0), rig.engine.mark())
    rig.engine.load(ids(1), ids(2), rig.engine.mark())
    assert rig.block(2) == rig.block(3)
    failed, gathered = standin.calls("cuLaunchKernel")
    assert failed.code == Code.LAUNCH_OUT_OF_RESOURCES
    assert gathered.arguments["kernel"] == "kv_gather"
    rig.close()
