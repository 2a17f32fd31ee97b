"""The second tier's benchmarks, quickly: that they measure, and say what they could not measure."""

from __future__ import annotations

import asyncio
import math
import re
import shlex
import sys

import pytest
from tests.bench.with_infinistore import native_client
from tests.infinistore.environment import Environment
from tests.infinistore.server import InfiniStoreServer

from kvoffload.bench import l2_busy, l2_engine, l2_envelope, l2_far, l2_loop, l2_transfers
from kvoffload.bench.figures import Figure
from kvoffload.bench.l2_hub import TimedLoop
from kvoffload.bench.l2_rivals import InfiniStore, NativeClient
from kvoffload.cli import main
from kvoffload.errors import ConfigError, PeerError

FEW = l2_transfers.Effort(batch_bytes=4 << 20, rounds=1, small=5)


def check(figures: list[Figure]) -> None:
    assert all(figure.is_measured for figure in figures), [figure.detail for figure in figures if not figure.is_measured]
    assert all(math.isfinite(figure.value) and figure.value >= 0 for figure in figures)
    assert len({figure.name for figure in figures}) == len(figures)


@pytest.fixture
def target(infinistore_server: InfiniStoreServer, infinistore_environment: Environment) -> InfiniStore:
    return InfiniStore.parse(infinistore_server.address, native_client(infinistore_environment))


@pytest.mark.slow
def test_transfers(target: InfiniStore, infinistore_server: InfiniStoreServer) -> None:
    figures = asyncio.run(l2_transfers.measure(target, quick=True))
    check(figures)
    names = " ".join(figure.name for figure in figures)
    for what in ("read of 4 KiB", "reads of 256 KiB", "reads of 4 MiB", "writes of 1 MiB", "raw socket", "native", "without pointers"):
        assert what in names
    assert infinistore_server.stored() == 0, "what was written is deleted"


@pytest.mark.slow
def test_transfers_without_the_native_client(infinistore_server: InfiniStoreServer) -> None:
    """What does not need it is measured all the same."""
    missing = InfiniStore.parse(infinistore_server.address, shlex.join([sys.executable, "-I", "-S"]))  # which has nothing installed
    figures = asyncio.run(l2_transfers.measure(missing, quick=True))
    unmeasured = [figure for figure in figures if not figure.is_measured]
    assert all("native" in figure.name and "No module named" in figure.detail for figure in unmeasured)
    assert {figure.name for figure in figures if figure.is_measured} >= {"l2: a read of 4 KiB", "l2 reads of 1 MiB: ours / raw socket"}
    assert len({figure.name for figure in figures}) == len(figures)


@pytest.mark.slow
def test_a_native_client_whose_server_dies_is_told(target: InfiniStore, infinistore_server: InfiniStoreServer) -> None:
    with NativeClient(target) as native:
        assert native.put("tag", 1 << 16, 2) > 0
        with pytest.raises(PeerError, match="evicted"):
            native.get("tag", 1 << 16, 3)
        infinistore_server.kill()
        with pytest.raises(PeerError, match="native client"):
            native.get("tag", 1 << 16, 2)


@pytest.mark.slow
def test_beside_a_busy_engine(target: InfiniStore, infinistore_server: InfiniStoreServer) -> None:
    figures = asyncio.run(l2_busy.measure(target, quick=True))
    check(figures)
    assert [figure.name for figure in figures] == [l2_busy.OURS, l2_busy.PLAIN]
    assert infinistore_server.stored() == 0


@pytest.mark.slow
def test_the_loop(target: InfiniStore, infinistore_server: InfiniStoreServer) -> None:
    figures = l2_loop.run(target, quick=True)
    check(figures)
    assert [figure.unit for figure in figures] == ["us/block", "ms", "us/block", "ms"]
    assert all(figure.value > 0 for figure in figures)
    assert infinistore_server.stored() == 0


def test_a_match_far_away() -> None:
    figure = l2_far.run(quick=True)
    assert figure.is_measured, figure.detail
    found = re.search(r"found and fetched: ([\d.]+) ms; .* for the same, ([\d.]+);", figure.detail)
    assert found is not None
    ours, least = map(float, found.groups())
    # What delays them delays both, and both ways twice.
    assert min(ours, least) >= 2e3 * l2_far.LATENCY_S


def test_the_envelope() -> None:
    figures = list(l2_envelope.measure(quick=True))
    check(figures)
    assert {figure.name.split(",")[1].strip() for figure in figures} == {"xxh3", "keyed BLAKE2b"}


@pytest.mark.long
@pytest.mark.timeout(600)
def test_first_tokens() -> None:
    figures = l2_engine.run(quick=True)
    check(figures)
    assert len(figures) == 1 + 3 * len(l2_engine.DEATHS)


def test_slices_are_those_of_callbacks() -> None:
    def work() -> None:
        sum(range(200_000))

    async def run() -> list[float]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, TimedLoop)
        slices: list[float] = []
        loop.slices = slices
        loop.call_soon(work)
        loop.call_later(0.0, work)
        await loop.run_in_executor(None, work)  # a thread's time is not the loop's
        loop.slices = None
        loop.call_soon(work)
        await asyncio.sleep(0)
        return slices

    with asyncio.Runner(loop_factory=TimedLoop) as runner:
        slices = sorted(runner.run(run()), reverse=True)
    assert len(slices) >= 3
    assert slices[1] > 5 * slices[2]


@pytest.mark.parametrize(
    ("address", "client", "expected"),
    [
        ("10.0.0.1:22345", None, InfiniStore("10.0.0.1", 22345, (sys.executable,))),
        ("[::1]", "env LD_PRELOAD=/x/y.so 'a python'", InfiniStore("::1", 12345, ("env", "LD_PRELOAD=/x/y.so", "a python"))),
    ],
)
def test_where_the_server_is(address: str, client: str | None, expected: InfiniStore) -> None:
    assert InfiniStore.parse(address, client) == expected


def test_an_address_that_is_none() -> None:
    with pytest.raises(ConfigError):
        InfiniStore.parse("redis://here")


def test_the_command_takes_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "l2", "--infinistore", "http://here"]) == 1
    assert "l2: could not be measured" in capsys.readouterr().err
