"""The CUDA driver through NVIDIA's cuda-bindings: one device, its primary context, and every return code checked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvoffload.errors import CopyError, UnsupportedError

OLDEST_DRIVER = 12000
"""cuGetProcAddress as it is used here; drivers from 525 on have it."""

NOT_SUPPORTED = 801

_REPORT = "please report it, with the output of `kvoffload doctor --gpu`"
_RESTART = "the GPU's context is broken and this engine process must be restarted; `dmesg` may have an Xid with the cause"
_CAPTURE = f"a CUDA graph was being captured, which no copy may meet: {_REPORT}"
_ADVICE = {
    1: f"a bug of kvoffload or of the driver: {_REPORT}; gpu.copy = single is a way around batches",
    2: "the GPU's memory is full: lower gpu_memory_utilization a little",
    3: "the driver is not initialised: CUDA was used before a fork, or the process is ending",
    4: "the process is ending",
    46: "another process has the GPU for itself: see the compute mode in `nvidia-smi -q`",
    100: "no GPU is visible: see `nvidia-smi` and CUDA_VISIBLE_DEVICES; a container needs --gpus or a device plugin",
    101: "there is no such GPU: see CUDA_VISIBLE_DEVICES",
    209: f"the kernels were not built for this GPU: gpu.copy = dma does without; {_REPORT}",
    214: _RESTART,
    222: "the driver is older than the kernels' PTX: update it, or set gpu.copy = dma",
    304: "the operating system refused: see `dmesg`",
    NOT_SUPPORTED: "this driver or GPU cannot do it: gpu.copy = single is a way around batches",
    803: "kernel module and libcuda are of different versions: reboot, or repair the driver's installation",
    804: "the driver's kernel module is too old for this libcuda: update it, or take the compatibility package away",
    **dict.fromkeys((700, 702, 709, 710, 714, 715, 716, 717, 718, 719), _RESTART),
    **dict.fromkeys((*range(900, 908), 910), _CAPTURE),
}


class CudaError(CopyError):
    """A call of the driver failed. ``name`` and ``code`` are CUresult's."""

    def __init__(self, function: str, code: int, name: str, detail: str = "") -> None:
        advice = _ADVICE.get(code, _REPORT)
        super().__init__(f"{function} failed{detail}: {name} ({code}): {advice}")
        self.function = function
        self.code = code
        self.name = name


_bound = threading.local()


