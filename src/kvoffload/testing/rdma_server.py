"""A stand-in for an InfiniStore server that is reached over RDMA: a process that tests can kill, freeze and start again.

It answers whether it has a key as the real server does, byte for byte, and everything else as the stand-in for the native client
(`rdma_native/infinistore.py`) needs it. Rules say what is to go wrong in that client, and at which call.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from kvoffload.errors import MisuseError, UnsupportedError
from kvoffload.l2.rdma_process import Launch
from kvoffload.testing.valkey import free_port

NATIVE = Path(__file__).parent / "rdma_native"
"""The folder of the stand-in for the native client, to be put first on a child's path."""

_HEADER = struct.Struct("<IcI")
_ANSWER = struct.Struct("<ii")
_LENGTH = struct.Struct("<I")
_PROGRAM = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]): os._exit(0)
sys.path.insert(0, sys.argv[3])
from kvoffload.testing.rdma_server import serve
serve(int(sys.argv[2]))
"""


def stand_in() -> Launch:
    """A child in which the native client is the stand-in."""
    return Launch(paths=(str(NATIVE),))


class RdmaServer:
    """On 127.0.0.1, as a context manager. Start it from a thread that outlives it: the kernel ends it with that one."""

    def __init__(self) -> None:
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_alive(self) -> bool:
        """Whether its process lives (a frozen one does)."""
        return self._process is not None and self._process.poll() is None

    def start(self, timeout_s: float = 15.0) -> None:
        """Empty, and without rules. Raises UnsupportedError when it does not answer in time."""
        home = str(Path(__file__).parent.parent.parent)
        command = [sys.executable, "-P", "-c", _PROGRAM, str(os.getpid()), str(self.port), home]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        until = time.monotonic() + timeout_s
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                raise UnsupportedError(f"the stand-in server did not start on 127.0.0.1:{self.port}")
            time.sleep(0.005)

    def rule(self, at: str, do: str, count: int = 1) -> None:
        """The next ``count`` calls ``at`` (connect, register, read, write) of any client do this: ``segv``, ``exit`` (with 1), ``stop``
        (SIGSTOP), ``hang``, ``late:SECONDS``, ``scribble`` (write to the buffers and never end), ``raise:TEXT``, ``code:NUMBER``.
        """
        self._ask({"op": "rule", "at": at, "do": do, "count": count})

    def forget(self, *keys: str) -> None:
        """As an eviction does it."""
        self._ask({"op": "forget", "keys": keys})

    def reset(self) -> None:
        """No value is left, no rule, and nothing was seen."""
        self._ask({"op": "reset"})

    def deny(self, *keys: str) -> None:
        """They pass for absent when asked for, and are there when they are read: as if they came in between; or the other way."""
        self._ask({"op": "deny", "keys": keys})

    def statistics(self) -> dict[str, Any]:
        """``reads`` and ``writes``: keys in each request; ``order``: all of these keys; ``most_in_flight`` on a connection; ``pinned``:
        values that refused reads left behind, which a real server never frees; ``overwritten``: keys written twice; ``connect``: what
        the last connection said.
        """
        return self._ask({"op": "statistics"})

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        process = self._running()
        process.kill()
        process.wait()

    def restart(self) -> None:
        """Kill it if it runs, and start it again, empty."""
        self.stop()
        self.start()

    def freeze(self) -> None:
        """SIGSTOP."""
        self._running().send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._running().send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Also when it is frozen, dead, or was never started."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise MisuseError("the stand-in server was not started")
        return self._process

    def _answers(self) -> bool:
        try:
            self.statistics()
        except OSError:
            return False
        return True

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        body = msgspec.msgpack.encode(request | {"payload": 0})
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection, connection.makefile("rb") as answers:
            connection.sendall(_HEADER.pack(0xDEADBEEF, b"Z", len(body)) + body)
            (length,) = _LENGTH.unpack(_whole(answers.read(_LENGTH.size), _LENGTH.size))
            answer: dict[str, Any] = msgspec.msgpack.decode(_whole(answers.read(length), length))
            return answer


def _whole(data: bytes, count: int) -> bytes:
    if len(data) != count:
        raise ConnectionResetError("the server hung up")
    return data


class _Store:
    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.values: dict[str, bytes] = {}
        self.denied: set[str] = set()
        self.rules: list[dict[str, Any]] = []
        self.seen: dict[str, Any] = {
            "reads": [],
            "writes": [],
            "order": [],
            "most_in_flight": 0,
            "pinned": 0,
            "overwritten": 0,
            "connect": {},
        }

    def answer(self, request: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
        op, code, sizes, values = request["op"], 200, list[int](), b""
        if op == "rule":
            self.rules.append(request)
        elif op == "forget":
            for key in request["keys"]:
                self.values.pop(key, None)
        elif op == "reset":
            self.reset()
        elif op == "deny":
            self.denied.update(request["keys"])
        elif op == "statistics":
            return self.seen, b""
        elif op == "connect":
            self.seen["connect"] = request
        elif op in ("read", "write"):
            self.seen["most_in_flight"] = max(self.seen["most_in_flight"], request["most_in_flight"])
            self.seen[f"{op}s"].append(len(request["keys"]))
            self.seen["order"] += request["keys"]
            code, sizes, values = self._read(request) if op == "read" else self._write(request, payload)
        do = self._rule(op)
        return {"code": code, "sizes": sizes, "do": do}, values

    def _read(self, request: dict[str, Any]) -> tuple[int, list[int], bytes]:
        found: list[bytes] = []
        for key in request["keys"]:
            value = self.values.get(key)
            if value is None or len(value) > request["size"]:
                self.seen["pinned"] += len(found)
                return (404 if value is None else 400), [], b""
            found.append(value)
        return 200, [len(value) for value in found], b"".join(found)

    def _write(self, request: dict[str, Any], payload: bytes) -> tuple[int, list[int], bytes]:
        if any(rule["at"] == "write" and rule["do"].startswith("code:") for rule in self.rules):
            return 200, [], b""  # refused
        size = request["size"]
        for index, key in enumerate(request["keys"]):
            self.seen["overwritten"] += key in self.values
            self.values[key] = payload[index * size : (index + 1) * size]
        return 200, [], b""

    def _rule(self, op: str) -> str:
        for rule in self.rules:
            if rule["at"] == op:
                rule["count"] -= 1
                if not rule["count"]:
                    self.rules.remove(rule)
                return str(rule["do"])
        return ""

    def has(self, key: str) -> bool:
        return (key in self.values) != (key in self.denied)


async def _converse(store: _Store, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            _, op, length = _HEADER.unpack(await reader.readexactly(_HEADER.size))
            body = await reader.readexactly(length)
            if op == b"C":
                writer.write(_ANSWER.pack(200, 0 if store.has(body.decode()) else 1))
                continue
            request = msgspec.msgpack.decode(body)
            answer, values = store.answer(request, await reader.readexactly(request["payload"]))
            head = msgspec.msgpack.encode(answer | {"payload": len(values)})
            writer.write(_LENGTH.pack(len(head)) + head + values)
            await writer.drain()
    except (OSError, asyncio.IncompleteReadError):
        writer.close()


async def _serve(port: int) -> None:
    store = _Store()
    server = await asyncio.start_server(lambda reader, writer: _converse(store, reader, writer), "127.0.0.1", port)
    await server.serve_forever()


def serve(port: int) -> None:
    """Until the process is ended."""
    asyncio.run(_serve(port))
