"""How each rule of the stand-in is broken, through the driver API, and what the call answers that does it."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

from tests.cuda.standin import Code
from tests.cuda.standin_launch import Launch
from tests.cuda.standin_rig import ANY, BLOCKING_SYNC, DISABLE_TIMING, PAGE, Gpu, pages, running

Breaker = Callable[[Gpu], "int | None"]
BREAKERS: dict[str, tuple[Breaker, int]] = {}
"""By rule: what breaks it and returns the code of the call that did, and the code that is expected."""


def breaks(rule: str, answer: int = Code.SUCCESS) -> Callable[[Breaker], Breaker]:
    """SUCCESS: CUDA lets it pass, and the stand-in only reports it."""

    def known(breaker: Breaker) -> Breaker:
        BREAKERS[rule] = breaker, int(answer)
        return breaker

    return known


@breaks("argument", Code.INVALID_DEVICE)
def _(gpu: Gpu) -> int:
    return gpu.call("cuDeviceGet", 7)[0]


@breaks("flags", Code.INVALID_VALUE)
def _(gpu: Gpu) -> int:
    return int(gpu.lib.cuEventCreate(ctypes.byref(ctypes.c_void_p()), 8))


@breaks("initialized", Code.NOT_INITIALIZED)
def _(gpu: Gpu) -> int:
    gpu.close()
    gpu.standin.reset()
    return gpu.call("cuDeviceGetCount")[0]


@breaks("context", Code.INVALID_CONTEXT)
def _(gpu: Gpu) -> int:
    with running(lambda: gpu.call("cuStreamCreate", 1)[0]) as other:
        return int(other.join())


@breaks("foreign-context", Code.INVALID_HANDLE)
def _(gpu: Gpu) -> int:
    gpu.standin.configure(devices=2)
    event = gpu.event()
    other = gpu.standin.engine_stream(device=1)
    return gpu.call("cuEventRecord", event, other)[0]


@breaks("unknown-handle", Code.INVALID_HANDLE)
def _(gpu: Gpu) -> int:
    return gpu.call("cuStreamSynchronize", 0xDEADBEEF)[0]


@breaks("destroyed-handle", Code.INVALID_HANDLE)
def _(gpu: Gpu) -> int:
    event = int(gpu.do("cuEventCreate", 3))
    gpu.do("cuEventDestroy", event)
    return gpu.call("cuEventRecord", event, gpu.stream())[0]


@breaks("release", Code.INVALID_CONTEXT)
def _(gpu: Gpu) -> int:
    gpu.close()
    return gpu.call("cuDevicePrimaryCtxRelease", 0)[0]


@breaks("callback", Code.NOT_SUPPORTED)
def _(gpu: Gpu) -> int:
    return int(gpu.lib.cuLaunchHostFunc(ctypes.c_void_p(gpu.stream()), None, None))


@breaks("stream-busy")
def _(gpu: Gpu) -> int:
    stream = int(gpu.do("cuStreamCreate", 1))
    gpu.standin.hold(stream)
    gpu.record(gpu.event(), stream)
    code, _ = gpu.call("cuStreamDestroy", stream)
    gpu.standin.release(stream)
    gpu.standin.wait_idle(stream)
    return code


@breaks("event-busy")
def _(gpu: Gpu) -> int:
    stream, event = gpu.stream(), int(gpu.do("cuEventCreate", 3))
    gpu.standin.hold(stream)
    gpu.record(event, stream)
    code, _ = gpu.call("cuEventDestroy", event)
    gpu.standin.release(stream)
    return code


@breaks("event-unrecorded")
def _(gpu: Gpu) -> int:
    return gpu.call("cuStreamWaitEvent", gpu.stream(), gpu.event(), 0)[0]


@breaks("event-spins")
def _(gpu: Gpu) -> int:
    stream, event = gpu.stream(), gpu.event(DISABLE_TIMING)
    gpu.record(event, stream)
    return gpu.call("cuEventSynchronize", event)[0]


@breaks("patience", Code.UNKNOWN)
def _(gpu: Gpu) -> int:
    stream, event = gpu.stream(), gpu.event()
    gpu.standin.configure(patience_ms=20)
    gpu.standin.hold(stream)
    gpu.record(event, stream)
    code, _ = gpu.call("cuEventSynchronize", event)
    gpu.standin.release(stream)
    gpu.standin.wait_idle(stream)
    return code


@breaks("event-timing", Code.INVALID_HANDLE)
def _(gpu: Gpu) -> int:
    stream, first, last = gpu.stream(), gpu.event(BLOCKING_SYNC), gpu.event(BLOCKING_SYNC | DISABLE_TIMING)
    gpu.record(first, stream)
    gpu.record(last, stream)
    gpu.do("cuEventSynchronize", last)
    return gpu.call("cuEventElapsedTime", first, last)[0]


@breaks("default-stream", Code.INVALID_VALUE)
def _(gpu: Gpu) -> int:
    return gpu.batch(0, [(gpu.pinned(), gpu.device(), 16)])


@breaks("batch-empty", Code.INVALID_VALUE)
def _(gpu: Gpu) -> int:
    return gpu.batch(gpu.stream(), [(gpu.pinned(), gpu.device(), 16)], count=0)


@breaks("batch-limit", Code.INVALID_VALUE)
def _(gpu: Gpu) -> int:
    gpu.standin.configure(batch_limit=2)
    slots, kv = gpu.pinned(), gpu.device()
    return gpu.batch(gpu.stream(), [(slots[i:], kv[i:], 1) for i in range(3)])


@breaks("batch-attributes", Code.INVALID_VALUE)
def _(gpu: Gpu) -> int:
    return gpu.batch(gpu.stream(), [(gpu.pinned(), gpu.device(), 16)], indices=[1])


@breaks("batch-order", Code.INVALID_VALUE)
def _(gpu: Gpu) -> int:
    return gpu.batch(gpu.stream(), [(gpu.pinned(), gpu.device(), 16)], order=0)


@breaks("batch-depends")
def _(gpu: Gpu) -> int:
    slots, kv = gpu.pinned(), gpu.device()
    return gpu.batch(gpu.stream(), [(slots, kv, 16), (slots[15:], kv[16:], 16)])


@breaks("batch-pageable", Code.INVALID_VALUE)
def _(gpu: Gpu) -> int:
    return gpu.batch(gpu.stream(), [(pages(1), gpu.device(), 16)])


@breaks("straddles", Code.INVALID_VALUE)
def _(gpu: Gpu) -> int:
    whole = pages(2)
    for half in (whole[:PAGE], whole[PAGE:]):
        gpu.do("cuMemHostRegister", half.ctypes.data, PAGE, 3)
    code = gpu.batch(gpu.stream(), [(whole[PAGE - 8 :], gpu.device(), 16)])
    for half in (whole[:PAGE], whole[PAGE:]):
        gpu.do("cuMemHostUnregister", half.ctypes.data)
    return code


@breaks("outside", Code.INVALID_VALUE)
def _(gpu: Gpu) -> int:
    kv = gpu.device()
    return gpu.call("cuMemcpyDtoHAsync", gpu.pinned(8).ctypes.data, kv.ctypes.data + 8, kv.nbytes, gpu.stream())[0]


@breaks("direction", Code.INVALID_VALUE)
def _(gpu: Gpu) -> int:
    return gpu.call("cuMemcpyHtoDAsync", gpu.pinned().ctypes.data, gpu.device().ctypes.data, 16, gpu.stream())[0]


@breaks("source-changed")
def _(gpu: Gpu) -> int:
    slots, kv, stream = gpu.pinned(), gpu.device(), gpu.stream()
    gpu.standin.hold(stream)
    code = gpu.batch(stream, [(kv, slots, 16)], order=ANY)
    slots[3] = 1
    gpu.standin.release(stream)
    gpu.standin.wait_idle(stream)
    return code


@breaks("race")
def _(gpu: Gpu) -> int:
    kv, engine = gpu.device(), gpu.standin.engine_stream()
    gpu.standin.hold(engine)
    gpu.standin.write(engine, kv[8:], b"\x07" * 16)
    code = gpu.batch(gpu.stream(), [(gpu.pinned(), kv, 16)])
    gpu.standin.release(engine)
    return code


@breaks("register-alignment", Code.INVALID_VALUE)
def _(gpu: Gpu) -> int:
    return gpu.call("cuMemHostRegister", pages(2).ctypes.data + 64, PAGE, 3)[0]


@breaks("register-overlap", Code.HOST_MEMORY_ALREADY_REGISTERED)
def _(gpu: Gpu) -> int:
    return gpu.call("cuMemHostRegister", gpu.pinned(4).ctypes.data + PAGE, PAGE, 3)[0]


@breaks("register-unmapped", Code.INVALID_VALUE)
def _(gpu: Gpu) -> int:
    return gpu.call("cuMemHostRegister", PAGE, PAGE, 3)[0]


@breaks("register-unpopulated")
def _(gpu: Gpu) -> int:
    gpu.standin.configure(register_needs_populated=True)
    memory = pages(2)
    memory[0] = 1
    code, _ = gpu.call("cuMemHostRegister", memory.ctypes.data, memory.nbytes, 3)
    gpu.do("cuMemHostUnregister", memory.ctypes.data)
    return code


@breaks("unregister-unknown", Code.HOST_MEMORY_NOT_REGISTERED)
def _(gpu: Gpu) -> int:
    return gpu.call("cuMemHostUnregister", gpu.pinned(4).ctypes.data + PAGE)[0]


@breaks("unregister-unmapped")
def _(gpu: Gpu) -> int:
    mapping = mmap.mmap(-1, 4 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    gpu.do("cuMemHostRegister", address, 4 * PAGE, 3)
    libc = ctypes.CDLL(None, use_errno=True)
    # As a segment that is closed too early; the mapping object goes on existing, and is told nothing.
    assert libc.munmap(ctypes.c_void_p(address + 2 * PAGE), ctypes.c_size_t(PAGE)) == 0
    code, _ = gpu.call("cuMemHostUnregister", address)
    fill = libc.mmap
    fill.restype = ctypes.c_void_p
    fill.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int, ctypes.c_long]
    private_anonymous_fixed = 0x02 | 0x20 | 0x10
    assert fill(address + 2 * PAGE, PAGE, 3, private_anonymous_fixed, -1, 0, 0) == address + 2 * PAGE
    return code


@breaks("memory-busy")
def _(gpu: Gpu) -> int:
    memory, kv, stream = pages(1), gpu.device(), gpu.stream()
    gpu.do("cuMemHostRegister", memory.ctypes.data, PAGE, 3)
    gpu.standin.hold(stream)
    gpu.do("cuMemcpyAsync", memory.ctypes.data, kv.ctypes.data, 16, stream)
    code, _ = gpu.call("cuMemHostUnregister", memory.ctypes.data)
    gpu.do("cuMemHostRegister", memory.ctypes.data, PAGE, 3)  # or the copy would break another rule when it runs
    gpu.standin.release(stream)
    gpu.standin.wait_idle(stream)
    gpu.do("cuMemHostUnregister", memory.ctypes.data)
    return code


@breaks("memory-gone", Code.ILLEGAL_ADDRESS)
def _(gpu: Gpu) -> int:
    kv, stream = gpu.device(), gpu.stream()
    gpu.standin.hold(stream)
    gpu.do("cuMemcpyAsync", gpu.pinned().ctypes.data, kv.ctypes.data, 16, stream)
    gpu.standin.forget(kv)
    gpu.standin.release(stream)
    return gpu.call("cuStreamSynchronize", stream)[0]


@breaks("memory-unknown", Code.INVALID_VALUE)
def _(gpu: Gpu) -> int:
    return gpu.call("cuMemFree", gpu.device().ctypes.data)[0]


@breaks("write-combined")
def _(gpu: Gpu) -> int:
    code, address = gpu.call("cuMemHostAlloc", PAGE, 4)
    gpu.do("cuMemFreeHost", address)
    return code


@breaks("capture-unsafe", Code.STREAM_CAPTURE_UNSUPPORTED)
def _(gpu: Gpu) -> int:
    event, stream, engine = gpu.event(), gpu.stream(), gpu.standin.engine_stream()
    gpu.record(event, stream)

    def elsewhere() -> int:
        gpu.bind()
        return gpu.call("cuEventSynchronize", event)[0]

    gpu.standin.begin_capture(engine)
    with running(elsewhere) as other:
        code = int(other.join())
    assert not gpu.standin.end_capture(engine)
    return code


@breaks("capture-stream", Code.STREAM_CAPTURE_UNSUPPORTED)
def _(gpu: Gpu) -> int:
    engine = gpu.standin.engine_stream()
    with gpu.standin.capture(engine):
        return gpu.batch(engine, [(0x1000, 0x2000, 16)])  # refused before anything is looked at


@breaks("capture-isolation", Code.STREAM_CAPTURE_ISOLATION)
def _(gpu: Gpu) -> int:
    engine, stream, event = gpu.standin.engine_stream(), gpu.stream(), gpu.event()
    with gpu.standin.capture(engine):
        gpu.record(event, engine)
        gpu.standin.expect("capture-stream")
        return gpu.call("cuStreamWaitEvent", stream, event, 0)[0]


@breaks("capture-ending", Code.STREAM_CAPTURE_UNMATCHED)
def _(gpu: Gpu) -> int:
    return gpu.call("cuStreamEndCapture", gpu.stream())[0]


@breaks("image", Code.INVALID_IMAGE)
def _(gpu: Gpu) -> int:
    return gpu.call("cuModuleLoadData", b"not a module")[0]


@breaks("launch-geometry", Code.INVALID_VALUE)
def _(gpu: Gpu) -> int:
    return Launch(gpu)(gpu.stream(), block=2048)


@breaks("launch-parameters", Code.INVALID_VALUE)
def _(gpu: Gpu) -> int:
    launch, stream = Launch(gpu), gpu.stream()
    packed = ctypes.create_string_buffer(64)  # as a structure: the kernel's parameters take 72 bytes
    size = ctypes.c_size_t(64)
    extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(packed), 2, ctypes.addressof(size), 0)
    return gpu.call("cuLaunchKernel", launch.function, 1, 1, 1, 32, 1, 1, 0, stream, 0, ctypes.addressof(extra))[0]


@breaks("launch-memory", Code.ILLEGAL_ADDRESS)
def _(gpu: Gpu) -> int:
    stream, launch = gpu.stream(), Launch(gpu, num_blocks=1 << 40)
    launch.tables[8] = 1 << 20  # a block that is not there
    assert launch(stream) == 0  # as with CUDA the launch succeeds, and the fault comes when it runs
    return gpu.call("cuStreamSynchronize", stream)[0]


@breaks("launch-alignment", Code.MISALIGNED_ADDRESS)
def _(gpu: Gpu) -> int:
    stream, launch = gpu.stream(), Launch(gpu)
    launch.tables[1] = 200
    assert launch(stream) == 0
    return gpu.call("cuStreamSynchronize", stream)[0]


@breaks("launch-duplicate")
def _(gpu: Gpu) -> int:
    stream, launch = gpu.stream(), Launch(gpu, count=2)
    launch.tables[8:10], launch.tables[16:18] = 2, (0, 1)
    return launch(stream)


@breaks("launch-changed")
def _(gpu: Gpu) -> int:
    stream, launch = gpu.stream(), Launch(gpu)
    gpu.standin.hold(stream)
    code = launch(stream)
    launch.tables[16] = 3  # as if the table were used again too early
    gpu.standin.release(stream)
    gpu.standin.wait_idle(stream)
    return code
