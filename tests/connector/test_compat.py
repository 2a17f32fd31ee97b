"""`kvoffload.connector.compat`: versions and platform differences."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvoffload.connector import compat

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(120)]


@pytest.mark.parametrize(
    ("version", "minor"),
    [
        ("0.32.0", (0, 32)),
        ("0.32.0+cpu", (0, 32)),
        ("0.32.1rc2", (0, 32)),
        ("0.32.1.post1", (0, 32)),
        ("0.9.2", (0, 9)),
        ("1.0.0", (1, 0)),
        ("0.32.1.dev17+gdeadbeef", None),
        ("dev", None),
        ("", None),
    ],
)
def test_minor_version(version: str, minor: tuple[int, int] | None) -> None:
    assert compat.minor_version(version) == minor


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.32.3"])
def test_supported(version: str) -> None:
    assert compat.check_version(version) is None


@pytest.mark.parametrize("version", ["0.31.0", "0.33.0", "0.32.1.dev3+g1234", "1.32.0", "dev"])
def test_unsupported_says_what_is(version: str) -> None:
    reason = compat.check_version(version)
    assert reason is not None
    assert version in reason
    assert "0.32.x" in reason


def test_the_installed_one_is_supported() -> None:
    pytest.importorskip("vllm")
    assert compat.check_version() is None


@pytest.mark.parametrize(("version", "tells"), [("0.32.0", False), ("0.33.0", True), ("0.34.1", True), ("dev", False)])
def test_tells_of_sleep(version: str, tells: bool) -> None:
    assert compat.tells_of_sleep(version) is tells


def test_inside_multi_connector(monkeypatch: pytest.MonkeyPatch) -> None:
    state = pytest.importorskip("vllm.distributed.kv_transfer.kv_transfer_state")
    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

    assert not compat.is_inside_multi_connector()
    group: Any = object.__new__(MultiConnector)
    monkeypatch.setattr(state, "_KV_CONNECTOR_AGENT", group)
    assert compat.is_inside_multi_connector()


def test_cpu_packing_follows_the_shape() -> None:
    torch = pytest.importorskip("torch")
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.bfloat16), cache_config=SimpleNamespace(cache_dtype="auto"), attention_config=None
    )
    wide = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    odd = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=80, dtype=torch.bfloat16)
    assert compat.attention_identity(config, wide) == compat.attention_identity(config, wide)
    assert compat.attention_identity(config, wide)["packing"] != compat.attention_identity(config, odd)["packing"] == "vec16"
