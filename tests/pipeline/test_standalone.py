"""The whole pipeline without vLLM: real threads, real copies, real memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

import kvoffload
from kvoffload.config import Config
from kvoffload.errors import CapacityError, CopyError, MisuseError
from kvoffload.l1.states import State
from kvoffload.messages import HitReason

pytestmark = [pytest.mark.anyio, pytest.mark.real_clock]

BLOCKS, LAYERS, BLOCK_SIZE, PAGE = 64, 3, 4, 2048
CONFIG = {"l1": {"capacity_bytes": 32 * 12288, "reserve_bytes": 0}}


@pytest.fixture
def tensors() -> dict[str, NDArray[np.uint8]]:
    random = np.random.default_rng(7)
    return {f"layer{i}": random.integers(0, 256, (BLOCKS, PAGE), dtype=np.uint8) for i in range(LAYERS)}


def pages(tensors: dict[str, NDArray[np.uint8]], blocks: list[int]) -> NDArray[np.uint8]:
    return np.stack([tensor[blocks].copy() for tensor in tensors.values()])


def prompts() -> Iterator[list[int]]:
    """Prompts of eight blocks that have nothing in common."""
    for start in range(0, 1 << 20, 1000):
        yield list(range(start, start + 8 * BLOCK_SIZE))


async def test_what_was_saved_comes_back_into_other_blocks(tensors: dict[str, NDArray[np.uint8]]) -> None:
    tokens = list(range(22))
    async with kvoffload.open_runtime(CONFIG) as runtime:
        await runtime.register(tensors, block_size=BLOCK_SIZE)
        saved = await runtime.save(tokens, [10, 11, 12, 13, 14])
        assert (saved.tokens, saved.stored_tokens) == (20, 20)
        expected = pages(tensors, [10, 11, 12, 13, 14])
        untouched = pages(tensors, [39, 45])
        async with runtime.match([*tokens, 99, 98]) as hit:
            assert (hit.tokens, hit.blocks, hit.reason) == (20, 5, HitReason.HIT)
            assert await runtime.load(hit, [40, 41, 42, 43, 44]) == 20
        assert np.array_equal(pages(tensors, [40, 41, 42, 43, 44]), expected)
        assert np.array_equal(pages(tensors, [39, 45]), untouched)


async def test_a_shorter_prefix_another_salt_and_other_tokens(tensors: dict[str, NDArray[np.uint8]]) -> None:
    tokens = list(range(16))
    async with kvoffload.open_runtime(CONFIG) as runtime:
        await runtime.register(tensors, block_size=BLOCK_SIZE)
        await runtime.save(tokens, [1, 2, 3, 4])
        for given, salt, found in ((tokens[:11], b"", 8), (tokens, b"tenant", 0), ([*tokens[:8], 77, *tokens[9:]], b"", 8), ([], b"", 0)):
            async with runtime.match(given, salt=salt) as hit:
                assert hit.tokens == found


async def test_part_of_a_hit(tensors: dict[str, NDArray[np.uint8]]) -> None:
    tokens = list(range(16))
    async with kvoffload.open_runtime(CONFIG) as runtime:
        await runtime.register(tensors, block_size=BLOCK_SIZE)
        await runtime.save(tokens, [1, 2, 3, 4])
        expected = pages(tensors, [2, 3])
        async with runtime.match(tokens) as hit:
            await runtime.load(hit, [20, 21], first_block=1)
            with pytest.raises(MisuseError, match="loaded already"):
                await runtime.load(hit, [22], first_block=1)
        assert np.array_equal(pages(tensors, [20, 21]), expected)


async def test_l1_that_is_too_small_churns_and_stays_right(tensors: dict[str, NDArray[np.uint8]]) -> None:
    async with kvoffload.open_runtime(CONFIG) as runtime:
        await runtime.register(tensors, block_size=BLOCK_SIZE)
        hits = 0
        for number, tokens in zip(range(40), prompts(), strict=False):
            base = number % 7 * 8
            await runtime.save(tokens, range(base, base + 8))
            expected = pages(tensors, list(range(base, base + 8)))
            async with runtime.match(tokens) as hit:
                if hit.blocks:
                    hits += 1
                    await runtime.load(hit, range(56, 56 + hit.blocks))
                    assert np.array_equal(pages(tensors, list(range(56, 56 + hit.blocks))), expected[:, : hit.blocks])
        await runtime.flush()
        statistics = runtime.statistics()
        assert hits > 20
        assert statistics.evictions > 100
        assert statistics.leases == statistics.saves == statistics.loads == statistics.protected == 0
        assert set(statistics.slots) - {State.FREE, State.READY} == set() or not any(
            count for state, count in statistics.slots.items() if state not in (State.FREE, State.READY)
        )


async def test_reset_forgets_everything_and_an_open_hit_too(tensors: dict[str, NDArray[np.uint8]]) -> None:
    tokens = list(range(16))
    async with kvoffload.open_runtime(CONFIG) as runtime:
        await runtime.register(tensors, block_size=BLOCK_SIZE)
        await runtime.save(tokens, [1, 2, 3, 4])
        async with runtime.match(tokens) as hit:
            assert hit.tokens == 16
            await runtime.reset()
            with pytest.raises(MisuseError, match="reset"):
                await runtime.load(hit, [30, 31, 32, 33])
        async with runtime.match(tokens) as hit:
            assert hit.tokens == 0
        await runtime.flush()
        assert not any(count for state, count in runtime.statistics().slots.items() if state is not State.FREE)


async def test_bad_input_gets_a_clear_error(tensors: dict[str, NDArray[np.uint8]]) -> None:
    async with kvoffload.open_runtime(CONFIG) as runtime:
        with pytest.raises(MisuseError, match="register"):
            await runtime.save([1, 2, 3, 4], [0])
        with pytest.raises(MisuseError, match="at least one tensor"):
            await runtime.register({}, block_size=4)
        await runtime.register(tensors, block_size=BLOCK_SIZE)
        with pytest.raises(MisuseError, match="once"):
            await runtime.register(tensors, block_size=BLOCK_SIZE)
        with pytest.raises(MisuseError, match="2 blocks of 4, but 1"):
            await runtime.save(list(range(8)), [1])
        with pytest.raises(MisuseError, match="numbered 0 to 63"):
            await runtime.save(list(range(8)), [1, 64])
        with pytest.raises(MisuseError, match="twice"):
            await runtime.save(list(range(8)), [1, 1])
    with pytest.raises(MisuseError, match="closed"):
        await runtime.flush()


async def test_a_block_that_no_slot_can_hold(tensors: dict[str, NDArray[np.uint8]]) -> None:
    async with kvoffload.open_runtime({"l1.capacity_bytes": 4096, "l1.reserve_bytes": 0}) as runtime:
        with pytest.raises(CapacityError, match="holds not one block"):
            await runtime.register(tensors, block_size=BLOCK_SIZE)


async def test_more_memory_than_there_is(tensors: dict[str, NDArray[np.uint8]]) -> None:
    async with kvoffload.open_runtime(Config.load({"l1": {"capacity_gb": 200_000}})) as runtime:
        with pytest.raises(CapacityError):
            await runtime.register(tensors, block_size=BLOCK_SIZE)


async def fail_inside(tensors: dict[str, NDArray[np.uint8]]) -> None:
    async with kvoffload.open_runtime(CONFIG) as runtime:
        await runtime.register(tensors, block_size=BLOCK_SIZE)
        raise CopyError("mine")


async def test_an_error_in_the_callers_block_stays_what_it_is(tensors: dict[str, NDArray[np.uint8]]) -> None:
    with pytest.raises(CopyError, match="mine"):
        await fail_inside(tensors)
