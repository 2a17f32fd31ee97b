"""What a rank may copy by is proven before it starts, however few pieces a proof has, and what is wrong here is not used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tests.copy.rigs import ids
from tests.cuda.standin import Code, Standin
from tests.cuda.test_startup import BLOCKS, on_gpu, settings

from kvoffload.cuda import lane
from kvoffload.cuda.kernels import GATHER
from kvoffload.errors import LayoutError
from kvoffload.runtime.rank import Rank

pytestmark = pytest.mark.cuda

WAYS = ("cuMemcpyBatchAsync", "cuLaunchKernel", "cuMemcpyAsync")


@contextmanager
def rank(standin: Standin, **gpu: object) -> Iterator[Rank]:
    stream = standin.engine_stream()
    made = Rank.prepare(settings(**gpu), 0, on_gpu(standin), BLOCKS, lambda engine: engine, lambda: stream)
    yield made
    made.close()


def used(standin: Standin) -> list[str]:
    names = standin.functions()
    return [way for way in WAYS if way in names]


def there_and_back(made: Rank) -> None:
    """Block 3 by slot 5 to block 6."""
    tensors = made.layout.keep
    made.engine.save(ids(3), ids(5), ids(0), made.engine.mark())
    made.engine.load(ids(5), ids(6), made.engine.mark())
    for tensor in tensors:
        assert bytes(tensor[6].tolist()) == bytes(tensor[3].tolist())  # type: ignore[index]


@pytest.mark.parametrize(
    ("gpu", "ways"),
    [
        ({}, WAYS),
        ({"kernel_min_pieces": 256}, WAYS),
        ({"kernel_min_pieces": 1}, WAYS),
        ({"kernel_below_bytes": 0}, ("cuMemcpyBatchAsync", "cuMemcpyAsync")),
        ({"copy": "dma"}, ("cuMemcpyBatchAsync", "cuMemcpyAsync")),
        ({"copy": "kernel"}, ("cuLaunchKernel", "cuMemcpyAsync")),
        ({"copy": "single"}, ("cuMemcpyAsync",)),
        ({"pin": False}, ("cuMemcpyAsync",)),
    ],
)
def test_each_way_that_settings_may_choose_is_proven_and_no_other(standin: Standin, gpu: dict[str, object], ways: tuple[str, ...]) -> None:
    with rank(standin, **gpu) as made:
        assert used(standin) == list(ways)
        there_and_back(made)


@pytest.mark.parametrize("gpu", [{"kernel_min_pieces": 1}, {"copy": "kernel"}])
def test_a_kernel_that_is_wrong_here_is_not_used(
    standin: Standin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, gpu: dict[str, object]
) -> None:
    monkeypatch.setattr(lane, "SCATTER", GATHER)  # loads copy into slots
    with rank(standin, **gpu) as made:
        assert "the copy kernel is not used, as it fails its proof here" in caplog.text
        standin.clear_calls()
        there_and_back(made)
        assert used(standin) == ["cuMemcpyBatchAsync"]


def test_a_kernel_that_cannot_be_started_is_not_used(standin: Standin, caplog: pytest.LogCaptureFixture) -> None:
    standin.fail("cuLaunchKernel", Code.INVALID_VALUE)
    with rank(standin, kernel_min_pieces=1) as made:
        assert "the copy kernel is not used, as it fails its proof here" in caplog.text
        standin.clear_calls()
        there_and_back(made)
        assert used(standin) == ["cuMemcpyBatchAsync"]


def test_a_kernel_that_takes_the_context_with_it_ends_the_start(standin: Standin) -> None:
    standin.fail_operation(Code.ILLEGAL_ADDRESS, kind="kernel")
    with pytest.raises(LayoutError, match="ILLEGAL_ADDRESS"), rank(standin):
        pass
    standin.reset()


@pytest.mark.parametrize("kind", ["batch", "copy"])
def test_what_must_serve_is_proven_or_there_is_no_start(standin: Standin, kind: str) -> None:
    standin.fail_operation(Code.LAUNCH_FAILED, kind=kind, sticky=False)
    with pytest.raises(LayoutError, match="LAUNCH_FAILED"), rank(standin, kernel_below_bytes=0):
        pass
