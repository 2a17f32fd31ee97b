"""`kvoffload doctor --gpu` on the stand-in: that it tries everything, finds what is wrong, says so, and never falls over.

What it measures here says nothing of a GPU, and it has to say that too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.cuda.standin import Code, Standin, Symbol

from kvoffload.cli.doctor import run_doctor
from kvoffload.copy.engine import CopyEngine, Ids
from kvoffload.cuda.driver import Driver
from kvoffload.cuda.settings import GpuCopySettings
from kvoffload.doctor.gpu import Scale, check_gpu
from kvoffload.doctor.gpu_facts import NOT_A_GPU
from kvoffload.doctor.gpu_layouts import all_caches, pages
from kvoffload.doctor.gpu_memory import DeviceMemory, Mirrored, Rig, Twins
from kvoffload.doctor.gpu_proof import WAYS, check_cache
from kvoffload.doctor.report import BEGIN, END, Finding, State
from kvoffload.testing.copy_faults import FaultyCopyEngine

pytestmark = pytest.mark.cuda

CACHES = all_caches(5)
SMALL = Scale(pin_bytes=4 << 20, busy_bytes=64 << 10, caches=CACHES)
LAYOUTS = len(CACHES)


@pytest.fixture
def driver(standin: Standin) -> Iterator[Driver]:
    opened = Driver.open(0)
    yield opened
    opened.close()


def doctor(capsys: pytest.CaptureFixture[str], **options: Callable[[CopyEngine], CopyEngine]) -> tuple[int, list[str]]:
    """Its status, and the lines that are to be pasted."""
    status = run_doctor(gpu=True, scale=SMALL, **options)  # type: ignore[arg-type]
    lines = capsys.readouterr().out.splitlines()
    return status, lines[lines.index(BEGIN) : lines.index(END) + 1]


def checks_of(lines: list[str]) -> dict[str, list[str]]:
    """Of what is to be pasted: the checks by their state."""
    inside = lines[lines.index("[checks]") + 1 : lines.index("[versions]")]
    return {state.value: [line for line in inside if f"  {state.value} " in line] for state in State}


def test_where_all_is_well_all_is_tried_and_the_stand_in_is_called_one(standin: Standin, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = doctor(capsys)
    checks = checks_of(lines)
    assert (status, len(checks["ok"]), checks["missing"], checks["FAILED"]) == (0, 3 + len(WAYS) * LAYOUTS, [], [])
    names = {name for line in checks["ok"] for name in ("DMA", "kernel", "single copies", "unpinned") if f", {name} " in line}
    assert names == {way.name for way in WAYS}
    assert lines[1:3] == ["[result]", lines[2]]
    assert "NOT of a GPU" in lines[2]
    assert any(NOT_A_GPU in line for line in lines)
    for told in ("GPU ", "Stand-in GPU, compute capability 9.0", "0000:65:00.0", "limit on locked memory", "cuda-bindings", "libcuda"):
        assert any(told in line for line in lines), told
    kinds = {call.function for call in standin.calls()}
    assert {"cuMemcpyBatchAsync", "cuLaunchKernel", "cuMemcpyAsync", "cuMemHostRegister"} <= kinds


def wrapped(fault: Callable[[FaultyCopyEngine], None]) -> Callable[[CopyEngine], CopyEngine]:
    """Makes engines that do everything right, but for this."""

    def wrap(engine: CopyEngine) -> CopyEngine:
        faulty = FaultyCopyEngine(engine)
        fault(faulty)
        return faulty

    return wrap


def after_the_proof(fault: Callable[[FaultyCopyEngine], None]) -> Callable[[FaultyCopyEngine], None]:
    """The proof that engines make at their start saves twice and loads once."""

    def schedule(engine: FaultyCopyEngine) -> None:
        engine.pass_next("save", 2)
        engine.pass_next("load")
        fault(engine)

    return schedule


def in_the_proof(engine: FaultyCopyEngine) -> None:
    engine.pass_next("save")
    engine.corrupt_next("save")


WRONG: dict[str, tuple[Callable[[FaultyCopyEngine], None], str]] = {
    "a byte of a save, in the proof": (in_the_proof, "proof failed"),
    "a byte of a save": (after_the_proof(lambda engine: engine.corrupt_next("save")), "WRONG BYTES: slots after a save: 1 differ"),
    "a byte of a load": (
        after_the_proof(lambda engine: engine.corrupt_next("load")),
        "WRONG BYTES: the GPU's memory after a load: 1 differ",
    ),
    "two blocks of a save": (after_the_proof(lambda engine: engine.swap_next("save")), "WRONG BYTES: slots after a save"),
    "two blocks of a load": (after_the_proof(lambda engine: engine.swap_next("load")), "WRONG BYTES: the GPU's memory after a load"),
    "a load that did nothing": (after_the_proof(lambda engine: engine.lie_next_load()), "WRONG BYTES: the GPU's memory after a load"),
}


@pytest.mark.parametrize("what", WRONG)
def test_bytes_that_are_wrong_are_found(driver: Driver, what: str) -> None:
    fault, said = WRONG[what]
    for cache in (CACHES[0], CACHES[-1]):
        busy = DeviceMemory(driver, 4096)
        findings = list(check_cache(driver, cache, GpuCopySettings(), busy, wrapped(fault)))
        busy.close()
        assert [finding.state for finding in findings] == [State.FAILED] * len(WAYS)
        assert all(said in finding.text for finding in findings), findings


def test_and_are_what_the_report_says_and_the_status(standin: Standin, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = doctor(capsys, wrap=wrapped(WRONG["a byte of a load"][0]))
    assert status == 1
    assert "checks FAILED (" in lines[2]
    failed = checks_of(lines)["FAILED"]
    assert len(failed) == len(WAYS) * LAYOUTS
    assert all("WRONG BYTES: the GPU's memory after a load: 1 differ, first byte " in line for line in failed)


class Hasty(Mirrored):
    """Copies come after what there was when it was made, not after what the GPU computes."""

    def __init__(self, engine: CopyEngine, kind: str) -> None:
        self._engine, self._kind, self._first = engine, kind, engine.mark()
        self.name, self.block_bytes, self.segment = engine.name, engine.block_bytes, engine.segment
        self.use_ledger, self.prepare_slots, self.mark, self.close = engine.use_ledger, engine.prepare_slots, engine.mark, engine.close

    def save(self, blocks: Ids, slots: Ids, epochs: Ids, after: object) -> NDArray[np.bool_]:
        return self._engine.save(blocks, slots, epochs, self._first if self._kind == "save" else after)

    def load(self, slots: Ids, blocks: Ids, after: object) -> None:
        self._engine.load(slots, blocks, self._first if self._kind == "load" else after)


@pytest.mark.parametrize("kind", ["save", "load"])
def test_a_copy_that_does_not_wait_for_the_gpu_is_found(standin: Standin, driver: Driver, kind: str) -> None:
    standin.configure(report_races=False)  # which is what this is
    standin.delay(0, 0.005)
    busy = DeviceMemory(driver, 4096)
    findings = list(check_cache(driver, CACHES[2], GpuCopySettings(), busy, lambda engine: Hasty(engine, kind)))
    standin.delay(0, 0)
    busy.close()
    assert [finding.state for finding in findings if finding.name.endswith(("DMA", "kernel"))] == [State.FAILED] * 2
    assert all("behind what the GPU was computing" in finding.text for finding in findings if finding.state is State.FAILED)


def test_memory_that_is_refused_is_a_failure_with_its_reason(standin: Standin, capsys: pytest.CaptureFixture[str]) -> None:
    standin.configure(register_total_bytes=0)
    status, lines = doctor(capsys)
    checks = checks_of(lines)
    assert status == 1
    [pinning] = checks["FAILED"]
    assert "pinned memory" in pinning
    assert "refused after 0.00 of 0.00 GiB: cuMemHostRegister failed: CUDA_ERROR_OUT_OF_MEMORY (2)" in pinning
    assert "gpu.pin = false" in pinning, "and what to do"
    others = [line for line in checks["missing"] if "host memory is not pinned" in line or "pins no more" in line]
    assert len(others) == len(checks["missing"]) > 2 * (LAYOUTS - 1), "bytes are right, but neither DMA nor kernel was proven"


def test_pointers_that_kernels_cannot_use_leave_dma(standin: Standin, capsys: pytest.CaptureFixture[str]) -> None:
    standin.configure(host_pointer_usable=False)
    status, lines = doctor(capsys)
    checks = checks_of(lines)
    assert (status, checks["FAILED"]) == (1, [])
    assert len([line for line in checks["missing"] if ", kernel " in line]) == len(checks["missing"]) - 1 > LAYOUTS - 2
    assert any("pinned memory" in line and "does not know it by the CPU's address" in line for line in checks["missing"])


@pytest.mark.parametrize("symbol", [Symbol.MISSING, Symbol.UNSUPPORTED])
def test_a_driver_without_batches_is_told_apart(standin: Standin, capsys: pytest.CaptureFixture[str], symbol: Symbol) -> None:
    standin.configure(batch_12080=symbol, batch_13000=symbol, driver_version=12040 if symbol is Symbol.MISSING else 13000)
    status, lines = doctor(capsys)
    checks = checks_of(lines)
    assert (status, checks["FAILED"]) == (1, [])
    assert len([line for line in checks["missing"] if ", DMA " in line and "one by one" in line]) == LAYOUTS
    if symbol is Symbol.MISSING:
        assert any("batched DMA" in line and "no cuMemcpyBatchAsync" in line for line in checks["missing"])


def test_a_gpu_older_than_the_kernels_has_dma(standin: Standin, capsys: pytest.CaptureFixture[str]) -> None:
    standin.configure(capability_major=7, capability_minor=5)
    status, lines = doctor(capsys)
    checks = checks_of(lines)
    assert (status, checks["FAILED"]) == (1, [])
    assert any("copy kernels" in line and "this GPU is older than they" in line and "NO_BINARY" in line for line in checks["missing"])
    assert len([line for line in checks["missing"] if ", kernel " in line]) == LAYOUTS - 1, "but where the kernel is not meant to be"


@pytest.mark.parametrize(
    ("machine", "device", "reason"),
    [
        ({"devices": 0}, 0, "no GPU is visible"),
        ({"devices": 1}, 3, "there is no GPU 3"),
        ({"driver_version": 11080}, 0, "up to 11.8, 12.0 is needed"),
        ({"init_error": 803}, 0, "of different versions"),
    ],
    ids=["none", "another", "an old driver", "a broken driver"],
)
def test_no_gpu_is_one_line_and_1(
    standin: Standin, capsys: pytest.CaptureFixture[str], machine: dict[str, int], device: int, reason: str
) -> None:
    standin.configure(**machine)
    assert run_doctor(gpu=True, device=device) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("kvoffload doctor --gpu: no GPU to test: no CUDA: ")
    assert reason in line
    assert "NVIDIA's driver" in line


def test_no_memory_on_the_gpu_is_a_failure(standin: Standin, capsys: pytest.CaptureFixture[str]) -> None:
    standin.fail("cuMemAlloc", Code.OUT_OF_MEMORY, times=1000)
    status, lines = doctor(capsys)
    assert status == 1
    assert any("layouts" in line and "CUDA_ERROR_OUT_OF_MEMORY" in line for line in checks_of(lines)["FAILED"])


ONE = Scale(pin_bytes=1 << 20, busy_bytes=4096, caches=(pages(2, 4, 4096),))


def findings_with(driver: Driver) -> list[Finding]:
    return list(check_gpu(driver, GpuCopySettings(), ONE))


def functions_of_the_driver(standin: Standin) -> dict[str, int]:
    """How often each is called by the checks."""
    driver = Driver.open(0)
    standin.clear_calls()
    assert all(finding.state is State.OK for finding in findings_with(driver))
    called = [name for name in standin.functions() if name != "cuGetProcAddress"]  # of which the answer "not found" is one more way
    driver.close()
    return {name: called.count(name) for name in called}


def test_an_error_of_any_call_is_found_and_survived(standin: Standin) -> None:
    """The first and the last call of each function of the driver."""
    for name, calls in functions_of_the_driver(standin).items():
        for at in sorted({1, calls}):
            standin.reset()
            opened = Driver.open(0)
            standin.fail(name, Code.UNKNOWN, at=at)
            findings = findings_with(opened)
            opened.close()
            standin.check(leaks=name not in KEPT)
            found = [finding for finding in findings if finding.state is not State.OK]
            if name == "cuMemHostGetDevicePointer":  # the engine does without an answer, and only kernels need it
                assert at > 1 or "CPU's address" in found[0].text
                continue
            assert found or name == "cuEventQuery", (name, at)
            assert all("CUDA_ERROR_UNKNOWN" in finding.text for finding in found), (name, at, found)


KEPT = {"cuCtxSetCurrent", "cuEventQuery", "cuDevicePrimaryCtxRelease"}
"""Without these nothing can be given back, or it is not known that it may be."""


def test_an_operation_that_fails_is_found(standin: Standin, driver: Driver) -> None:
    for kind in ("batch", "kernel", "copy"):
        standin.fail_operation(Code.ECC_UNCORRECTABLE, kind=kind, sticky=False)
    found = [finding for finding in findings_with(driver) if finding.state is State.FAILED]
    assert len(found) == 3
    assert all("CUDA_ERROR_ECC_UNCORRECTABLE" in finding.text for finding in found)


def test_a_gpu_that_breaks_meanwhile_fails_all_that_follows(standin: Standin) -> None:
    driver = Driver.open(0)
    standin.fail_operation(Code.ILLEGAL_ADDRESS, kind="kernel", at=2)
    findings = findings_with(driver)
    states = [finding.state for finding in findings]
    first = states.index(State.FAILED)
    assert set(states[first:]) == {State.FAILED}
    assert all("CUDA_ERROR_ILLEGAL_ADDRESS" in finding.text for finding in findings[first:])
    standin.reset()


def test_the_twin_of_a_cache_sees_what_the_gpu_has(standin: Standin, driver: Driver) -> None:
    twins = Twins(driver, CACHES[1])
    twins.host[:] = np.arange(twins.host.nbytes, dtype=np.uint64).astype(np.uint8)
    twins.push()
    found = twins.pull()
    assert np.array_equal(found, twins.host)
    assert found is not twins.host
    assert twins.layout.payload_bytes == twins.host_layout.payload_bytes
    twins.close()
    twins.close()


def test_a_rig_that_cannot_be_made_leaves_nothing(standin: Standin, driver: Driver) -> None:
    twins = Twins(driver, CACHES[0])
    standin.fail("cuStreamCreateWithPriority", Code.UNKNOWN)
    with pytest.raises(Exception, match="CUDA_ERROR_UNKNOWN"):
        Rig(0, twins.layout, 2, GpuCopySettings())
    twins.close()
    assert {item.kind for item in standin.live()} == {"primary context"}
