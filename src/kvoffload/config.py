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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from kvoffload.errors import ConfigError
from kvoffload.settings import (
    GIB,
    GpuSettings,
    L1Settings,
    L2Settings,
    LoadSettings,
    LogSettings,
    MatchSettings,
    MembershipSettings,
    ModelSettings,
    ProfilingSettings,
    SaveSettings,
    Section,
)

__all__ = [
    "Config",
    "GpuSettings",
    "L1Settings",
    "L2Settings",
    "LoadSettings",
    "LogSettings",
    "MatchSettings",
    "MembershipSettings",
    "ModelSettings",
    "ProfilingSettings",
    "SaveSettings",
    "Setting",
    "describe",
    "is_switched_off",
]

PREFIX = "KVOFFLOAD_"
DISABLED = "KVOFFLOAD_DISABLED"
EXTRA = "kv_connector_extra_config"


class Config(Section):
    """All settings, a field per section: ``config.l1.capacity_bytes`` is ``l1.capacity_bytes``.

    Two have other names here: the section ``load`` is ``config.loads``, because `Config.load` reads them, and ``gpu.copy`` is
    ``config.gpu.copy_with``, because pydantic's models have a method of that name.
    """

    enabled: bool = Field(default=True, description=f"false: no connector; so does {DISABLED}=1, with which nothing else needs to be valid")
    namespace: str = Field(default="", description="goes into every key: engines share blocks only within one namespace")
    l1: L1Settings = L1Settings()
    match: MatchSettings = MatchSettings()
    loads: LoadSettings = Field(default=LoadSettings(), alias="load")
    save: SaveSettings = SaveSettings()
    gpu: GpuSettings = GpuSettings()
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
        if isinstance(section, type) and issubclass(section, Section):
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