class Driver:
    """One device. Its primary context is the one that torch uses, so torch's streams and memory are good here.

    Calls need the context bound in their thread: `bind` first, it is cheap where that has been done.
    """

    def __init__(self, api: Any, ordinal: int) -> None:
        self._api = api
        self._context: Any = None
        self.ordinal = ordinal
        self.driver_version: int = self.call("cuDriverGetVersion")
        self._device: Any = self.call("cuDeviceGet", ordinal)
        self.name: str = self.call("cuDeviceGetName", 256, self._device).split(b"\0")[0].decode()
        self.capability = (self.attribute("COMPUTE_CAPABILITY_MAJOR"), self.attribute("COMPUTE_CAPABILITY_MINOR"))
        self.pci_bus_id: str = self.call("cuDeviceGetPCIBusId", 64, self._device).split(b"\0")[0].decode()
        self._context = self.call("cuDevicePrimaryCtxRetain", self._device)

    @classmethod
    def open(cls, ordinal: int) -> Driver:
        """Retain the primary context of device ``ordinal`` of this process. Raises UnsupportedError that says why there is no CUDA."""
        api = load_api()
        try:
            count = _count_devices(api)
            if not 0 <= ordinal < count:
                raise UnsupportedError(f"no CUDA: there is no GPU {ordinal}, this process sees {count}: see CUDA_VISIBLE_DEVICES")
            return cls(api, ordinal)
        except CudaError as error:
            raise UnsupportedError(f"no CUDA: {error}") from error

    def attribute(self, name: str) -> int:
        """CU_DEVICE_ATTRIBUTE_<name>."""
        attribute = getattr(self._api.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        value: int = self.call("cuDeviceGetAttribute", attribute, self._device)
        return value

    def bind(self) -> None:
        """Make the context current in the calling thread. Raises CudaError."""
        if getattr(_bound, "driver", None) is not self:
            self.call("cuCtxSetCurrent", self._context)
            _bound.driver = self

    @contextmanager
    def pushed(self) -> Iterator[None]:
        """In here the context is current; after it what the thread had before. For threads that are not ours. Raises CudaError."""
        self.call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self.call("cuCtxPopCurrent")

    def call(self, name: str, *args: Any) -> Any:
        """``cuda.bindings.driver.<name>(*args)``: what it gives besides the return code. Raises CudaError, where that is not 0."""
        return _call(self._api, name, *args)

    def error(self, name: str, code: int, detail: str = "") -> CudaError:
        """What `call` would have raised, for a function that was called otherwise."""
        return _error(self._api, name, code, detail)

    def address(self, name: str, version: int) -> int:
        """Where the driver has ``name`` as it was in CUDA ``version`` (12080 is 12.8); 0 where it does not have it."""
        try:
            address, status = self.call("cuGetProcAddress", name.encode(), version, 0)
        except CudaError:  # some drivers refuse a version newer than they are, where others say "not found"
            return 0
        return int(address or 0) if int(status) == 0 else 0

    @contextmanager
    def relaxed(self) -> Iterator[None]:
        """In here calls of this thread neither fail nor spoil it when some other thread is capturing a graph. Raises CudaError.

        As NCCL and torch do it for what they allocate meanwhile (cuThreadExchangeStreamCaptureMode).
        """
        mode = self.call("cuThreadExchangeStreamCaptureMode", self._api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
        try:
            yield
        finally:
            self.call("cuThreadExchangeStreamCaptureMode", mode)

    def close(self) -> None:
        """Release the context; torch goes on holding it. Raises CudaError. May be called twice."""
        if self._context is not None:
            self._context = None
            if getattr(_bound, "driver", None) is self:
                _bound.driver = None
            self.call("cuDevicePrimaryCtxRelease", self._device)


def load_api() -> Any:
    """The module cuda.bindings.driver, initialised. Raises UnsupportedError that says what is missing."""
    try:
        from cuda.bindings import driver as api
    except ImportError as error:
        wanted = "pip install kvoffload[cuda12] or kvoffload[cuda13], as torch.version.cuda says"
        raise UnsupportedError(f"no CUDA: cuda-bindings is not installed ({error}): {wanted}") from error
    try:
        _call(api, "cuInit", 0)
        version: int = _call(api, "cuDriverGetVersion")
    except CudaError as error:
        raise UnsupportedError(f"no CUDA: {error}") from error
    except RuntimeError as error:  # how cuda-bindings says that there is no libcuda.so.1
        reason = " ".join(str(error).split())
        raise UnsupportedError(f"no CUDA: the NVIDIA driver's libcuda.so.1 cannot be loaded ({reason})") from error
    if version < OLDEST_DRIVER:
        raise UnsupportedError(f"no CUDA: the driver knows CUDA up to {_dotted(version)}, {_dotted(OLDEST_DRIVER)} is needed: update it")
    return api


def probe() -> None:
    """Raise UnsupportedError that says why there is no CUDA here. Makes no context."""
    api = load_api()
    if not _count_devices(api):
        raise UnsupportedError(f"no CUDA: {_ADVICE[100]}")


def _count_devices(api: Any) -> int:
    count: int = _call(api, "cuDeviceGetCount")
    return count


def _call(api: Any, name: str, *args: Any) -> Any:
    result = getattr(api, name)(*args)
    if int(result[0]):
        raise _error(api, name, int(result[0]))
    return None if len(result) == 1 else result[1] if len(result) == 2 else result[1:]


def _error(api: Any, name: str, code: int, detail: str = "") -> CudaError:
    try:
        known = api.CUresult(code).name
    except ValueError:
        known = "an error that cuda-bindings does not know"
    return CudaError(name, code, known, detail)


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
