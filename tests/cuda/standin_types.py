"""What the stand-in libcuda says of its machine, and what it reports: plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any


class Code(IntEnum):
    """Results of the driver API (cuda.h) that the tests ask for or see."""

    SUCCESS = 0
    INVALID_VALUE = 1
    OUT_OF_MEMORY = 2
    NOT_INITIALIZED = 3
    DEINITIALIZED = 4
    NO_DEVICE = 100
    INVALID_DEVICE = 101
    INVALID_IMAGE = 200
    INVALID_CONTEXT = 201
    NO_BINARY_FOR_GPU = 209
    ECC_UNCORRECTABLE = 214
    INVALID_SOURCE = 300
    OPERATING_SYSTEM = 304
    INVALID_HANDLE = 400
    NOT_FOUND = 500
    NOT_READY = 600
    ILLEGAL_ADDRESS = 700
    LAUNCH_OUT_OF_RESOURCES = 701
    LAUNCH_TIMEOUT = 702
    CONTEXT_IS_DESTROYED = 709
    HOST_MEMORY_ALREADY_REGISTERED = 712
    HOST_MEMORY_NOT_REGISTERED = 713
    MISALIGNED_ADDRESS = 716
    LAUNCH_FAILED = 719
    NOT_PERMITTED = 800
    NOT_SUPPORTED = 801
    STREAM_CAPTURE_UNSUPPORTED = 900
    STREAM_CAPTURE_INVALIDATED = 901
    STREAM_CAPTURE_UNMATCHED = 903
    STREAM_CAPTURE_UNJOINED = 904
    STREAM_CAPTURE_ISOLATION = 905
    STREAM_CAPTURE_IMPLICIT = 906
    CAPTURED_EVENT = 907
    STREAM_CAPTURE_WRONG_THREAD = 908
    UNKNOWN = 999


class Symbol(IntEnum):
    """What becomes of a function that not every driver has."""

    PRESENT = 0
    MISSING = 1
    """cuGetProcAddress succeeds with a null pointer."""
    UNSUPPORTED = 2
    """It is there, and every call answers CUDA_ERROR_NOT_SUPPORTED."""


class BatchOrder(IntEnum):
    """In which order the copies of one batch run. CUDA promises none."""

    REVERSED = 0
    GIVEN = 1
    SHUFFLED = 2


class CaptureMode(IntEnum):
    """CU_STREAM_CAPTURE_MODE_*."""

    GLOBAL = 0
    THREAD_LOCAL = 1
    RELAXED = 2


class Effect(IntEnum):
    """What a call did that answers an injected error."""

    NONE = 0
    PARTIAL = 1
    """Half of a batch is enqueued. Elsewhere the same as NONE."""
    ALL = 2


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine that the stand-in plays. Fields are read at the call that they concern, so most may change between two calls."""

    driver_version: int = 13000
    devices: int = 1
    """0: cuInit answers CUDA_ERROR_NO_DEVICE, as a driver without a GPU does."""
    init_error: int = 0
    """What cuInit answers otherwise than 0."""
    initialized: bool = False
    """Somebody (torch) has called cuInit before."""
    primary_retained: bool = True
    """Somebody (torch) holds the primary contexts: ours is not the last release."""
    name: str = "Stand-in GPU"
    capability_major: int = 9
    capability_minor: int = 0
    pci_bus_id: str = "0000:65:00.0"
    """Of device 0; device n has it with n added to the bus."""
    total_memory_bytes: int = 80 << 30
    host_numa_id: int = -1
    multiprocessors: int = 132
    copy_engines: int = 3
    host_pointer_usable: bool = True
    """CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM. False: cuMemHostGetDevicePointer answers another address, which alone kernels may use."""
    host_register_supported: bool = True
    pageable_access: bool = False
    """PAGEABLE_MEMORY_ACCESS: the device reads any host memory (Grace)."""
    register_limit_bytes: int = 1 << 39
    """One cuMemHostRegister of so many bytes or more fails."""
    register_total_bytes: int = 1 << 62
    """What may be registered in all (memlock)."""
    register_error: int = int(Code.OUT_OF_MEMORY)
    """What a refused registration answers."""
    register_needs_populated: bool = False
    """Registering pages that are not in memory is a violation: they would be taken one by one, on whichever NUMA node."""
    register_ms_per_gib: int = 0
    batch_12080: int = int(Symbol.PRESENT)
    batch_13000: int = int(Symbol.PRESENT)
    batch_limit: int = 8192
    """More copies in one batch are a violation: real drivers were seen to hang on some 50,000. The call then fails."""
    batch_order: int = int(BatchOrder.REVERSED)
    seed: int = 0
    jitter_us: int = 0
    """Each operation of a stream waits up to so long first, by `seed`."""
    kernel_reverse: bool = True
    """Kernels run from the last thread of the last block to the first."""
    patience_ms: int = 40_000
    """A call that waits for so long gives up with CUDA_ERROR_UNKNOWN, and it is a violation: a test fails rather than hang."""
    report_races: bool = True
    """An operation that is enqueued over memory which another stream's earlier one, still pending and not waited for, touches."""
    report_spinning: bool = True
    """cuEventSynchronize on an event without CU_EVENT_BLOCKING_SYNC burns a core."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the driver API, in the order of entry. ``arguments`` hold inputs and, after the call, outputs by name."""

    number: int
    function: str
    thread: int
    """As threading.get_native_id()."""
    code: int | None
    """None: it has not returned yet."""
    capturing: bool
    """Some stream was being captured when it was made."""
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Violation:
    rule: str
    function: str
    text: str
    thread: int
    call: int
    """Number of the call; 0 where it was seen when an operation ran."""

    def __str__(self) -> str:
        return f"[{self.rule}] {self.function}: {self.text}"


@dataclass(frozen=True, slots=True)
class Live:
    """Something that was made and not given back."""

    kind: str
    """stream, event, device memory, host memory, registration, module, library, primary context, or graph."""
    handle: int
    call: int
    """Number of the call that made it."""


@dataclass(frozen=True, slots=True)
class StreamState:
    handle: int
    flags: int
    priority: int
    is_control: bool
    """Made by `Standin.engine_stream`, and not through the driver API."""
    is_held: bool
    is_paused: bool
    """Stopped inside an operation, by `Standin.pause_inside`."""
    pending: int
    """Operations that have not ended, the running one included."""
    executed: int
    kinds: tuple[str, ...]
    """What is pending, oldest first: copy, batch, kernel, set, record, wait, write or read."""


class Wait(Enum):
    """What `Standin` waits for."""

    CALLS = 0
    BLOCKED = 1
    PENDING = 2
    EXECUTED = 3
    PAUSED = 4
    IDLE = 5
