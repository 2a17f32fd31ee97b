"""The settings as this environment gives them; nothing that may be a secret, or name a machine that is nobody's business."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import SecretStr

from kvoffload.config import Config, describe
from kvoffload.doctor.report import Finding, Section, State
from kvoffload.errors import ConfigError

HIDDEN = ("l2.nodes",)
"""Its URLs may hold passwords."""


def settings(environ: Mapping[str, str] | None = None) -> Section:
    """Those that differ from their default. vLLM's kv_connector_extra_config is not seen from here."""
    try:
        config = Config.load(None, environ)
    except ConfigError as error:
        return Section("settings", (Finding("KVOFFLOAD_* variables", str(error), State.FAILED),))
    given, default = config.model_dump(by_alias=True), Config().model_dump(by_alias=True)
    found = []
    for setting in describe():
        if setting.name == "l1.capacity_gb":
            continue  # another name of capacity_bytes
        value = _at(given, setting.name)
        if value != _at(default, setting.name):
            found.append(Finding(setting.name, shown(setting.name, value)))
    return Section("settings", tuple(found) or (Finding("all", "as by default, as far as this environment says"),))


def shown(name: str, value: object) -> str:
    """The value, or that there is one."""
    if isinstance(value, SecretStr):
        return "(set, not shown)"
    if name in HIDDEN and isinstance(value, tuple):
        return f"({len(value)} given, not shown)"
    text = str(value)
    return "(set, not shown)" if "@" in text or "?" in text else text


def _at(tree: Mapping[str, Any], name: str) -> Any:
    value: Any = tree
    for part in name.split("."):
        value = value[part]
    return value
