"""vLLM calls the hooks behind a forward on the way out of a failed one too: nothing of such a step may be saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from tests.connector.ports import Clock, FakeCopies

pytest.importorskip("vllm")

from kvoffload.connector.connector import KVOffloadConnector
from kvoffload.connector.metadata import StepMetadata
from kvoffload.connector.worker_side import WorkerSettings, WorkerSide


def unstarted() -> Any:
    return KVOffloadConnector.__new__(KVOffloadConnector)


class Worker:
    """The worker's half of a connector, and vLLM's model runner around it."""

    def __init__(self) -> None:
        clock = Clock()
        self.copies = FakeCopies(clock)
        self.off: list[str] = []
        self.connector = unstarted()
        self.connector.scheduler_half = None
        self.connector.worker_half = SimpleNamespace(side=WorkerSide(self.copies, WorkerSettings(), clock), turn_off=self.off.append)
        self.connector._connector_metadata = StepMetadata(saves=(1,))

    @contextmanager
    def step(self) -> Iterator[None]:
        """As `KVConnectorModelRunnerMixin._get_kv_connector_output`."""
        try:
            yield
        finally:
            self.connector.wait_for_save()


@pytest.mark.parametrize("saves", [(1,), ()])
def test_a_failed_forward_saves_nothing_and_turns_the_connector_off(saves: tuple[int, ...]) -> None:
    worker = Worker()
    worker.connector._connector_metadata = StepMetadata(saves=saves)
    with pytest.raises(KeyboardInterrupt), worker.step():
        raise KeyboardInterrupt
    assert not worker.copies.saves
    (reason,) = worker.off
    assert "forward" in reason


def test_who_drives_vllm_may_be_handling_an_exception() -> None:
    worker = Worker()
    try:
        raise ValueError("of the caller's")
    except ValueError:
        with worker.step():
            pass
    assert [save.job for save in worker.copies.saves] == [1]
    assert not worker.off
