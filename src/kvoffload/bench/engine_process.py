"""A real vLLM on this CPU in a process of its own: what the demo and the benchmarks talk to.

The child (`kvoffload.bench.engine_child`) makes one `LLM` and does what it is told, a JSON line in, a JSON line out. Its own output,
vLLM's logs that is, goes to a file: nothing of it reaches the terminal, and the last lines of it are shown when it fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from kvoffload.errors import MisuseError, PeerError

Connector = Literal["none", "kvoffload", "example", "idle"]

CONNECTOR_OFF = "connector off"
"""What our log says when the engine runs without us."""

CLOSE_TIMEOUT_S = 20.0
"""vLLM takes up to 14 s to end its processes."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """One engine. ``multiprocessing`` is vLLM's default: scheduler and worker in processes of their own; else everything is in one.

    ``l1_bytes`` concerns kvoffload, ``storage`` (a directory) vLLM's ExampleConnector. ``count_tokens`` turns on vLLM's statistics.
    ``kv_blocks`` makes the engine's cache smaller than ``kv_gib`` does. ``l2`` are kvoffload's settings of that section.
    """

    model: str
    connector: Connector = "kvoffload"
    multiprocessing: bool = False
    dtype: str = "float32"
    l1_bytes: int = 1 << 30
    storage: str = ""
    max_model_len: int = 4608
    max_num_seqs: int = 16
    kv_gib: int = 1
    kv_blocks: int | None = None
    count_tokens: bool = False
    l2: dict[str, Any] | None = None


def engine_environment(options: EngineOptions, environ: dict[str, str]) -> dict[str, str]:
    """``environ`` for such an engine: one compute thread, no downloads, no usage reports, and none of the user's settings for us."""
    kept = {name: value for name, value in environ.items() if not name.startswith("KVOFFLOAD_")}
    return kept | {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(options.kv_gib),
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(options.multiprocessing)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [environ.get("PYTHONPATH")])]),
    }


class EngineProcess:
    """A context manager: the process ends with it, on any way out. Calls raise PeerError when the engine is gone."""

    def __init__(self, options: EngineOptions, *, show_log: bool = False) -> None:
        self.options = options
        # The log outlives what vLLM's processes write at their very end.
        self._log = None if show_log else tempfile.NamedTemporaryFile("w+b", prefix="kvoffload-engine-", suffix=".log")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvoffload.bench.engine_child", json.dumps(asdict(options))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=engine_environment(options, dict(os.environ)),
            start_new_session=True,  # Ctrl-C reaches us alone, and the whole group can be ended
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(CLOSE_TIMEOUT_S if kind is None else 5.0)

    def wait_ready(self) -> dict[str, Any]:
        """Until the engine has started: its facts, with ``seconds`` that it took."""
        facts: dict[str, Any] = self._answer()
        return facts

    def call(self, command: str, **arguments: Any) -> Any:
        """Run a method of `kvoffload.bench.engine_child.Engine`; its result, as JSON brings it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([command, arguments]).encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise self._gone() from error
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._gone()
        answer = json.loads(line)
        if "misuse" in answer:
            raise MisuseError(answer["misuse"])
        return answer["result"]

    def _gone(self) -> PeerError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)
        return PeerError(f"the vLLM engine ended with status {self._process.returncode}; the end of its log:\n{self.log_tail()}")

    def log_tail(self, lines: int = 25) -> str:
        """The last lines that the engine logged."""
        return "\n".join(self.log().splitlines()[-lines:])

    def log(self) -> str:
        """All that the engine logged; empty with ``show_log``."""
        if self._log is None or self._log.closed:
            return ""
        return Path(self._log.name).read_text(errors="replace")

    def off_reason(self) -> str | None:
        """The line in which kvoffload said that it is off, if it did."""
        return next((line for line in self.log().splitlines() if CONNECTOR_OFF in line), None)

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """End the engine: asked first, then killed with all that it started."""
        process = self._process
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # What vLLM leaves behind is in the child's process group; its number is not reused while a member lives.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
            if self._log is not None:
                self._log.close()
