"""A copy thread that dies with its copy: the engine goes on as plain vLLM, and nobody waits for what will not come."""

from __future__ import annotations

import pytest
from tests.vllm.connectors import faulty_config
from tests.vllm.harness import engine
from tests.vllm.outputs import assert_same
from tests.vllm.plain import Plain
from tests.vllm.prompts import prompts
from tests.vllm.roundtrip import check_roundtrip


@pytest.mark.parametrize("kind", ["save", "load"])
def test_a_copy_thread_dies(plain: Plain, kind: str) -> None:
    with engine(transfer=faulty_config(), num_gpu_blocks_override=64) as served:
        known, new, later = prompts([300, 200, 250], ("crash", kind))
        check_roundtrip(served, plain, [known])
        served.forget()
        served.copies.crash_next(kind)
        for asked in ([known, new], [later], [known, new, later]):
            assert_same(plain.generate(asked), served.generate(asked))
            served.idle_steps(3)
            served.drop_engine_cache()
            served.noise()
        assert_same(plain.generate([later]), served.generate([later]))
        served.assert_nothing_leaked()
