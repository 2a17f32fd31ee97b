"""What vLLM carries between the halves of the connector for us: plain values, pickled by vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata

from kvoffload.link import LinkAddress
from kvoffload.messages import Job


@dataclass(frozen=True, slots=True)
class PlannedLoad:
    """A load that vLLM was promised. ``withdrawn``: report it failed, copy nothing."""

    job: Job
    request: str
    slots: tuple[int, ...]
    blocks: tuple[int, ...]
    withdrawn: bool = False


@dataclass(slots=True)
class StepMetadata(KVConnectorMetadata):
    """One step, from SchedulerSide to WorkerSide. ``idle``: the step computes nothing, so WorkerSide may wait a little for its loads."""

    saves: tuple[Job, ...] = ()
    loads: tuple[PlannedLoad, ...] = ()
    idle: bool = False


@dataclass(slots=True)
class WorkerHandshake(KVConnectorHandshakeMetadata):
    """How the hub finds this worker half; ``off_reason`` instead where the worker half refuses to work."""

    rank: int
    name: str = ""
    pid: int = 0
    token: bytes = field(default=b"", repr=False)
    off_reason: str | None = None

    def address(self) -> LinkAddress:
        return LinkAddress(self.name, self.pid, self.token)
