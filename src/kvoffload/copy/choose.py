"""Which copy engine serves a layout, and why it is not the GPU's."""

from __future__ import annotations

from collections.abc import Callable

from kvoffload.copy.engine import CopyEngine
from kvoffload.copy.host import HostCopyEngine
from kvoffload.cuda.settings import GpuCopySettings
from kvoffload.errors import UnsupportedError
from kvoffload.layout import BlockLayout
from kvoffload.ledger import Ledger
from kvoffload.observe.logs import get_logger
from kvoffload.segment import Segment

log = get_logger("copy")


def make_engine(
    layout: BlockLayout,
    segment: Segment,
    ledger: Ledger,
    settings: GpuCopySettings | None = None,
    current_stream: Callable[[], int] | None = None,
) -> CopyEngine:
    """The engine for where the layout's tensors are: in ordinary memory ("cpu") or in a GPU ("cuda:0").

    ``current_stream`` gives the CUstream that the model computes in, by default torch's. Raises UnsupportedError, where the tensors
    are in a GPU that cannot be reached with the reason, and LayoutError.
    """
    if layout.device == "cpu":
        log.info("copies are made by the CPU: the engine's KV cache is in ordinary memory")
        return HostCopyEngine(layout, segment, ledger)
    return _cuda_engine(layout, segment, ledger, settings or GpuCopySettings(), current_stream)


def why_no_gpu() -> str | None:
    """In one line why CUDA cannot be used by this process; None where it can. Makes no context."""
    from kvoffload.cuda.driver import probe

    try:
        probe()
    except UnsupportedError as error:
        return str(error)
    return None


def _cuda_engine(
    layout: BlockLayout, segment: Segment, ledger: Ledger, settings: GpuCopySettings, current_stream: Callable[[], int] | None
) -> CopyEngine:
    from kvoffload.copy.cuda import CudaCopyEngine, Gpu
    from kvoffload.cuda.driver import Driver
    from kvoffload.cuda.pinned import PinnedSegment

    ordinal = _ordinal_of(layout.device)
    driver = Driver.open(ordinal)
    pinned = PinnedSegment(driver, segment, piece_bytes=settings.pin_piece_bytes, pin=settings.pin)
    engine = CudaCopyEngine(layout, segment, ledger, Gpu(driver, pinned, current_stream or _torch_stream(ordinal)), settings)
    log.info("copies are made by CUDA", device=layout.device, gpu=driver.name, capability=driver.capability, driver=driver.driver_version)
    return engine


def _ordinal_of(device: str) -> int:
    kind, _, number = device.partition(":")
    if kind != "cuda" or not (number or "0").isdecimal():
        raise UnsupportedError(f"there is no copy engine for KV on device {device!r}, only for cpu and cuda:N")
    return int(number or 0)


def _torch_stream(ordinal: int) -> Callable[[], int]:
    import torch

    def current_stream() -> int:
        stream: int = torch.cuda.current_stream(ordinal).cuda_stream
        return stream

    return current_stream
