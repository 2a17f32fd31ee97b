"""Settings: frozen, validated, and read here alone.

Each setting has one dotted name (``l1.capacity_gb``) and comes from, the first that gives it:

1. its variable, ``KVOFFLOAD_L1_CAPACITY_GB``: whoever operates a process has the last word; an empty one counts as not given,
2. vLLM's ``kv_connector_extra_config`` (or the mapping given to `Config.load`), nested or with dotted names,
3. its default.

``l1.capacity_gb`` and ``l1.capacity_bytes`` are two spellings of one setting: both are an error within one source; across sources
the order above decides. Unknown names are errors that suggest the nearest. ``KVOFFLOAD_DISABLED=1`` switches kvoffload off whatever
else is set, valid or not. `describe` lists them all.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo

from kvoffload.errors import ConfigError

GIB = 1 << 30
PREFIX = "KVOFFLOAD_"
DISABLED = "KVOFFLOAD_DISABLED"
EXTRA = "kv_connector_extra_config"


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


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class L1Settings(_Section):
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


class MatchSettings(_Section):
    """How long a request may be held for the answer to "what do you have of this prompt?"."""

    deadline_ms: Float = Field(
        default=50.0, ge=0, le=60_000, description="after this long a request is computed, whatever may still be found"
    )
    wait_idle_ms: Float = Field(default=2.0, ge=0, le=100, description="wait in the hook, lock released, while nothing else runs")
    wait_busy_ms: Float = Field(default=0.5, ge=0, le=100, description="the same once per request, while other requests run")


class LoadSettings(_Section):
    """From L1 into the engine."""

    max_jobs: Int = Field(default=64, ge=1, le=65_536, description="loads promised and not yet ended; beyond it requests are computed")
    start_deadline_ms: Float = Field(default=1000.0, gt=0, le=600_000, description="a load not started by then is withdrawn and computed")


class SaveSettings(_Section):
    """From the engine into L1."""

    enabled: bool = Field(default=True, description="false: L1 is read, never written")
    max_jobs: Int = Field(default=256, ge=1, le=65_536, description="saves that wait or run, one per step; beyond it they are dropped")
    pair_timeout_s: Float = Field(default=60.0, gt=0, le=600, description="a save whose step or whose slots do not come by then is dropped")


class MembershipSettings(_Section):
    """The table of nodes that Redis keeps, as AIBrix writes it (`kvoffload members`); without a URL ``l2.nodes`` is the table."""

    url: Annotated[SecretStr | None, BeforeValidator(_redis)] = Field(
        default=None, description="redis:// or rediss:// URL of the Redis with the table, password included"
    )
    key: str = Field(default="kvcache_nodes", min_length=1, description="the Redis key of the table")
    poll_s: Float = Field(default=5.0, gt=0, le=3600, description="time between two looks at the table; sooner when a node is in trouble")
    timeout_ms: Float = Field(default=2000.0, gt=0, le=60_000, description="for connecting to that Redis, and for each answer of it")


class L2Settings(_Section):
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


class ModelSettings(_Section):
    """What kvoffload cannot see of the model."""

    version: str | None = Field(
        default=None, description="goes into every key: change it when weights change that look the same from outside"
    )


class LogSettings(_Section):
    """Log lines of the logger `kvoffload`."""

    level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = Field(
        default="warning", description="least level that is written"
    )


class ProfilingSettings(_Section):
    """Continuous profiles, samples tagged by actor; needs ``pip install kvoffload[profiling]``."""

    enabled: bool = Field(default=False, description="send profiles to a Pyroscope server")
    server_address: Annotated[str, AfterValidator(_http)] = Field(default="http://localhost:4040", description="that server's URL")


class Config(_Section):
    """All settings, a field per section: ``config.l1.capacity_bytes`` is ``l1.capacity_bytes``.

    Only the section ``load`` has another name here, ``config.loads``, because `Config.load` reads them.
    """

    enabled: bool = Field(default=True, description=f"false: no connector; so does {DISABLED}=1, with which nothing else needs to be valid")
    namespace: str = Field(default="", description="goes into every key: engines share blocks only within one namespace")
    l1: L1Settings = L1Settings()
    match: MatchSettings = MatchSettings()
    loads: LoadSettings = Field(default=LoadSettings(), alias="load")
    save: SaveSettings = SaveSettings()
    l2: L2Settings = L2Settings()
    model: ModelSettings = ModelSettings()
    log: LogSettings = LogSettings()
    profiling: ProfilingSettings = ProfilingSettings()

    @model_validator(mode="after")
    def _has_a_tier(self) -> Self:
        if not self.l1.enabled and self.l2.backend == "off":
            raise ValueError("l1.enabled is false and l2.backend is off, so there is nowhere to keep blocks: switch one of them on")
        return self

    @classmethod
    def load(cls, extra: Mapping[str, object] | None = None, environ: Mapping[str, str] | None = None) -> Self:
        """Settings out of ``extra`` and the variables in ``environ`` (None: ours). `ConfigError` names everything that is wrong."""
        environ = os.environ if environ is None else environ
        if is_switched_off(environ):
            return cls(enabled=False)
        problems: list[str] = []
        given = _by_setting(_from_extra(extra or {}, problems), problems) | _by_setting(_from_environ(environ, problems), problems)
        try:
            config = cls.model_validate(_tree(given, problems))
        except ValidationError as error:
            problems += [_problem(details, given) for details in error.errors()]
        else:
            if not problems:
                return config
        raise ConfigError("kvoffload is not configured correctly:\n" + "\n".join(f"  - {problem}" for problem in problems))


def is_switched_off(environ: Mapping[str, str]) -> bool:
    """The kill switch: anything in ``KVOFFLOAD_DISABLED`` but an empty value, 0, false, no or off. It must never fail to work."""
    return environ.get(DISABLED, "").strip().lower() not in ("", "0", "false", "no", "off")


@dataclass(frozen=True, slots=True)
class Setting:
    """One line of what can be set."""

    name: str
    variable: str
    type: str
    default: object
    description: str


def describe() -> tuple[Setting, ...]:
    """Every setting, in the order of the models, with the variable that sets it too."""
    return tuple(_SETTINGS.values())


def _settings() -> Iterator[Setting]:
    for setting in _settings_of(Config, ""):
        if setting.name == "l1.capacity_bytes":
            in_gib = replace(setting, name=_GB, variable=_variable(_GB), type="float", default=4.0)
            yield replace(in_gib, description=setting.description.replace("bytes", "GiB", 1))
        yield setting


def _settings_of(model: type[BaseModel], prefix: str) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        dotted, section = f"{prefix}{field.alias or name}", field.annotation
        if isinstance(section, type) and issubclass(section, _Section):
            yield from _settings_of(section, f"{dotted}.")
        else:
            yield _setting(dotted, field)


def _setting(name: str, field: FieldInfo) -> Setting:
    if get_origin(field.annotation) is tuple:
        return Setting(name, _variable(name), "list of str", ", ".join(field.default), field.description or "")
    kinds = [choice if isinstance(choice, str) else choice.__name__ for choice in get_args(field.annotation)]
    kind = " | ".join(kinds).replace("NoneType", "null") or getattr(field.annotation, "__name__", "")
    return Setting(name, DISABLED if name == "enabled" else _variable(name), kind, field.default, field.description or "")


def _variable(name: str) -> str:
    return PREFIX + name.replace(".", "_").upper()


_GB, _BYTES = "l1.capacity_gb", "l1.capacity_bytes"
_SETTINGS = {setting.name: setting for setting in _settings()}
_SECTIONS = {".".join(parts[:count]) for parts in (name.split(".") for name in _SETTINGS) for count in range(1, len(parts))}
_VARIABLES = {setting.variable: setting for setting in _SETTINGS.values()}


@dataclass(frozen=True, slots=True)
class _Given:
    name: str  # as it was spelled, dotted
    value: object
    source: str


def _from_extra(extra: object, problems: list[str], prefix: str = "") -> Iterator[_Given]:
    if not isinstance(extra, Mapping):
        example = next(name for name in _SETTINGS if name.startswith(prefix))
        what = f"{prefix[:-1]} = {_quoted(extra)}" if prefix else _quoted(extra)
        problems.append(f"{what} (from {EXTRA}): must be a mapping of settings, such as {example}")
        return
    for key, value in extra.items():
        name = f"{prefix}{key}"
        if name in _SETTINGS:
            yield _Given(name, value, EXTRA)
        elif name in _SECTIONS:
            yield from _from_extra(value, problems, f"{name}.")
        else:
            problems.append(f"{name} (from {EXTRA}): there is no such setting{_nearest(name, _SETTINGS)}")


def _from_environ(environ: Mapping[str, str], problems: list[str]) -> Iterator[_Given]:
    for variable, value in sorted(environ.items()):
        if not variable.startswith(PREFIX) or variable == DISABLED:
            continue
        setting = _VARIABLES.get(variable)
        if setting is None:
            problems.append(f"{variable}: there is no such variable{_nearest(variable, _VARIABLES)}")
        elif value.strip():
            yield _Given(setting.name, value.strip(), variable)


def _nearest(name: str, known: Mapping[str, Setting]) -> str:
    """A suggestion, by the whole name or, where its section was left out or mistaken, by its last part."""
    near = difflib.get_close_matches(name.lower() if "." in name else name, known, n=1)
    if not near:
        leaves = {candidate.rpartition(".")[2]: candidate for candidate in known}
        near = [leaves[leaf] for leaf in difflib.get_close_matches(name.rpartition(".")[2], leaves, n=1)]
    return f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(known)}"


def _by_setting(items: Iterator[_Given], problems: list[str]) -> dict[str, _Given]:
    """Of one source, by the name of the field."""
    given: dict[str, _Given] = {}
    for item in items:
        field = _BYTES if item.name == _GB else item.name
        if (other := given.get(field)) is not None:
            twice = "twice" if other.name == item.name else f"beside {other.name}, which is the same in another unit"
            problems.append(f"{item.name} (from {item.source}): given {twice}; keep one of them")
        given[field] = item
    return given


def _tree(given: Mapping[str, _Given], problems: list[str]) -> dict[str, Any]:
    """What pydantic validates: nested, and capacities in bytes."""
    tree: dict[str, Any] = {}
    for field, item in given.items():
        *sections, name = field.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = _bytes_of(item, problems) if item.name == _GB else item.value
    return tree


def _bytes_of(item: _Given, problems: list[str]) -> int:
    try:
        gib = math.nan if isinstance(item.value, bool) else float(item.value)  # type: ignore[arg-type]  # what float refuses is caught
    except (TypeError, ValueError):
        gib = math.nan
    if not 0 < gib * GIB <= 1 << 50:
        problems.append(f"{item.name} = {item.value!r} (from {item.source}): must be a number of GiB above 0, such as 4 or 0.5")
        return GIB  # in place of it, so that the other settings are still looked at
    return int(gib * GIB)


def _quoted(value: object) -> str:
    """As it was given, unless there may be a password within it: this text reaches logs."""
    text = repr(value)
    return "(not shown: it may hold a password)" if any(sign in text for sign in ("@", "?", "password", "secret")) else text


def _problem(details: Any, given: Mapping[str, _Given]) -> str:
    """One of pydantic's findings, as ``name = value (from source): what is wrong; what the setting is``."""
    field = ".".join(str(part) for part in details["loc"])
    wrong = str(details["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    while field and field not in _SETTINGS and field not in _SECTIONS:
        field = field.rpartition(".")[0]  # a place within a list
    if field not in _SETTINGS:
        return wrong  # it is about several settings, and names them
    item, setting = given[field], _SETTINGS[field]
    if "SecretStr" in setting.type:
        return f"{item.name} (from {item.source}): {wrong}; it is: {setting.description}"
    return f"{item.name} = {_quoted(item.value)} (from {item.source}): {wrong}; it is: {setting.description}; default {setting.default!r}"
