"""What one rank's worker half is made of: tensors, slots, and the engine that copies between them; proven, or not made at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvoffload.config import Config, GpuSettings
from kvoffload.copy.choose import make_engine
from kvoffload.copy.engine import CopyEngine
from kvoffload.copy.proof import prove
from kvoffload.cuda.dispatch import Direction, DispatchTable, Path
from kvoffload.cuda.numa import BoundThreads, cpus_near
from kvoffload.cuda.settings import CopyMode, GpuCopySettings
from kvoffload.errors import CapacityError, LayoutError
from kvoffload.layout import BlockLayout, Tensor
from kvoffload.ledger import Ledger
from kvoffload.limits import check_capacity
from kvoffload.observe.logs import get_logger
from kvoffload.populate import Preparation
from kvoffload.segment import Segment

if TYPE_CHECKING:
    from kvoffload.cuda.driver import Driver
    from kvoffload.cuda.pinned import PinnedSegment

log = get_logger("worker")

WrapEngine = Callable[[CopyEngine], CopyEngine]
GIB = 1 << 30
LATER_PIECE_BYTES = 128 << 20
"""Of memory that is pinned while the model runs, whose calls of the driver wait meanwhile: some 0.01 s, where a GiB takes 0.1 s."""


@dataclass(frozen=True, slots=True)
class OnGpu:
    """What is known of the GPU that a rank's KV is in."""

    driver: Driver
    pinned: PinnedSegment
    crew: BoundThreads
    """Threads that take memory near it."""
    table: DispatchTable
    """What its engine chooses by."""


@dataclass(frozen=True, slots=True)
class Rank:
    """What a worker half made of its tensors: proven, and not moving anything yet."""

    number: int
    layout: BlockLayout
    segment: Segment
    engine: CopyEngine
    gpu: OnGpu | None = None

    @classmethod
    def prepare(
        cls,
        config: Config,
        number: int,
        kv_caches: Mapping[str, Tensor],
        num_blocks: int,
        wrap: WrapEngine,
        current_stream: Callable[[], int] | None = None,
    ) -> Rank:
        """Check memory, make the segment and the engine, and prove the layout. ``current_stream`` as of `make_engine`.

        Raises UnsupportedError, LayoutError, CapacityError, CopyError; then nothing is left of it.
        """
        layout = BlockLayout.from_tensors(kv_caches, num_blocks)
        if layout.slot_bytes > config.l1.capacity_bytes:
            raise CapacityError(
                f"l1.capacity_bytes = {config.l1.capacity_bytes} holds not one block: a block of all layers takes {layout.slot_bytes} bytes"
            )
        check_capacity(config.l1.capacity_bytes, config.l1.reserve_bytes)
        # The ledger is for the proof alone: the scheduler's comes with `WorkerRuntime.attach`.
        with ExitStack() as undo, closing(Ledger(num_blocks)) as ledger:
            segment = Segment.create(config.l1.capacity_bytes, layout.slot_bytes)
            undo.callback(segment.close)
            engine = make_engine(layout, segment, ledger, copy_settings(config.gpu), current_stream)
            undo.callback(engine.close)
            gpu = _gpu_of(engine, layout)
            if gpu is not None:
                _take_what_the_proof_uses(segment, engine, gpu)
            _prove_each_way(lambda: prove(layout, engine, kv_caches, segment, ledger), layout, gpu)
            rank = cls(number, layout, segment, wrap(engine), gpu)
            undo.pop_all()
        return rank

    def preparation(self, config: Config) -> Preparation:
        """How populated slots become usable."""
        if self.gpu is None:
            return Preparation(self.engine.prepare_slots)
        engine, pinned = self.engine, self.gpu.pinned

        def prepare(populated: int, *, at_start: bool = False) -> int:
            if pinned.refused is None:
                return engine.prepare_slots(populated, at_start=at_start)
            return pinned.prepare(populated)  # no driver is asked any more: it only counts

        return Preparation(
            prepare,
            pinned.slots_of(config.gpu.pin_piece_bytes),
            later_piece_slots=pinned.slots_of(min(config.gpu.pin_piece_bytes, LATER_PIECE_BYTES)),
            needs_leave=lambda: pinned.refused is None,
            crew=self.gpu.crew,
        )

    def tell(self) -> None:
        """The line in the log that says which engine copies, why that one, and with what memory."""
        if self.gpu is None:
            log.info("ready to copy", rank=self.number, engine=self.engine.name, why="KV is in ordinary memory")
            return
        pinned = self.gpu.pinned
        log.info(
            "ready to copy",
            rank=self.number,
            engine=self.engine.name,
            why=f"KV is on {self.layout.device}, {self.gpu.driver.name}",
            pinned_gib=round(pinned.pinned_bytes / GIB, 2),
            of_gib=round(self.segment.num_bytes / GIB, 2),
            rest=f"not pinned: {pinned.refused}" if pinned.refused is not None else "follows after the first step",
        )

    def close(self) -> None:
        """Engine, pinned memory, segment, in this order: what the driver has pinned must not be unmapped. Nothing may be running."""
        try:
            self.engine.close()
        except Exception:
            log.exception("the copy engine does not end: its memory is left to the end of the process", rank=self.number)
        else:
            self.segment.close()


def copy_settings(gpu: GpuSettings) -> GpuCopySettings:
    """Section ``gpu``, as the engine takes it: all but how long a start may take, which is the runtime's to keep."""
    values = gpu.model_dump(exclude={"pin_at_start_s"})
    return GpuCopySettings(copy=CopyMode(values.pop("copy_with")), **values)


def _gpu_of(engine: CopyEngine, layout: BlockLayout) -> OnGpu | None:
    if layout.device == "cpu":
        return None
    from kvoffload.copy.cuda import CudaCopyEngine
    from kvoffload.cuda.pinned import PinnedSegment

    assert isinstance(engine, CudaCopyEngine)
    assert isinstance(engine.gpu.pinned, PinnedSegment)
    return OnGpu(engine.gpu.driver, engine.gpu.pinned, BoundThreads(cpus_near(engine.gpu.driver.pci_bus_id)), engine.table)


def _take_what_the_proof_uses(segment: Segment, engine: CopyEngine, gpu: OnGpu) -> None:
    """The proof is to go the way that blocks will go, and that is through pinned memory."""
    while segment.populated_slots < min(2, segment.slots):
        segment.populate_next(crew=gpu.crew)
    engine.prepare_slots(segment.populated_slots, at_start=True)


def _prove_each_way(proof: Callable[[], None], layout: BlockLayout, gpu: OnGpu | None) -> None:
    """A proof has too few pieces to go by each way that later copies may go, and none of them is to be used unproven.

    Raises the LayoutError of all but kernels: these are not used then, as DMA does what they do.
    """
    if gpu is None or not gpu.pinned.pinned_slots:
        proof()  # nothing to choose from: what is not pinned goes piece by piece
        return
    mode = gpu.table.settings.copy
    if mode is not CopyMode.KERNEL:
        with gpu.table.always(Path.DMA):
            proof()
    if mode is not CopyMode.SINGLE:
        with gpu.pinned.taken_for_unpinned():
            proof()
    piece_bytes = layout.payload_bytes // len(layout.runs)
    if any(gpu.table.may_choose_kernel(direction, piece_bytes) for direction in Direction):
        try:
            with gpu.table.always(Path.KERNEL):
                proof()
        except LayoutError as error:
            gpu.table.give_up_kernels()
            log.warning("the copy kernel is not used, as it fails its proof here: blocks are copied by DMA", reason=str(error))
            proof()  # what a kernel has broken may be more than its own copies
