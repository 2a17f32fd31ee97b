"""The sections of the settings: one model each, with defaults, bounds, and what `kvoffload.config.describe` says of them."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator

GIB = 1 << 30


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _http(value: str) -> str:
    if not value.startswith(("http://", "https://")):
        raise ValueError("must start with http:// or https://")
    return value


def _listed(value: object) -> object:
    """A list, from the variables too: ``a, b``."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


def _redis(value: object) -> object:
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    if isinstance(text, str) and not text.startswith(("redis://", "rediss://", "unix://")):
        raise ValueError("must start with redis://, rediss:// or unix://")
    return value


def _plain_name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("must be letters, digits, dots, underscores and dashes, at most 64 of them")
    return value


_NAME = re.compile(r"[A-Za-z0-9._-]{0,64}")
Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool)]


class Section(BaseModel):
    """A field per setting; sections may lie within sections."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class L1Settings(Section):
    """Host memory. Sources may say ``capacity_gb`` (GiB, fractions too) instead of ``capacity_bytes``."""

    enabled: bool = Field(
        default=True, description="false: blocks live on the nodes of L2 alone, and the capacity is for those on their way"
    )
    capacity_bytes: Int = Field(
        default=4 * GIB, gt=0, le=1 << 50, description="bytes of host memory for blocks, of the whole engine, shared out over ranks"
    )
    policy: Annotated[Literal["s3fifo", "lru"], BeforeValidator(_lower)] = Field(default="s3fifo", description="which blocks leave first")
    reserve_bytes: Int = Field(
        default=GIB, ge=0, le=1 << 50, description="bytes of free memory that L1 must leave to others, or it does not start"
    )


class MatchSettings(Section):
    """How long a request may be held for the answer to "what do you have of this prompt?"."""

    deadline_ms: Float = Field(
        default=50.0, ge=0, le=60_000, description="after this long a request is computed, whatever may still be found"
    )
    wait_idle_ms: Float = Field(default=2.0, ge=0, le=100, description="wait in the hook, lock released, while nothing else runs")
    wait_busy_ms: Float = Field(default=0.5, ge=0, le=100, description="the same once per request, while other requests run")


class LoadSettings(Section):
    """From L1 into the engine."""

    max_jobs: Int = Field(default=64, ge=1, le=65_536, description="loads promised and not yet ended; beyond it requests are computed")
    start_deadline_ms: Float = Field(default=1000.0, gt=0, le=600_000, description="a load not started by then is withdrawn and computed")


class SaveSettings(Section):
    """From the engine into L1."""

    enabled: bool = Field(default=True, description="false: L1 is read, never written")
    max_jobs: Int = Field(default=256, ge=1, le=65_536, description="saves that wait or run, one per step; beyond it they are dropped")
    pair_timeout_s: Float = Field(default=60.0, gt=0, le=600, description="a save whose step or whose slots do not come by then is dropped")


class MembershipSettings(Section):
    """The table of nodes that Redis keeps, as AIBrix writes it (`kvoffload members`); without a URL ``l2.nodes`` is the table."""

    url: Annotated[SecretStr | None, BeforeValidator(_redis)] = Field(
        default=None, description="redis:// or rediss:// URL of the Redis with the table, password included"
    )
    key: str = Field(default="kvcache_nodes", min_length=1, description="the Redis key of the table")
    poll_s: Float = Field(default=5.0, gt=0, le=3600, description="time between two looks at the table; sooner when a node is in trouble")
    timeout_ms: Float = Field(default=2000.0, gt=0, le=60_000, description="for connecting to that Redis, and for each answer of it")


class L2Settings(Section):
    """Blocks on nodes that engines share."""

    backend: Annotated[Literal["off", "infinistore", "redis"], BeforeValidator(_lower)] = Field(
        default="off", description="what serves the nodes; redis stands for Valkey too"
    )
    nodes: Names = Field(
        default=(), repr=False, description="host:port of each InfiniStore node, or redis:// URLs; not needed with l2.membership.url"
    )
    namespace: Annotated[str, AfterValidator(_plain_name)] = Field(
        default="", description="goes into every name on the nodes: deployments that share nodes share blocks only within one"
    )
    secret: SecretStr | None = Field(
        default=None, min_length=16, description="seals blocks against forgery; the same in all engines that share blocks"
    )
    ingestion: Annotated[Literal["all", "hot", "evicted"], BeforeValidator(_lower)] = Field(
        default="all", description="what is written: every block, those that were hit, or those that are about to leave L1"
    )
    min_tokens: Int = Field(default=256, ge=0, le=1 << 30, description="fewer tokens than this are computed, not looked for on nodes")
    load_or_compute: bool = Field(default=True, description="false: whatever nodes have is loaded, even where computing looks faster")
    deadline_base_ms: Float = Field(default=50.0, ge=0, le=60_000, description="a request waits for nodes so long,")
    deadline_per_1000_tokens_ms: Float = Field(default=20.0, ge=0, le=60_000, description="plus so much per thousand tokens asked for,")
    deadline_most_ms: Float = Field(default=1000.0, ge=0, le=600_000, description="and never longer than this")
    retry_after_s: Float = Field(default=10.0, ge=0, le=3600, description="a block that failed to come is not asked for again for so long")
    connections: Int = Field(default=4, ge=1, le=64, description="connections to each node, one transfer at a time on each")
    connect_timeout_ms: Float = Field(default=1000.0, gt=0, le=60_000, description="for connecting to a node")
    write_timeout_ms: Float = Field(default=5000.0, gt=0, le=600_000, description="for one batch of writes")
    inflight_bytes: Int = Field(
        default=256 << 20, ge=1 << 20, le=1 << 40, description="bytes under way to or from a node at once, each way"
    )
    write_queue_blocks: Int = Field(
        default=4096, ge=1, le=1 << 20, description="blocks that may wait to be written to a node; more are dropped"
    )
    transport: Annotated[Literal["tcp", "rdma"], BeforeValidator(_lower)] = Field(
        default="tcp", description="of InfiniStore; rdma has not met hardware yet"
    )
    devices: Names = Field(default=(), description="RDMA devices, with a GID index where one is needed: mlx5_0, mlx5_1:7")
    link_type: Literal["Ethernet", "IB"] = Field(default="Ethernet", description="of the RDMA devices: RoCE or InfiniBand")
    ib_port: Int = Field(default=1, ge=1, le=255, description="port of the RDMA devices")
    membership: MembershipSettings = MembershipSettings()

    @model_validator(mode="after")
    def _has_nodes(self) -> Self:
        if self.backend != "off" and not self.nodes and self.membership.url is None:
            raise ValueError(f"l2.backend is {self.backend}, but neither l2.nodes nor l2.membership.url says where its nodes are")
        if self.backend != "off" and self.membership.url is None:
            from kvoffload.l2.addresses import static_nodes  # it knows messages, which know nothing of settings

            static_nodes(self.backend, self.nodes)
        return self


class GpuSettings(Section):
    """Copies between the GPU and L1. None of it counts where KV is in ordinary memory (vLLM's CPU backend)."""

    copy_with: Annotated[Literal["auto", "dma", "kernel", "single"], BeforeValidator(_lower)] = Field(
        default="auto",  # pydantic's models have a method `copy`
        alias="copy",
        description="auto: batched DMA, but a kernel for loads of small pieces; or always dma, kernel, or a single call for each piece",
    )
    descriptors_per_call: Int = Field(default=8192, ge=1, le=1 << 20, description="pieces in one batch of DMA: drivers have failed on more")
    kernel_below_bytes: Int = Field(
        default=28_672, ge=0, le=1 << 30, description="loads of pieces smaller than this are done by the kernel,"
    )
    kernel_min_pieces: Int = Field(default=16, ge=1, le=1 << 20, description="where there are at least so many of them")
    kernel_blocks: Int = Field(default=12, ge=1, le=1024, description="thread blocks of the kernel: few leave the GPU to the model")
    inflight_bytes: Int = Field(
        default=64 << 20,
        ge=1 << 20,
        le=1 << 40,
        description="bytes under way over the GPU's link, each way: the engine's own copies wait for them",
    )
    pin: bool = Field(default=True, description="false: L1 is not pinned, and copies are several times slower")
    pin_piece_bytes: Int = Field(
        default=GIB, ge=1 << 20, le=64 * GIB, description="pinned at once; the driver may serve no other process of the machine meanwhile"
    )
    pin_at_start_s: Float = Field(
        default=10.0, ge=0, le=3600, description="so long the start waits for L1 to be pinned; the rest follows after the first step"
    )


class ModelSettings(Section):
    """What kvoffload cannot see of the model."""

    version: str | None = Field(
        default=None, description="goes into every key: change it when weights change that look the same from outside"
    )


class LogSettings(Section):
    """Log lines of the logger `kvoffload`."""

    level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = Field(
        default="warning", description="least level that is written"
    )


class ProfilingSettings(Section):
    """Continuous profiles, samples tagged by actor; needs ``pip install kvoffload[profiling]``."""

    enabled: bool = Field(default=False, description="send profiles to a Pyroscope server")
    server_address: Annotated[str, AfterValidator(_http)] = Field(default="http://localhost:4040", description="that server's URL")
