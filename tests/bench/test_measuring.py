"""Quantiles, intervals, prompts, CPU time: what the figures rest on."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from kvoffload.bench.cpu_time import cpu_seconds, thread_seconds
from kvoffload.bench.engine_process import EngineOptions, engine_environment
from kvoffload.bench.measuring import cluster_interval, quantile, unique_prompts
from kvoffload.errors import MisuseError


@pytest.mark.parametrize(("share", "value"), [(0.0, 1), (0.5, 50), (0.99, 99), (0.991, 100), (1.0, 100)])
def test_a_quantile_is_one_of_the_values(share: float, value: int) -> None:
    assert quantile(list(range(100, 0, -1)), share) == value


def test_a_quantile_of_nothing_is_misuse() -> None:
    with pytest.raises(MisuseError):
        quantile([], 0.5)


def spread(middle: float, step: float) -> list[float]:
    return [middle + step * index for index in range(-10, 11)]


def test_the_interval_holds_the_median_and_widens_with_the_spread() -> None:
    narrow = cluster_interval([spread(1.0, 0.001)] * 4)
    wide = cluster_interval([spread(1.0, 0.1)] * 4)
    assert narrow[0] < 1.0 < narrow[1]
    assert wide[0] < narrow[0]
    assert narrow[1] < wide[1]
    assert cluster_interval([[0.98] * 5] * 4) == (0.98, 0.98)


def test_more_values_of_the_same_groups_do_not_narrow_what_the_groups_differ_by() -> None:
    middles = (0.95, 0.99, 1.01, 1.05)
    few, many = (cluster_interval([[middle] * count for middle in middles]) for count in (5, 50))
    assert few == many
    assert few[0] < 0.97
    assert few[1] > 1.03


def test_prompts_share_no_beginning_and_repeat_by_seed() -> None:
    prompts = unique_prompts(6, [40, 50], seed=1)
    assert [len(prompt) for prompt in prompts] == [40, 50, 40, 50, 40, 50]
    assert len({tuple(prompt[:16]) for prompt in prompts}) == 6
    assert unique_prompts(6, [40, 50], seed=1) == prompts
    assert unique_prompts(1, [40], seed=2)[0] != prompts[0]


def test_cpu_time_of_threads_is_found_by_their_name() -> None:
    stop = threading.Event()

    def work() -> None:
        until = time.thread_time() + 0.05
        while time.thread_time() < until:
            pass
        worked.set()
        stop.wait(30)

    worked = threading.Event()
    thread = threading.Thread(target=work, name="kvoffload-test-worker")
    other = threading.Thread(target=stop.wait, name="another")
    thread.start()
    other.start()
    try:
        assert worked.wait(30)
        found = cpu_seconds()
    finally:
        stop.set()
        thread.join()
        other.join()
    assert 0.03 <= found["kvoffload-test-worker"] <= found["process"]
    assert "another" not in found


def test_cpu_time_without_schedstat_counts_ticks(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "schedstat").write_text("0 0 0\n")
    (tmp_path / "7" / "stat").write_text("7 (a (strange) name) S 1 1 1 0 -1 64 0 0 0 0 150 50 0 0 20 0 1 0 1 1\n")
    assert thread_seconds(7, tmp_path) == pytest.approx(2.0)
    assert thread_seconds(8, tmp_path) == 0.0


def test_the_users_settings_of_ours_do_not_reach_the_engine() -> None:
    environ = engine_environment(EngineOptions("m", multiprocessing=True), {"KVOFFLOAD_DISABLED": "1", "HOME": "/h", "PYTHONPATH": "p"})
    assert "KVOFFLOAD_DISABLED" not in environ
    assert environ["HOME"] == "/h"
    assert environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"
    assert environ["PYTHONPATH"].endswith(":p")
