"""A strict stand-in for libcuda.so.1 in this process: built from cuda/standin by g++, driven through ctypes.

    standin = load()                                   # once per process; the real cuda-bindings run on it from then on
    standin.reset(Machine(driver_version=12080))       # per test: nothing of before is left
    kv = np.zeros(1 << 20, np.uint8)
    standin.device_memory(kv)                          # ordinary memory plays the GPU's
    stream = standin.engine_stream()                   # as torch would have one
    standin.hold(stream)
    standin.write(stream, kv, b"\\x07" * kv.nbytes)     # the engine's kernel: happens at its place in the stream
    ...
    standin.release(stream)
    standin.check()                                    # neither violations nor leaks

Every wait here is bounded and raises TimeoutError. What a test waits for it is told of; there is nothing to poll.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.cuda.standin_build import build
from tests.cuda.standin_types import BatchOrder, Call, CaptureMode, Code, Effect, Live, Machine, StreamState, Symbol, Violation, Wait

__all__ = [
    "BatchOrder",
    "Call",
    "CaptureMode",
    "Code",
    "Effect",
    "Live",
    "Machine",
    "Reading",
    "Standin",
    "StreamState",
    "Symbol",
    "Violation",
    "load",
]

TIMEOUT_S = 20.0
_loaded: Standin | None = None


def load() -> Standin:
    """The stand-in of this process, built first where it has changed, and known to cuda.bindings as the driver.

    Raises RuntimeError where another libcuda is in the process already, or g++ does not build it.
    """
    global _loaded
    if _loaded is None:
        with open("/proc/self/maps") as maps:
            if any("libcuda.so" in line for line in maps):
                raise RuntimeError("another libcuda is in this process: load the stand-in before anything uses CUDA")
        _loaded = Standin(ctypes.CDLL(str(build()), ctypes.RTLD_GLOBAL))
        _let_bindings_find_all()
        _loaded.reset()
    return _loaded


def _let_bindings_find_all() -> None:
    """cuda.bindings looks its functions up once in a process: now, when none is configured away."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return
    driver.cuDriverGetVersion()


class Reading:
    """Bytes that a stream reads at some place of it."""

    def __init__(self, standin: Standin, ticket: int, num_bytes: int) -> None:
        self._standin, self._ticket, self._bytes = standin, ticket, num_bytes

    def result(self, timeout_s: float = TIMEOUT_S) -> NDArray[np.uint8]:
        """Wait until the stream has got there; what was in memory then."""
        found = np.empty(self._bytes, np.uint8)
        code = self._standin.lib.standin_read_result(self._ticket, found.ctypes.data, self._bytes, timeout_s)
        if code < 0:
            raise TimeoutError(f"the stream did not come to the read of {self._bytes} bytes in {timeout_s} s")
        if code > 0:
            raise RuntimeError(f"the context of the read has failed with {code}")
        return found


