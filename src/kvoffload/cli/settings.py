"""``kvoffload config``: every setting there is."""

from __future__ import annotations

from kvoffload.config import Setting, describe


def print_settings(*, markdown: bool) -> int:
    for line in markdown_lines() if markdown else plain_lines():
        print(line)
    return 0


def plain_lines() -> list[str]:
    """Two lines per setting."""
    lines = ["Settings: in kv_connector_extra_config, nested or with dotted names, or as a variable, which wins.", ""]
    for setting in describe():
        lines.append(f"{setting.name}  ({setting.type}, default {_default(setting)})")
        lines.append(f"    {setting.description}; {setting.variable}")
    return lines


def markdown_lines() -> list[str]:
    """The table in the README."""
    lines = ["| setting | variable | default | what it is |", "|---|---|---|---|"]
    for setting in describe():
        description = setting.description.replace("|", "\\|")
        lines.append(f"| `{setting.name}` | `{setting.variable}` | {_default(setting)} | {description} |")
    return lines


def _default(setting: Setting) -> str:
    match setting.default:
        case bool():
            return "true" if setting.default else "false"
        case "" | None:
            return "none"
        case int() if setting.default >= 1 << 30 and setting.default % (1 << 30) == 0:
            return f"{setting.default} ({setting.default >> 30} GiB)"
        case _:
            return str(setting.default)
