"""Engines that share a second tier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from tests.infinistore.environment import Environment, NotRun
from tests.infinistore.server import InfiniStoreServer
from tests.vllm.connectors import faulty_config
from tests.vllm.harness import Engine
from tests.vllm.outputs import Output, assert_same
from tests.vllm.plain import Plain
from tests.vllm.roundtrip import compare_kv, loadable

from kvoffload.testing.valkey import ValkeyServer

Backend = Literal["redis", "infinistore"]

PATIENT = {"deadline_base_ms": 10_000, "deadline_most_ms": 10_000, "write_timeout_ms": 10_000}
"""However busy the machine is, what is there arrives; a test that is about deadlines sets its own."""


class Node:
    """A real server of either kind, to be ended and frozen by tests."""

    def __init__(self, backend: Backend, server: ValkeyServer | InfiniStoreServer) -> None:
        self.backend = backend
        self.server = server

    @property
    def address(self) -> str:
        return self.server.url if isinstance(self.server, ValkeyServer) else self.server.address

    def kill(self) -> None:
        self.server.kill()

    def restart(self) -> None:
        """Empty, at the same address."""
        self.server.restart()

    def freeze(self) -> None:
        if isinstance(self.server, ValkeyServer):
            self.server.freeze()
        else:
            self.server.stop()

    def thaw(self) -> None:
        if isinstance(self.server, ValkeyServer):
            self.server.thaw()
        else:
            self.server.cont()


StartNodes = Callable[[int], list[Node]]


@contextmanager
def real_nodes(backend: Backend, environment: Environment | NotRun) -> Iterator[StartNodes]:
    """Starts nodes, which end with the test; those of InfiniStore must not have ended before, unless the test ended them."""
    with ExitStack() as stack:
        started: list[Node] = []

        def start(count: int) -> list[Node]:
            for _ in range(count):
                server: ValkeyServer | InfiniStoreServer
                if backend == "redis":
                    server = stack.enter_context(ValkeyServer())
                else:
                    assert isinstance(environment, Environment)
                    server = stack.enter_context(InfiniStoreServer(environment))
                started.append(Node(backend, server))
            return started[-count:]

        yield start
        for node in started:
            if isinstance(node.server, InfiniStoreServer):
                node.server.check()


def sharing_config(nodes: Sequence[Node], **l2: Any) -> dict[str, Any]:
    """``kv_transfer_config`` with these nodes; everything that they have is loaded, and at once."""
    addresses = [node.address for node in nodes]
    settings = {"backend": nodes[0].backend, "nodes": addresses, "min_tokens": 1, "load_or_compute": False, **PATIENT, **l2}
    return faulty_config(l2=settings)


def share(first: Engine, second: Engine, plain: Plain, prompts: Sequence[list[int]], tokens: int = 8) -> list[Output]:
    """What ``first`` computes, ``second``, which has never seen it, finds; both like plain vLLM. The outputs of ``second``."""
    expected = plain.generate(prompts, tokens)
    assert_same(expected, first.generate(prompts, tokens))
    first.flush()
    found = second.generate(prompts, tokens)
    assert_same(expected, found)
    assert [output.cached for output in found] == [loadable(prompt, second.block_size) for prompt in prompts]
    return found


def found_by(later: Engine, plain: Plain, prompts: Sequence[list[int]], kv: Sequence[list[bytes]] = (), tokens: int = 8) -> None:
    """An engine that has never seen these prompts has all of each that can be loaded, with the bytes ``kv`` where they are given."""
    found = later.generate(prompts, tokens)
    assert_same(plain.generate(prompts, tokens), found)
    assert [output.cached for output in found] == [loadable(prompt, later.block_size) for prompt in prompts]
    if kv:
        assert compare_kv(later, prompts, kv, found) == sum(output.cached for output in found) // later.block_size
