"""vLLM's own log line says what kvoffload did: its counters go from both halves, in whichever processes, to vLLM's front end."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tests.vllm.connectors import faulty_config
from tests.vllm.harness import Engine, engine
from tests.vllm.plain import Plain
from tests.vllm.prompts import prompts

from kvoffload.connector.stats import GAUGES

WAIT_S = 60.0


class Lines(logging.Handler):
    """vLLM's lines about its connector: their counters, added up, and the newest gauges."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[str] = []
        self.totals: Counter[str] = Counter()
        self.newest: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        found = re.fullmatch(r"KV Transfer metrics: (.+)", record.getMessage())
        if found is None:
            return
        self.said.append(found[1])
        for pair in found[1].split(", "):
            name, value = pair.split("=")
            if name in GAUGES or name == "hit_rate":
                self.newest[name] = float(value)
            else:
                self.totals[name] += int(value)


@contextmanager
def listening(served: Engine) -> Iterator[Lines]:
    """vLLM logs errors only in these tests, and so has made no logger of its figures: it gets the one that it usually has."""
    from vllm.v1.metrics.loggers import LoggingStatLogger, PerEngineStatLoggerAdapter

    llm = served.llm.llm_engine
    assert llm.logger_manager is not None
    llm.logger_manager.stat_loggers.append(PerEngineStatLoggerAdapter(llm.vllm_config, [0], LoggingStatLogger))
    lines, logger = Lines(), logging.getLogger(LoggingStatLogger.__module__)
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(lines)
    try:
        yield lines
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)


@pytest.mark.parametrize("processes", [1, pytest.param(3, marks=pytest.mark.long)])
def test_vllms_line_says_what_was_saved_and_loaded(plain: Plain, processes: int) -> None:
    asked = prompts([200, 330], ("statistics", processes))
    blocks = sum((len(one) - 1) // 32 for one in asked)
    with engine(transfer=faulty_config(), processes=processes) as served, listening(served) as lines:
        served.generate(asked, 1)
        served.forget()
        found = served.generate(asked, 1)
        assert sum(one.cached for one in found) == blocks * 32

        end = time.monotonic() + WAIT_S
        while lines.totals["loaded_blocks"] < blocks or lines.totals["hit_tokens"] < blocks * 32 or "saved_blocks" not in lines.totals:
            assert time.monotonic() < end, lines.said
            threading.Event().wait(0.1)  # counters are taken once a second, in a step
            served.generate([[1]], 1)
            served.llm.llm_engine.do_log_stats()
    assert lines.totals["loads"] == len(asked)
    assert lines.totals["loaded_blocks"] == blocks
    assert lines.totals["hit_tokens"] == blocks * 32
    assert lines.totals["queried_tokens"] >= 2 * sum(len(one) for one in asked)
    assert lines.totals["saved_blocks"] == blocks
    assert lines.totals["loaded_bytes"] % blocks == 0
    assert lines.totals["loaded_bytes"] > 0
    assert lines.newest["l1_used_blocks"] == blocks
    assert lines.newest["l1_capacity_blocks"] > 100
    assert not any(name.startswith("failed") for name in lines.totals)
    assert not any(re.search(r"=0(,|$)", said) for said in lines.said), f"what did not happen is not said: {lines.said}"
