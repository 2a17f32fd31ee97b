"""KV caches of every kind of layout that vLLM has, small, to be proven on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

GUARD = 4096
"""Bytes before, between and behind tensors that belong to none and must stay what they are. A multiple of every alignment."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor of bytes at ``offset`` in its memory; ``strides`` are in bytes, dimension 0 or 1 counts blocks."""

    name: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cache:
    """The KV cache of a whole model in ``num_bytes`` of memory."""

    name: str
    num_blocks: int
    tensors: tuple[Placed, ...]
    num_bytes: int


def pages(layers: int, blocks: int, page_bytes: int, *, stride: int | None = None, name: str = "") -> Cache:
    """One tensor per layer, blocks behind each other, ``stride`` bytes from one to the next where pages are padded."""
    stride = stride or page_bytes
    return _apart(name or "layer-wise pages", layers, blocks, (blocks, page_bytes), (stride, 1), blocks * stride)


def split_k_v(layers: int, blocks: int, page_bytes: int) -> Cache:
    """``[2, blocks, ...]``: all of K before all of V."""
    half = page_bytes // 2
    return _apart("K and V split", layers, blocks, (2, blocks, half), (blocks * half, half, 1), blocks * page_bytes)


def heads_outermost(layers: int, blocks: int, page_bytes: int, heads: int) -> Cache:
    """``[blocks, heads, ...]`` that lies as heads before blocks: a page in as many pieces as there are heads."""
    size = page_bytes // heads
    return _apart("heads outside of blocks", layers, blocks, (blocks, heads, size), (size, blocks * size, 1), blocks * page_bytes)


def blocks_outermost(layers: int, blocks: int, page_bytes: int, *, padding: int = 0) -> Cache:
    """All layers of a block behind each other, then ``padding`` bytes."""
    stride = layers * page_bytes + padding
    tensors = tuple(Placed(f"layers.{layer}", GUARD + layer * page_bytes, (blocks, page_bytes), (stride, 1)) for layer in range(layers))
    return Cache("blocks outermost" + (", padded" if padding else ""), blocks, tensors, 2 * GUARD + blocks * stride)


def all_caches(blocks: int = 24) -> tuple[Cache, ...]:
    """Some MiB each, for 24 blocks."""
    return (
        pages(8, blocks, 32 << 10),
        split_k_v(8, blocks, 32 << 10),
        blocks_outermost(8, blocks, 32 << 10),
        blocks_outermost(8, blocks, 16 << 10, padding=512),
        heads_outermost(4, blocks, 32 << 10, heads=8),
        pages(16, blocks, 2 << 10, name="small pages"),
        pages(8, blocks, 18_432, stride=20_480, name="padded pages"),
        pages(4, blocks, 2056, name="pages of 8-byte alignment"),
    )


def _apart(name: str, layers: int, blocks: int, shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> Cache:
    step = -(-size // GUARD) * GUARD + GUARD
    tensors = tuple(Placed(f"layers.{layer}", GUARD + layer * step, shape, strides) for layer in range(layers))
    return Cache(name, blocks, tensors, GUARD + layers * step)
