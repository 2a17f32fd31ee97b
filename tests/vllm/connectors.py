"""kvoffload's connector with a copy engine that obeys the tests; and what goes into vLLM's arguments for it."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

from kvoffload.connector import KVOffloadConnector
from kvoffload.copy.engine import CopyEngine
from kvoffload.testing.copy_faults import FaultyCopyEngine

FLUSH = "flush-"


class FaultyConnector(KVOffloadConnector):
    """Its copies can be held, slowed and spoilt. A request whose name begins with "flush-" makes it wait for all saves."""

    copies: ClassVar[weakref.ReferenceType[FaultyCopyEngine] | None] = None
    """Of the engine that was started last in this process."""

    def make_copy_engine(self, engine: CopyEngine) -> CopyEngine:
        faulty = FaultyCopyEngine(engine)
        type(self).copies = weakref.ref(faulty)
        return faulty

    def on_new_request(self, request: Any) -> None:
        super().on_new_request(request)
        if request.request_id.startswith(FLUSH):
            assert self.flush(20.0), "saves did not settle"


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
    return transfer_config("FaultyConnector", __name__, **extra)
