"""The examples run, and what the README and they tell users to type is what kvoffload understands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvoffload.cli.settings import markdown_lines
from kvoffload.config import Config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_standalone_runs_without_vllm() -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / "standalone.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=55, env=environ, check=False)
    assert done.returncode == 0, done.stderr
    assert "saved    96 of 100 tokens" in done.stdout
    assert "loaded   80 tokens into blocks [20, 21, 22, 23, 24]" in done.stdout
    assert "the same bytes as were computed: True" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("text", [README, (ROOT / "examples" / "serve.sh").read_text()], ids=["README.md", "serve.sh"])
def test_the_argument_for_vllm_serve_is_valid(text: str) -> None:
    found = re.search(r"--kv-transfer-config '(.*?)'", text, re.DOTALL)
    assert found is not None
    argument = json.loads(found[1])
    assert argument["kv_connector"] == "KVOffloadConnector"
    assert argument["kv_role"] == "kv_both"
    assert argument["kv_load_failure_policy"] == "recompute"
    assert Config.load(argument["kv_connector_extra_config"], {}).l1.capacity_bytes == 8 << 30


def test_the_readme_lists_every_setting_as_it_is() -> None:
    assert "\n".join(markdown_lines()) in README


def test_the_readme_links_to_files_that_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("name", ["offline_vllm.py", "standalone.py"])
def test_examples_compile(name: str) -> None:
    path = ROOT / "examples" / name
    compile(path.read_text(), str(path), "exec")
