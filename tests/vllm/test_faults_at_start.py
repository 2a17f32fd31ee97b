"""What cannot work is refused: the engine lives, and one line says why."""

from __future__ import annotations

from typing import Any

import pytest
from tests.vllm.connectors import transfer_config
from tests.vllm.harness import Engine
from tests.vllm.outputs import assert_same
from tests.vllm.plain import Plain
from tests.vllm.prompts import prompts

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "switched off": ({}, "KVOFFLOAD_DISABLED"),
    "unknown setting": ({"kv_connector_extra_config": {"l1": {"capcity_gb": 1}}}, "capacity_gb"),
    "impossible capacity": ({"kv_connector_extra_config": {"l1": {"capacity_gb": 1 << 20}}}, "capacity"),
    "a block that no slot can hold": ({"kv_connector_extra_config": {"l1": {"capacity_bytes": 4096, "reserve_bytes": 0}}}, "block"),
    "unsupported role": ({"kv_role": "kv_producer"}, "kv_producer"),
}


class Off(Engine):
    """Its connector does not get ready."""

    def _wait_ready(self) -> None:
        assert self.connector is not None


@pytest.mark.parametrize("case", CASES)
def test_the_engine_lives_and_one_line_says_why(
    plain: Plain, case: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, word = CASES[case]
    if case == "switched off":
        monkeypatch.setenv("KVOFFLOAD_DISABLED", "1")
    asked = prompts([100, 33], case)
    with Off(transfer=transfer_config() | changes) as served:
        for _ in range(2):
            assert_same(plain.generate(asked), served.generate(asked))
            served.drop_engine_cache()
            served.noise()
        served.assert_nothing_leaked()
    said = [record for record in caplog.records if record.name.startswith("kvoffload") and record.levelname in ("WARNING", "ERROR")]
    assert len(said) == 1, [record.getMessage() for record in said]
    assert said[0].levelname == ("WARNING" if case == "switched off" else "ERROR")
    assert "connector off" in said[0].getMessage()
    assert word in said[0].getMessage()
    assert said[0].exc_info is None
