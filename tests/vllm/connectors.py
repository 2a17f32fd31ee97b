"""kvoffload's connector with a copy engine that obeys the tests; and what goes into vLLM's arguments for it."""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any, ClassVar

from kvoffload.connector import KVOffloadConnector
from kvoffload.copy.engine import CopyEngine
from kvoffload.testing.copy_faults import FaultyCopyEngine

FLUSH, READY = "flush-", "ready-"


class FaultyConnector(KVOffloadConnector):
    """Its copies can be held, slowed and spoilt. A request named "flush-..." makes it wait for all saves, "ready-..." for its start."""

    copies: ClassVar[weakref.ReferenceType[FaultyCopyEngine] | None] = None
    """Of the engine that was started last in this process."""

    def make_copy_engine(self, engine: CopyEngine) -> CopyEngine:
        faulty = FaultyCopyEngine(engine)
        type(self).copies = weakref.ref(faulty)
        return faulty

    def on_new_request(self, request: Any) -> None:
        super().on_new_request(request)
        if request.request_id.startswith(READY):
            wait_ready(self)
        elif request.request_id.startswith(FLUSH):
            assert self.flush(20.0), "saves did not settle"


def wait_ready(connector: Any, timeout_s: float = 60.0) -> None:
    """Until the halves have met and as much of L1 is populated as is going to be: before that, saves are dropped."""
    assert connector.off_reason is None, connector.off_reason
    hub = connector.scheduler_half.host.hub
    end, last, pause = time.monotonic() + timeout_s, -1, threading.Event()
    while time.monotonic() < end:
        usable = hub.statistics().usable if hub.is_live else 0
        if usable and usable == last:
            return
        last = usable
        pause.wait(0.1)  # populating takes 5 ms a step
    raise AssertionError(f"the connector is not ready after {timeout_s} s: live {hub.is_live}, off {hub.off_reason}, slots {last}")


def transfer_config(connector: str = "KVOffloadConnector", module: str = "kvoffload.connector", **extra: Any) -> dict[str, Any]:
    """``kv_transfer_config`` for this connector, with these settings of kvoffload's."""
    return {
        "kv_connector": connector,
        "kv_connector_module_path": module,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"l1": {"capacity_gb": 0.25}, **extra},
    }


def faulty_config(**extra: Any) -> dict[str, Any]:
    """The deadlines are long, so that a hit is one however busy the machine is; a test that is about them sets its own."""
    patient = {"match": {"deadline_ms": 20_000}, "load": {"start_deadline_ms": 20_000}}
    return transfer_config("FaultyConnector", __name__, **{**patient, **extra})
