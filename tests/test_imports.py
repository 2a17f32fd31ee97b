"""Who may import what: read from the source, through all modules of ours that an import brings along, and tried in a process."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

import kvoffload

SOURCE = Path(kvoffload.__file__).parent
PURE = ("errors", "messages", "keys", "namespace", "envelope", "l1", "l2.ring", "l2.breaker")
"""Decisions without a loop, an engine or a device: modules and packages below kvoffload, those that do not exist yet too."""

RDMA = tuple(f"l2.{name}" for name in ("infinistore_rdma", "rdma_child", "rdma_lives", "rdma_process", "rdma_session", "rdma_tether"))
WITH_ASYNCIO = ("bench", "bridge", "l2.infinistore_tcp", "l2.lanes", "l2.redis", *RDMA, "runtime", "standalone", "testing")
WITH_ENVIRONMENT = ("config", "cli", "bench", "testing")  # the last three start processes


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(SOURCE.rglob("*.py"))}


def is_below(module: str, names: tuple[str, ...]) -> bool:
    return any(f"{module}.".startswith(f"kvoffload.{name}.") for name in names)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: not functions' bodies, and not what only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            assert isinstance(child, ast.If)
            for statement in child.orelse:
                yield from (statement, *at_import(statement))
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from at_import(child)


@lru_cache
def imports_of(module: str) -> frozenset[str]:
    """What it imports directly, as full dotted names; ours with the packages around them."""
    found: set[str] = set()
    for node in at_import(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import: give the full name"
            assert node.module is not None
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names if f"{node.module}.{alias.name}" in MODULES)
    ours = [name.split(".") for name in (*found, module) if name.startswith("kvoffload.")]
    return frozenset(found | {".".join(parts[:end]) for parts in ours for end in range(1, len(parts))})


def brought_by(module: str) -> dict[str, str]:
    """Top-level packages that importing ``module`` imports, each with the module of ours that does so."""
    seen, todo, foreign = {module}, [module], dict[str, str]()
    while todo:
        current = todo.pop()
        for name in imports_of(current):
            if name in MODULES and name not in seen:
                seen.add(name)
                todo.append(name)
            elif not name.startswith("kvoffload"):
                foreign[name.partition(".")[0]] = current
    return foreign


PURE_MODULES = [module for module in MODULES if is_below(module, PURE)]


def test_the_rules_below_see_the_tree() -> None:
    assert {"kvoffload.keys", "kvoffload.namespace", "kvoffload.l1", "kvoffload.messages"} <= set(PURE_MODULES)
    assert brought_by("kvoffload.mailbox").keys() >= {"anyio"}
    assert brought_by("kvoffload.observe.profiling").keys() >= {"structlog"}  # through observe.logs
    assert "torch" not in brought_by("kvoffload.keys")


@pytest.mark.parametrize("module", PURE_MODULES)
def test_pure_modules_import_no_loop_engine_or_device(module: str) -> None:
    brought = brought_by(module)
    assert {name: brought[name] for name in {"anyio", "asyncio", "torch", "vllm", "numba", "structlog"} & brought.keys()} == {}


@pytest.mark.parametrize("module", [module for module in MODULES if not is_below(module, WITH_ASYNCIO)])
def test_asyncio_is_imported_only_where_vllms_threads_meet_the_loop(module: str) -> None:
    source = ast.parse(MODULES[module].read_text())
    names = {alias.name for node in ast.walk(source) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(source) if isinstance(node, ast.ImportFrom)}
    assert not {name for name in names if name.partition(".")[0] == "asyncio"}


@pytest.mark.parametrize("module", [module for module in MODULES if not is_below(module, WITH_ENVIRONMENT)])
def test_only_config_reads_the_environment(module: str) -> None:
    nodes = list(ast.walk(ast.parse(MODULES[module].read_text())))
    assert not {node.attr for node in nodes if isinstance(node, ast.Attribute)} & {"environ", "environb", "getenv"}


HEAVY = {"torch", "vllm", "numba", "numpy", "pydantic", "anyio", "asyncio", "structlog", "pyroscope"}


@pytest.mark.parametrize("module", ["kvoffload", "kvoffload.connector", "kvoffload.errors"])
def test_what_every_process_of_vllm_imports_is_cheap(module: str) -> None:
    assert loaded_by(f"import {module}") & HEAVY == set()


@pytest.mark.parametrize("module", [module for module in PURE_MODULES if "." in module])
def test_pure_modules_bring_no_loop_engine_or_device_in_fact(module: str) -> None:
    assert loaded_by(f"import {module}") & {"anyio", "asyncio", "torch", "vllm", "numba", "structlog"} == set()


def test_the_connector_brings_nothing_heavy_but_vllm_itself() -> None:
    for module in ("kvoffload.connector.plugin", "kvoffload.connector.connector"):
        if module in MODULES:
            assert brought_by(module).keys() & {"torch", "numba", "cuda", "pyroscope"} == set(), module


def test_public_names_are_there() -> None:
    """Imported on first use, and listed before."""
    assert set(kvoffload.__all__) <= set(dir(kvoffload))
    homes = {name: getattr(kvoffload, name).__module__ for name in kvoffload.__all__ if name != "__version__"}
    assert homes.pop("Config") == "kvoffload.config"
    assert {name for name, home in homes.items() if home == "kvoffload.standalone"} == {"Hit", "Runtime", "Saved", "open_runtime"}
    assert {home for name, home in homes.items() if name.endswith("Error")} == {"kvoffload.errors"}
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        kvoffload.nope  # type: ignore[attr-defined]  # noqa: B018


def loaded_by(statement: str) -> set[str]:
    program = f"import sys; sys.path[:] = {sys.path!r}\n{statement}\nprint(*(name.partition('.')[0] for name in sys.modules))"
    # -I, as a site's own hooks may import anything
    run = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, check=True, text=True)
    return set(run.stdout.split())