class Standin:
    """Everything that a test may do to the stand-in. Calls of this class are not in the log and break no rule."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self.lib = lib
        self.machine = Machine()
        self._kept: list[Any] = []
        number, text, real = ctypes.c_uint64, ctypes.c_char_p, ctypes.c_double
        lib.standin_set_number.argtypes = [text, ctypes.c_int64]
        lib.standin_set_text.argtypes = [text, text]
        lib.standin_device_memory.argtypes = [number, number, ctypes.c_int]
        lib.standin_forget.argtypes = [number]
        lib.standin_engine_stream.argtypes = [ctypes.c_int, ctypes.c_int]
        lib.standin_engine_stream.restype = number
        lib.standin_write.argtypes = [number, number, ctypes.c_void_p, number]
        lib.standin_read.argtypes = [number, number, number]
        lib.standin_read.restype = number
        lib.standin_read_result.argtypes = [number, ctypes.c_void_p, number, real]
        lib.standin_hold.argtypes = [number, ctypes.c_int]
        lib.standin_hold_new.argtypes = [ctypes.c_int]
        lib.standin_step.argtypes = [number, number]
        lib.standin_pause_inside.argtypes = [number, number]
        lib.standin_delay_stream.argtypes = [number, real]
        lib.standin_delay_function.argtypes = [text, real]
        lib.standin_wait.argtypes = [ctypes.c_int, text, number, number, real]
        lib.standin_fail.argtypes = [text, ctypes.c_int, number, number, ctypes.c_int]
        lib.standin_fail_operation.argtypes = [number, text, ctypes.c_int, number, ctypes.c_int]
        lib.standin_break_context.argtypes = [ctypes.c_int]
        lib.standin_begin_capture.argtypes = [number, ctypes.c_int]
        lib.standin_end_capture.argtypes = [number]
        lib.standin_forgive.argtypes = [text]
        lib.standin_report.argtypes = [text]
        lib.standin_report.restype = ctypes.c_void_p
        lib.standin_free.argtypes = [ctypes.c_void_p]

    # -- the machine

    def reset(self, machine: Machine | None = None) -> None:
        """End all threads, forget everything, become ``machine``. Whoever is blocked in a call gets CUDA_ERROR_DEINITIALIZED."""
        self.lib.standin_reset()
        self._kept.clear()
        self._become(machine or Machine())

    def configure(self, **changes: Any) -> None:
        """Change fields of the machine from now on."""
        self._become(replace(self.machine, **changes))

    def _become(self, machine: Machine) -> None:
        for item in fields(machine):
            value = getattr(machine, item.name)
            if isinstance(value, str):
                known = self.lib.standin_set_text(item.name.encode(), value.encode())
            else:
                known = self.lib.standin_set_number(item.name.encode(), int(value))
            if not known:
                raise KeyError(f"the stand-in has no setting {item.name}")
        self.machine = machine

    # -- memory

    def device_memory(self, array: NDArray[Any], device: int = 0) -> int:
        """Let this array's memory be one allocation of the device; its address. It is kept until `forget` or `reset`."""
        if not array.flags.c_contiguous:
            raise ValueError("only contiguous memory can play an allocation")
        if self.lib.standin_device_memory(array.ctypes.data, array.nbytes, device) != 0:
            raise ValueError("this memory overlaps an allocation, or a registration")
        self._kept.append(array)
        return int(array.ctypes.data)

    def forget(self, array: NDArray[Any]) -> None:
        """As if the tensor were freed: copies there are copies of pageable memory from now on."""
        if self.lib.standin_forget(array.ctypes.data) != 0:
            raise ValueError("this is not declared as device memory")
        self._kept = [kept for kept in self._kept if kept is not array]

    # -- streams

    def engine_stream(self, *, blocking: bool = False, device: int = 0) -> int:
        """A stream such as the engine computes in: its handle. It needs no context current here and is no leak."""
        return int(self.lib.standin_engine_stream(0 if blocking else 1, device))

    def write(self, stream: int, memory: NDArray[Any] | int, content: bytes | NDArray[Any]) -> None:
        """The engine's kernel: ``content`` is in memory once the stream has got there. (No operation of ours is checked against it.)"""
        data = content if isinstance(content, bytes) else content.tobytes()
        address = memory if isinstance(memory, int) else memory.ctypes.data
        if self.lib.standin_write(stream, address, data, len(data)) != 0:
            raise ValueError(f"stream {stream:#x} does not exist, or its context is broken")

    def read(self, stream: int, memory: NDArray[Any] | int, num_bytes: int | None = None) -> Reading:
        """The engine's kernel reads: what it finds when the stream has got there."""
        address, size = (memory, num_bytes) if isinstance(memory, int) else (memory.ctypes.data, num_bytes or memory.nbytes)
        if size is None:
            raise ValueError("how many bytes?")
        ticket = int(self.lib.standin_read(stream, address, size))
        if ticket == 0:
            raise ValueError(f"stream {stream:#x} does not exist, or its context is broken")
        return Reading(self, ticket, size)

    def hold(self, stream: int) -> None:
        """Nothing of this stream starts from now on. Never released, its completions never come."""
        self._stream(self.lib.standin_hold(stream, 1), stream)

    def release(self, stream: int) -> None:
        """Let it run, also where it was paused inside an operation."""
        self._stream(self.lib.standin_hold(stream, 0), stream)

    def hold_new_streams(self, hold: bool = True) -> None:
        """Streams that are made from now on are held from the start."""
        self.lib.standin_hold_new(int(hold))

    def step(self, stream: int, operations: int = 1) -> None:
        """Let a held stream run so many operations (records and waits are operations too). Does not wait for them."""
        self._stream(self.lib.standin_step(stream, operations), stream)

    def pause_inside(self, stream: int, copies: int) -> None:
        """The next batch stops when it has made so many of its copies, until `release`. See `wait_paused`."""
        self._stream(self.lib.standin_pause_inside(stream, copies), stream)

    def delay(self, stream: int, seconds: float) -> None:
        """Each operation of this stream (0: of all) takes so much longer."""
        self._stream(self.lib.standin_delay_stream(stream, seconds), stream)

    def delay_calls(self, function: str, seconds: float) -> None:
        """Each call of this function takes so much longer, in the thread that calls."""
        self.lib.standin_delay_function(function.encode(), seconds)

    def streams(self) -> list[StreamState]:
        """All streams, oldest first; the legacy default stream (1) where it was used."""
        return [StreamState(**{**found, "kinds": tuple(found["kinds"])}) for found in self._report("streams")]

    def stream(self, handle: int) -> StreamState:
        return next(state for state in self.streams() if state.handle == handle)

    @staticmethod
    def _stream(code: int, stream: int) -> None:
        if code != 0:
            raise ValueError(f"there is no stream {stream:#x}")

    # -- waiting

    def wait_calls(self, function: str, count: int = 1, timeout_s: float = TIMEOUT_S) -> None:
        """Until this function was called so many times since the last reset (they need not have returned)."""
        self._wait(Wait.CALLS, function, 0, count, timeout_s)

    def wait_blocked(self, function: str, threads: int = 1, timeout_s: float = TIMEOUT_S) -> None:
        """Until so many threads wait inside this function, such as cuEventSynchronize."""
        self._wait(Wait.BLOCKED, function, 0, threads, timeout_s)

    def wait_pending(self, stream: int, operations: int = 1, timeout_s: float = TIMEOUT_S) -> None:
        """Until so many operations of the stream have not ended."""
        self._wait(Wait.PENDING, "", stream, operations, timeout_s)

    def wait_executed(self, stream: int, operations: int, timeout_s: float = TIMEOUT_S) -> None:
        """Until the stream has executed so many operations since it was made."""
        self._wait(Wait.EXECUTED, "", stream, operations, timeout_s)

    def wait_paused(self, stream: int, timeout_s: float = TIMEOUT_S) -> None:
        """Until the stream stands inside an operation, as `pause_inside` asked."""
        self._wait(Wait.PAUSED, "", stream, 1, timeout_s)

    def wait_idle(self, stream: int = 0, timeout_s: float = TIMEOUT_S) -> None:
        """Until nothing of this stream is pending (0: of any)."""
        self._wait(Wait.IDLE, "", stream, 0, timeout_s)

    def _wait(self, what: Wait, function: str, stream: int, count: int, timeout_s: float) -> None:
        if self.lib.standin_wait(what.value, function.encode(), stream, count, timeout_s) != 0:
            raise TimeoutError(f"{what.name.lower()} {function or hex(stream)} did not come to {count} in {timeout_s} s")

    # -- faults

    def fail(self, function: str, code: int, at: int = 1, times: int = 1, effect: Effect = Effect.NONE) -> None:
        """The ``at``-th call of ``function`` from now (and ``times`` - 1 after it) answers ``code``. "*" counts calls of all functions."""
        self.lib.standin_fail(function.encode(), code, at, times, effect)

    def fail_operation(self, code: int, stream: int = 0, kind: str = "", at: int = 1, *, sticky: bool = True) -> None:
        """The ``at``-th operation from now of ``stream`` (0: any) and ``kind`` ("": any) fails when it runs, half done.

        Sticky, as nearly all of CUDA's asynchronous errors are: the context is broken, each later call answers ``code``, what is
        pending never runs. Else: its own completion, and those that wait for it, answer ``code``, and that is all.
        """
        self.lib.standin_fail_operation(stream, kind.encode(), code, at, int(sticky))

    def break_context(self, code: int = Code.ILLEGAL_ADDRESS) -> None:
        """Now, as if a kernel of the engine had done something wrong."""
        self.lib.standin_break_context(code)

    # -- graph capture

    @contextmanager
    def capture(self, stream: int, mode: CaptureMode = CaptureMode.GLOBAL) -> Iterator[None]:
        """The engine captures a graph in this stream, from this thread. What was unsafe meanwhile is a violation."""
        self.begin_capture(stream, mode)
        try:
            yield
        finally:
            self.end_capture(stream)

    def begin_capture(self, stream: int, mode: CaptureMode = CaptureMode.GLOBAL) -> None:
        self._stream(self.lib.standin_begin_capture(stream, mode), stream)

    def end_capture(self, stream: int) -> bool:
        """Whether the capture was still valid."""
        return bool(self.lib.standin_end_capture(stream) == 0)

    # -- what happened

    def calls(self, function: str | None = None) -> list[Call]:
        """All calls since the last reset, or those of one function."""
        found = [Call(**call) for call in self._report("calls")]
        return found if function is None else [call for call in found if call.function == function]

    def functions(self) -> list[str]:
        """Only the names of what was called, in order."""
        return [str(name) for name in self._report("functions")]

    def clear_calls(self) -> None:
        """Forget the calls so far, also for `wait_calls`."""
        self.lib.standin_clear_calls()

    def violations(self, rule: str | None = None) -> list[Violation]:
        found = [Violation(**violation) for violation in self._report("violations")]
        return found if rule is None else [violation for violation in found if violation.rule == rule]

    def expect(self, rule: str) -> list[Violation]:
        """Violations of this rule, of which there must be one; `check` does not see them again."""
        found = self.violations(rule)
        if not found:
            raise AssertionError(f"nothing broke the rule {rule}; broken were: {[str(other) for other in self.violations()]}")
        self.forgive(rule)
        return found

    def forgive(self, rule: str) -> None:
        """Forget violations of this rule so far, of which there may be none."""
        self.lib.standin_forgive(rule.encode())

    def rules(self) -> dict[str, str]:
        """All rules by name, with what they say."""
        return dict(self._report("rules"))

    def live(self, kind: str | None = None) -> list[Live]:
        """What is not given back. Not what the control made, nor what an injected error kept from being given back."""
        found = [Live(**item) for item in self._report("live")]
        return found if kind is None else [item for item in found if item.kind == kind]

    def threads(self) -> int:
        """Threads of streams that are not yet over: none after `reset`."""
        return int(self.lib.standin_threads())

    def check(self, *, leaks: bool = True) -> None:
        """Raise AssertionError for each violation and, unless told otherwise, for what was not given back."""
        wrong = [str(violation) for violation in self.violations()]
        if leaks:
            wrong += [f"[leak] {item.kind} {item.handle:#x}, made by call {item.call}" for item in self.live()]
        if wrong:
            raise AssertionError("\n".join(wrong))

    def _report(self, what: str) -> Any:
        pointer = self.lib.standin_report(what.encode())
        try:
            return json.loads(ctypes.string_at(pointer).decode())
        finally:
            self.lib.standin_free(pointer)
