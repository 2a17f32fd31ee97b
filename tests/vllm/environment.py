"""The environment that real vLLM runs in here: set before vLLM, and torch, are imported."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]

_ALWAYS = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",  # this process has threads, which do not survive a fork
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

MODELS = Path(tempfile.gettempdir()) / f"kvoffload-test-models-{os.getuid()}"
"""Made once for all runs: what is in there is named by its content."""


def prepare(processes: int = 1) -> None:
    """For an engine in so many processes: 1, 2 (worker apart) or 3 (vLLM's default on CPU)."""
    os.environ.update(_ALWAYS)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if processes == 3 else "0"
    for path in (str(ROOT), str(ROOT / "src")):
        if path not in sys.path:
            sys.path.insert(0, path)  # spawned processes get it too
    if "vllm.envs" in sys.modules:
        import vllm.envs

        vllm.envs.disable_envs_cache()  # an engine that ran here before has frozen them
