from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from tests.cuda.rigs import Running
from tests.cuda.standin import Code, Machine, Standin

from kvoffload.copy.choose import why_no_gpu
from kvoffload.cuda.driver import CudaError, Driver
from kvoffload.errors import CopyError, UnsupportedError

pytestmark = pytest.mark.cuda


@pytest.fixture
def driver(standin: Standin) -> Iterator[Driver]:
    opened = Driver.open(0)
    yield opened
    opened.close()


def test_what_it_says_of_the_device(standin: Standin) -> None:
    standin.reset(
        Machine(devices=2, name="Some GPU", capability_major=12, capability_minor=1, pci_bus_id="0000:3b:00.0", driver_version=12090)
    )
    driver = Driver.open(1)
    assert (driver.ordinal, driver.name, driver.capability, driver.driver_version) == (1, "Some GPU", (12, 1), 12090)
    assert driver.pci_bus_id == "0000:3c:00.0"
    driver.close()


def test_the_context_is_the_primary_one_and_given_back_once(standin: Standin) -> None:
    driver = Driver.open(0)
    assert len(standin.calls("cuDevicePrimaryCtxRetain")) == 1
    assert standin.calls("cuCtxCreate") == []
    driver.close()
    driver.close()
    assert len(standin.calls("cuDevicePrimaryCtxRelease")) == 1


def test_a_context_is_bound_once_in_each_thread(standin: Standin, driver: Driver) -> None:
    def use() -> None:
        driver.bind()
        driver.bind()
        driver.call("cuEventDestroy", driver.call("cuEventCreate", 3))

    use()
    Running(use).result()
    bound = standin.calls("cuCtxSetCurrent")
    assert len(bound) == len({call.thread for call in bound}) == 2


def test_a_callers_thread_has_its_own_context_back(standin: Standin) -> None:
    """It may have chosen another device since: what was bound there once says nothing."""
    standin.reset(Machine(devices=2))
    ours, theirs = Driver.open(0), Driver.open(1)

    def use() -> None:
        ours.bind()
        theirs.call("cuCtxSetCurrent", theirs._context)  # as torch.cuda.set_device does it, unknown to us
        with ours.pushed():
            assert int(ours.call("cuCtxGetCurrent")) == int(ours._context)
            ours.call("cuEventDestroy", ours.call("cuEventCreate", 3))
        assert int(ours.call("cuCtxGetCurrent")) == int(theirs._context)

    Running(use).result()
    ours.close()
    theirs.close()


def test_a_thread_without_a_context_is_refused(standin: Standin, driver: Driver) -> None:
    driver.bind()
    with pytest.raises(CudaError, match=r"cuEventCreate failed: CUDA_ERROR_INVALID_CONTEXT \(201\)"):
        Running(lambda: driver.call("cuEventCreate", 3)).result()
    standin.expect("context")


def test_another_driver_in_the_same_thread_is_bound_anew(standin: Standin) -> None:
    standin.reset(Machine(devices=2))
    first, second = Driver.open(0), Driver.open(1)
    for driver in (first, second, first):
        driver.bind()
    contexts = [call.arguments["context"] for call in standin.calls("cuCtxSetCurrent")]
    assert contexts[0] == contexts[2] != contexts[1]
    first.close()
    second.close()


def test_one_that_is_opened_after_another_was_closed_is_bound(standin: Standin) -> None:
    for _ in range(2):
        driver = Driver.open(0)
        driver.bind()
        driver.close()
    assert len(standin.calls("cuCtxSetCurrent")) == 2


@pytest.mark.parametrize(
    ("code", "name", "advice"),
    [
        (Code.OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "gpu_memory_utilization"),
        (Code.ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "must be restarted"),
        (Code.STREAM_CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "graph was being captured"),
        (Code.NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "gpu.copy = single"),
        (Code.UNKNOWN, "CUDA_ERROR_UNKNOWN", "doctor --gpu"),
    ],
)
def test_an_error_names_the_function_and_what_to_do(standin: Standin, driver: Driver, code: Code, name: str, advice: str) -> None:
    driver.bind()
    standin.fail("cuCtxGetStreamPriorityRange", code)
    with pytest.raises(CudaError, match=rf"cuCtxGetStreamPriorityRange failed: {name} \({code.value}\): .*{advice}") as caught:
        driver.call("cuCtxGetStreamPriorityRange")
    assert (caught.value.function, caught.value.code, caught.value.name) == ("cuCtxGetStreamPriorityRange", code, name)
    assert isinstance(caught.value, CopyError)


def test_a_code_that_the_bindings_do_not_know(standin: Standin, driver: Driver) -> None:
    assert "cuX failed: an error that cuda-bindings does not know (12345)" in str(driver.error("cuX", 12345))


def test_functions_are_found_by_name_and_version(standin: Standin, driver: Driver) -> None:
    old, new = driver.address("cuMemcpyBatchAsync", 12080), driver.address("cuMemcpyBatchAsync", 13000)
    assert old
    assert new
    assert old != new
    assert driver.address("cuMemcpyBatchAsync", 12000) == 0
    assert driver.address("cuNothing", 12000) == 0
    standin.configure(driver_version=12040)
    assert driver.address("cuMemcpyBatchAsync", 12080) == 0


# ---------------------------------------------------------------- no CUDA


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        (Machine(devices=0), "CUDA_VISIBLE_DEVICES"),
        (Machine(init_error=803), "different versions"),
        (Machine(init_error=804), "kernel module is too old"),
        (Machine(driver_version=11040), r"up to 11\.4, 12\.0 is needed: update it"),
    ],
)
def test_why_there_is_no_cuda(standin: Standin, machine: Machine, reason: str) -> None:
    standin.reset(machine)
    with pytest.raises(UnsupportedError, match=f"^no CUDA: .*{reason}"):
        Driver.open(0)
    said = why_no_gpu()
    assert said is not None
    assert said.startswith("no CUDA: ")
    assert "\n" not in said


def test_a_gpu_that_is_not_there(standin: Standin) -> None:
    with pytest.raises(UnsupportedError, match="there is no GPU 1, this process sees 1"):
        Driver.open(1)


def test_a_gpu_that_somebody_has_for_himself(standin: Standin) -> None:
    standin.fail("cuDevicePrimaryCtxRetain", 46)
    with pytest.raises(UnsupportedError, match="compute mode"):
        Driver.open(0)


def test_there_is_cuda_and_asking_makes_no_context(standin: Standin) -> None:
    assert why_no_gpu() is None
    assert {"cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"}.isdisjoint(standin.functions())


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("", "libcuda.so.1 cannot be loaded"),
        ("sys.modules['cuda'] = None", "cuda-bindings is not installed"),
    ],
)
def test_a_machine_without_a_gpu(before: str, reason: str) -> None:
    """In a process without the stand-in."""
    code = f"""
import sys
sys.path[:] = {sys.path!r}
{before}
import numpy as np
from kvoffload.copy.choose import make_engine, why_no_gpu
from kvoffload.layout import BlockLayout
from kvoffload.ledger import Ledger
from kvoffload.segment import Segment
layout = BlockLayout.from_tensors({{"a": np.zeros((8, 64), np.uint8)}}, 8)
engine = make_engine(layout, Segment.create(1 << 16, 4096), Ledger(8))
print(engine.name, "|", why_no_gpu())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=50)
    engine, _, said = done.stdout.partition(" | ")
    assert engine == "host"
    assert said.startswith("no CUDA: ")
    assert reason in said
    assert said.count("\n") == 1
