"""Modules and launches on the stand-in: the kernels of the wheel, run on this CPU."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from tests.cuda.standin import Code, Machine, Standin
from tests.cuda.standin_launch import Launch, fatbin, load_kernel
from tests.cuda.standin_rig import Gpu, opened

pytestmark = pytest.mark.cuda


@pytest.fixture
def gpu(standin: Standin) -> Iterator[Gpu]:
    with opened(standin) as device:
        yield device


@pytest.mark.parametrize("reverse", [True, False])
def test_a_scatter_runs_at_its_place_in_the_stream(gpu: Gpu, reverse: bool) -> None:
    gpu.standin.configure(kernel_reverse=reverse)
    stream, launch = gpu.stream(), Launch(gpu)
    gpu.standin.hold(stream)
    gpu.do("cuMemsetD8Async", launch.kv.ctypes.data + 2 * 256, 7, 64, stream)
    launch.slots[1024 + 64 : 1024 + 128] = np.arange(64)
    assert launch(stream) == 0
    launch.slots[1024 + 64] = 99  # a kernel reads when it runs
    assert (launch.kv == 0).all()
    gpu.standin.release(stream)
    gpu.do("cuStreamSynchronize", stream)
    assert launch.kv[512 : 512 + 64].tolist() == [99, *range(1, 64)]
    assert (launch.kv[:512] == 0).all()
    assert (launch.kv[576:] == 0).all()


def test_ids_out_of_bounds_are_skipped(gpu: Gpu) -> None:
    stream, launch = gpu.stream(), Launch(gpu, count=3)
    launch.tables[8:11], launch.tables[16:19] = (1 << 40, 2, 3), (0, 1, 1 << 50)
    launch.slots[:] = 3
    assert launch(stream, grid=12) == 0
    gpu.do("cuStreamSynchronize", stream)
    assert np.flatnonzero(launch.kv).tolist() == list(range(512, 576))


def test_where_only_the_device_s_pointer_is_good_the_host_s_is_refused(gpu: Gpu) -> None:
    gpu.standin.configure(host_pointer_usable=False)
    stream, launch = gpu.stream(), Launch(gpu)
    for name in ("runs", "blocks", "slots", "slot_base"):
        launch.values[name] = int(gpu.do("cuMemHostGetDevicePointer", launch.values[name], 0))
    launch.slots[:] = 3
    assert launch(stream) == 0
    gpu.do("cuStreamSynchronize", stream)
    assert launch.kv[512] == 3
    launch.values["slot_base"] = launch.slots.ctypes.data
    assert launch(stream) == 0
    assert gpu.call("cuStreamSynchronize", stream)[0] == Code.ILLEGAL_ADDRESS
    gpu.standin.expect("launch-memory")


def test_a_slot_that_is_not_pinned_is_out_of_reach(gpu: Gpu) -> None:
    stream, launch = gpu.stream(), Launch(gpu)
    launch.tables[16] = 200  # behind all that is registered
    launch.values["num_slots"] = 1000
    assert launch(stream) == 0
    assert gpu.call("cuStreamSynchronize", stream)[0] == Code.ILLEGAL_ADDRESS
    assert "slot 200" in gpu.standin.expect("launch-memory")[0].text


@pytest.mark.parametrize(("major", "minor", "code"), [(8, 0, 0), (9, 0, 0), (12, 1, 0), (7, 5, Code.NO_BINARY_FOR_GPU)])
def test_the_image_must_have_something_for_the_device(standin: Standin, major: int, minor: int, code: int) -> None:
    standin.reset(Machine(capability_major=major, capability_minor=minor))
    with opened(standin) as gpu:
        found, module = gpu.call("cuModuleLoadData", fatbin())
        assert found == code
        if not code:
            gpu.do("cuModuleUnload", module)


def test_an_image_that_was_cut_is_refused(gpu: Gpu) -> None:
    _, image = load_kernel(gpu)
    damaged = image[:16] + b"\0" * (len(image) - 16)
    assert gpu.call("cuModuleLoadData", damaged)[0] == Code.INVALID_IMAGE
    gpu.standin.expect("image")


def test_functions_by_name_and_by_library(gpu: Gpu) -> None:
    _, image = load_kernel(gpu)
    library = gpu.do("cuLibraryLoadData", image, [], [], 0, [], [], 0)
    kernel = gpu.do("cuLibraryGetKernel", library, b"kv_gather")
    assert gpu.call("cuLibraryGetKernel", library, b"kv_other")[0] == Code.NOT_FOUND
    assert gpu.do("cuFuncGetParamInfo", int(gpu.do("cuKernelGetFunction", kernel)), 4) == (32, 4)
    sizes = [gpu.do("cuKernelGetParamInfo", kernel, i)[1] for i in range(9)]
    assert sizes == [8, 4, 8, 8, 4, 8, 8, 8, 8]
    assert gpu.call("cuKernelGetParamInfo", kernel, 9)[0] == Code.INVALID_VALUE
    gpu.do("cuLibraryUnload", library)
    assert gpu.call("cuKernelGetFunction", kernel)[0] == Code.INVALID_HANDLE
    gpu.standin.expect("destroyed-handle")


def test_a_module_is_not_unloaded_under_its_kernel(gpu: Gpu) -> None:
    stream, launch = gpu.stream(), Launch(gpu)
    gpu.standin.hold(stream)
    assert launch(stream) == 0
    (module,) = gpu.standin.live("module")
    gpu.do("cuModuleUnload", module.handle)
    gpu.standin.expect("memory-busy")
    gpu.standin.release(stream)
    gpu.close()  # unloads it again
    assert "no longer a module" in gpu.standin.expect("destroyed-handle")[0].text
