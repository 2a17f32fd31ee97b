"""kvoffload without vLLM: an asyncio program with paged KV tensors of its own. Runs in seconds; torch tensors work the same way.

python examples/standalone.py
"""

from __future__ import annotations

import asyncio

import numpy as np

import kvoffload

LAYERS, BLOCKS, BLOCK_SIZE = 4, 64, 16
SHAPE = (
    BLOCKS,
    2,
    BLOCK_SIZE,
    8,
    32,
)  # of one layer: blocks first, then whatever a block consists of (here K and V, tokens, heads, head size)


async def main() -> None:
    paged_kv = {f"layer {index}": np.zeros(SHAPE, np.float16) for index in range(LAYERS)}

    async with kvoffload.open_runtime({"l1.capacity_bytes": 64 << 20}) as runtime:
        # Checks memory, compiles the copy loop and proves that it understands the layout, before anything is stored.
        await runtime.register(paged_kv, block_size=BLOCK_SIZE)
        # L1 grows in the background; what is saved before there is room is not stored, which is no error.
        while not runtime.statistics().usable:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.01)

        # A prompt whose KV was "computed" into blocks 3, 9, 4, ... : 100 tokens fill six blocks, the last four tokens are left out.
        prompt = list(range(1000, 1100))
        blocks = [3, 9, 4, 12, 7, 30]
        for layer in paged_kv.values():
            layer[blocks] = np.random.default_rng(1).standard_normal((len(blocks), *SHAPE[1:])).astype(np.float16)
        computed = {name: layer[blocks].copy() for name, layer in paged_kv.items()}

        saved = await runtime.save(prompt, blocks)
        print(f"saved    {saved.stored_tokens} of {len(prompt)} tokens")

        # The engine forgets them.
        for layer in paged_kv.values():
            layer[:] = 0

        # A longer prompt with the same beginning: what is stored of it is leased while the match is open, and loaded where we like.
        question = [*prompt[:80], *range(5000, 5040)]
        async with runtime.match(question) as hit:
            print(f"matched  {hit.tokens} of {len(question)} tokens")
            free = [20, 21, 22, 23, 24][: hit.blocks]
            loaded = await runtime.load(hit, free)
        print(f"loaded   {loaded} tokens into blocks {free}")

        same = all(np.array_equal(layer[free], computed[name][: len(free)]) for name, layer in paged_kv.items())
        print(f"the same bytes as were computed: {same}")
        if not same:
            raise SystemExit(1)

        statistics = runtime.statistics()
        print(f"L1       {statistics.committed} blocks stored, {statistics.evictions} evicted")


if __name__ == "__main__":
    asyncio.run(main())
