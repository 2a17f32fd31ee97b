"""The machine that the stand-in plays: versions, functions, devices, attributes, memory that may not be pinned."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator

import pytest
from tests.cuda.standin import Code, Machine, Standin, Symbol
from tests.cuda.standin_rig import PAGE, Gpu, opened, pages

pytestmark = pytest.mark.cuda


@pytest.fixture
def gpu(standin: Standin) -> Iterator[Gpu]:
    with opened(standin) as device:
        yield device


def address_of(gpu: Gpu, name: str, version: int) -> tuple[int, int | None, int]:
    """(code, address, status) of cuGetProcAddress."""
    code, answer = gpu.call("cuGetProcAddress", name.encode(), version, 0)
    address, status = answer
    return code, address, int(status)


def test_both_forms_of_a_batch_are_found_by_version(gpu: Gpu) -> None:
    older, newer = address_of(gpu, "cuMemcpyBatchAsync", 12080), address_of(gpu, "cuMemcpyBatchAsync", 13000)
    expected = [ctypes.cast(getattr(gpu.lib, name), ctypes.c_void_p).value for name in ("cuMemcpyBatchAsync", "cuMemcpyBatchAsync_v2")]
    assert [older, newer] == [(0, address, 0) for address in expected]
    assert address_of(gpu, "cuMemcpyBatchAsync", 12070) == (0, 0, 2)
    assert address_of(gpu, "cuMemcpyNothing", 13000) == (0, 0, 1)


def test_older_drivers_lack_what_is_newer(gpu: Gpu) -> None:
    gpu.standin.configure(driver_version=12080)
    assert gpu.do("cuDriverGetVersion") == 12080
    assert address_of(gpu, "cuMemcpyBatchAsync", 12080)[0] == 0
    code, _ = gpu.call("cuGetProcAddress", b"cuMemcpyBatchAsync", 13000, 0)
    assert code == Code.INVALID_VALUE
    gpu.standin.configure(driver_version=12060)
    assert address_of(gpu, "cuMemcpyBatchAsync", 12060) == (0, 0, 1)


def test_a_batch_can_be_missing_or_unsupported(gpu: Gpu) -> None:
    gpu.standin.configure(batch_12080=Symbol.MISSING)
    assert address_of(gpu, "cuMemcpyBatchAsync", 12080) == (0, 0, 1)
    assert address_of(gpu, "cuMemcpyBatchAsync", 13000)[1]
    gpu.standin.configure(batch_12080=Symbol.UNSUPPORTED)
    slots, kv, stream = gpu.pinned(), gpu.device(), gpu.stream()
    assert gpu.batch(stream, [(slots, kv, 16)], form=12080) == Code.NOT_SUPPORTED
    assert gpu.standin.stream(stream).executed == 0


@pytest.mark.parametrize(("machine", "code"), [(Machine(devices=0), Code.NO_DEVICE), (Machine(init_error=803), 803)])
def test_no_device(standin: Standin, machine: Machine, code: int) -> None:
    standin.reset(machine)
    gpu = Gpu(standin)
    assert gpu.call("cuInit", 0)[0] == code
    assert gpu.call("cuDeviceGetCount")[0] == Code.NOT_INITIALIZED
    standin.expect("initialized")


def test_devices_and_their_attributes(standin: Standin) -> None:
    standin.reset(
        Machine(devices=2, pci_bus_id="0001:AF:00.0", host_numa_id=1, host_pointer_usable=False, capability_major=12, name="Some GPU")
    )
    with opened(standin) as gpu:
        names = gpu.driver.CUdevice_attribute
        expected = {
            "MULTIPROCESSOR_COUNT": 132,
            "ASYNC_ENGINE_COUNT": 3,
            "COMPUTE_CAPABILITY_MAJOR": 12,
            "COMPUTE_CAPABILITY_MINOR": 0,
            "CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM": 0,
            "HOST_REGISTER_SUPPORTED": 1,
            "PAGEABLE_MEMORY_ACCESS": 0,
            "HOST_NUMA_ID": 1,
            "PCI_DOMAIN_ID": 1,
            "PCI_BUS_ID": 0xB0,
            "UNIFIED_ADDRESSING": 1,
            "STREAM_PRIORITIES_SUPPORTED": 1,
        }
        found = {name: gpu.do("cuDeviceGetAttribute", getattr(names, f"CU_DEVICE_ATTRIBUTE_{name}"), 1) for name in expected}
        assert found == expected
        assert [gpu.do("cuDeviceGetPCIBusId", 32, i).split(b"\0")[0] for i in (0, 1)] == [b"0001:AF:00.0", b"0001:b0:00.0"]
        assert int(gpu.do("cuDeviceGetByPCIBusId", b"0001:b0:00.0")) == 1
        assert gpu.do("cuDeviceGetName", 64, 0).split(b"\0")[0] == b"Some GPU"
        assert gpu.do("cuDeviceTotalMem", 0) == 80 << 30
        assert gpu.call("cuDeviceGetAttribute", names.CU_DEVICE_ATTRIBUTE_MAX_PITCH, 0)[0] == Code.INVALID_VALUE
        standin.expect("argument")  # rather told than guessed


def test_streams_say_their_priority_and_flags(gpu: Gpu) -> None:
    least, greatest = gpu.do("cuCtxGetStreamPriorityRange")
    assert (least, greatest) == (0, -5)
    for asked, given in ((0, 0), (-2, -2), (-9, -5), (7, 0)):
        stream = gpu.do("cuStreamCreateWithPriority", 1, asked)
        assert (gpu.do("cuStreamGetPriority", stream), gpu.do("cuStreamGetFlags", stream)) == (given, 1)
        gpu.do("cuStreamDestroy", stream)
    assert gpu.do("cuStreamGetFlags", gpu.stream(flags=0)) == 0


def test_registration_can_be_refused(gpu: Gpu) -> None:
    memory = pages(8)

    def register(first: int, count: int) -> int:
        return gpu.call("cuMemHostRegister", memory.ctypes.data + first * PAGE, count * PAGE, 3)[0]

    gpu.standin.configure(register_limit_bytes=4 * PAGE)
    assert register(0, 4) == Code.INVALID_VALUE
    gpu.standin.configure(register_total_bytes=5 * PAGE, register_error=Code.NOT_PERMITTED)
    assert [register(0, 3), register(3, 3), register(3, 2)] == [0, Code.NOT_PERMITTED, 0]
    gpu.standin.configure(host_register_supported=False)
    assert register(5, 1) == Code.NOT_SUPPORTED
    for first in (0, 3):
        gpu.do("cuMemHostUnregister", memory.ctypes.data + first * PAGE)
    assert gpu.standin.violations() == []  # refusals of the machine are no mistakes


def test_registration_takes_time(gpu: Gpu) -> None:
    gpu.standin.configure(register_ms_per_gib=1 << 18)  # a millisecond per page
    start = time.monotonic()
    gpu.pinned(20)
    assert time.monotonic() - start > 0.015


@pytest.mark.parametrize("usable", [True, False])
def test_where_the_device_sees_pinned_memory(gpu: Gpu, usable: bool) -> None:
    gpu.standin.configure(host_pointer_usable=usable)
    slots = gpu.pinned()
    seen = int(gpu.do("cuMemHostGetDevicePointer", slots.ctypes.data + 100, 0))
    assert (seen == slots.ctypes.data + 100) == usable
    attribute = gpu.driver.CUpointer_attribute
    assert int(gpu.do("cuPointerGetAttribute", attribute.CU_POINTER_ATTRIBUTE_DEVICE_POINTER, slots.ctypes.data + 100)) == seen
    assert int(gpu.do("cuPointerGetAttribute", attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, slots.ctypes.data)) == 1
    assert int(gpu.do("cuPointerGetAttribute", attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, gpu.device().ctypes.data)) == 2
    assert gpu.call("cuPointerGetAttribute", attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, pages(1).ctypes.data)[0] == Code.INVALID_VALUE


def test_the_device_s_memory_is_finite_and_not_zero(gpu: Gpu) -> None:
    gpu.standin.configure(total_memory_bytes=8 * PAGE)
    first = gpu.do("cuMemAlloc", 6 * PAGE)
    assert gpu.call("cuMemAlloc", 3 * PAGE)[0] == Code.OUT_OF_MEMORY
    assert ctypes.string_at(int(first), 2) == b"\xa5\xa5"
    assert gpu.do("cuMemGetInfo") == (2 * PAGE, 8 * PAGE)
    gpu.do("cuMemFree", first)
    gpu.do("cuMemFree", gpu.do("cuMemAlloc", 8 * PAGE))


def test_the_primary_context_goes_with_its_last_holder(standin: Standin) -> None:
    standin.reset(Machine(primary_retained=False))
    gpu = Gpu(standin).open()
    assert gpu.do("cuDevicePrimaryCtxGetState", 0) == (0, 1)
    gpu.do("cuDevicePrimaryCtxRelease", 0)
    assert gpu.call("cuStreamCreate", 1)[0] == Code.CONTEXT_IS_DESTROYED
    standin.expect("destroyed-handle")


def test_on_a_machine_that_reads_pageable_memory_a_batch_may_too(standin: Standin) -> None:
    standin.reset(Machine(pageable_access=True))
    with opened(standin) as gpu:
        memory, stream = pages(1), gpu.stream()
        assert gpu.batch(stream, [(memory, gpu.device(value=9), 16)]) == 0
        gpu.do("cuStreamSynchronize", stream)
        assert memory[15] == 9
