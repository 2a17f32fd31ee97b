"""What else than its tokens identifies a request's blocks: adapter, salt, multimodal items, prompt embeddings.

Runs on vLLM's thread, but for all that touches adapters' files. Nothing of vLLM or torch is imported.
"""

from __future__ import annotations

import re
import struct
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from hashlib import blake2b
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

import structlog

from kvoffload.connector import weights
from kvoffload.connector.adapters import LIMIT, RECENT_S, WAIT_S, Adapter, AdapterFiles, Adapters

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request

RequestExtras = Callable[[int, int], bytes | None] | bytes
"""As `kvoffload.keys.Extras`: of a block by its ``(start, end)`` in tokens, or of every one; a function's None ends the keys."""

NOTHING: Final = b""
"""The extras of nearly every request: there is nothing but its tokens. One shared object."""


def UNIDENTIFIED(start: int, end: int) -> None:
    """The extras of a request that cannot be identified. Given to a `KeyChain` all the same, it stops it before the first block."""


_HASH: Final = re.compile(r"[0-9a-f]{64}|[0-9a-f]{128}").fullmatch
"""What vLLM's hashers of media items make: blake3 and sha256, sha512."""


_log = structlog.get_logger(__name__)

_BY_CLIENT: Final = "a multimodal item named by the client"
_Item = tuple[int, int, str]
"""Offset, length, identifier, which is empty where the item is not identified."""


class RequestIdentity:
    """Tells the extras of requests. Owns the digests of LoRA adapters."""

    def __init__(self, files: AdapterFiles = weights, wait_s: float = WAIT_S, *, is_shared: bool = True, limit: int = LIMIT) -> None:
        """``is_shared``: keys are used by other engines, or by later ones; else a client's own names for its media items will do."""
        self._adapters = Adapters(files, wait_s, limit)
        self._is_shared = is_shared
        self.unidentified: Counter[str] = Counter()
        """Requests without keys, or without further ones from some block on, by reason."""

    def extras(self, request: Request) -> RequestExtras:
        """The extras of ``request``'s blocks, or `UNIDENTIFIED`. Ask again when a streaming session got new input."""
        if (
            request.lora_request is None
            and request.cache_salt is None
            and not request.mm_features
            and request.prompt_embeds is None
            and request.prompt_token_ids is not None
        ):
            return NOTHING
        return self._special(request)

    def wait(self, timeout_s: float) -> bool:
        """Wait until every adapter seen so far has its digest, or is doubted; False when the time ran out. Not for hooks."""
        return self._adapters.wait(timeout_s)

    def _special(self, request: Request) -> RequestExtras:
        first = b""
        adapter = None
        if request.lora_request is not None:
            adapter = self._adapters.seen(request.lora_request)
            if adapter is None:
                return self._cannot("more adapters than are remembered")
            if not adapter.is_proven(time.monotonic()) or adapter.digest is None:
                return self._cannot(adapter.why_not())
            first += field(b"L", adapter.digest)
        if request.prompt_token_ids is None and request.prompt_embeds is None:
            return self._cannot("neither token ids nor embeddings")
        if request.cache_salt is not None:
            first += field(b"S", request.cache_salt.encode())
        return _BlockExtras(first, adapter, request, self._items(request, adapter) if request.mm_features else [])

    def _cannot(self, reason: str) -> RequestExtras:
        self._count(reason)
        return UNIDENTIFIED

    def _items(self, request: Request, adapter: Adapter | None) -> list[_Item]:
        """The items by place. There are no keys from one on that is not identified."""
        found: list[_Item] = []
        reasons: set[str] = set()
        for item in request.mm_features:
            identifier = item.identifier
            if not _HASH(identifier):
                reason = self._item_reason(identifier, request.lora_request, adapter)
                if reason:
                    reasons.add(reason)
                    identifier = ""
            found.append((item.mm_position.offset, item.mm_position.length, identifier))
        for reason in reasons:
            self._count(reason)
        found.sort()
        return found

    def _item_reason(self, identifier: str, lora: LoRARequest | None, adapter: Adapter | None) -> str:
        """Why an item is not identified, or nothing. Where adapters change the encoder too, vLLM puts the adapter's name in front."""
        if not identifier:
            return "a multimodal item without identifier"
        if lora is not None and adapter is not None and identifier.startswith(f"{lora.lora_name}:"):
            identifier = identifier[len(lora.lora_name) + 1 :]
            if not adapter.encodes_alone:
                return "an item encoded with an adapter of whose name there are two"
        return "" if _HASH(identifier) or not self._is_shared else _BY_CLIENT

    def _count(self, reason: str) -> None:
        self.unidentified[reason] += 1
        if reason == _BY_CLIENT and self.unidentified[reason] == 1:
            _log.warning("blocks from a media item on are neither saved nor loaded: leave out its uuid to have it hashed", why=reason)


class _BlockExtras:
    """The extras of one request's blocks. Adapter and salt go into the first block: the others' keys rest on its key."""

    __slots__ = ("_adapter", "_embeds", "_ends", "_first", "_is_token", "_items")

    def __init__(self, first: bytes, adapter: Adapter | None, request: Request, items: list[_Item]) -> None:
        self._first = first
        self._adapter = adapter
        self._embeds: Any = request.prompt_embeds
        self._is_token = request.prompt_is_token_ids
        self._items = items
        # Items may overlap (audio within video), so their ends need not rise; the greatest end so far does.
        self._ends = list(accumulate((offset + length for offset, length, _ in self._items), max))

    def __call__(self, start: int, end: int) -> bytes | None:
        adapter = self._adapter
        # It may have become doubtful since.
        if adapter is not None and (adapter.reason or (start == 0 and not adapter.is_proven(time.monotonic() - RECENT_S))):
            return None
        found = self._first if start == 0 else b""
        for index in range(bisect_right(self._ends, start), len(self._items)):
            offset, length, identifier = self._items[index]
            if offset >= end:
                break
            if offset + length > start:
                if not identifier or (adapter is not None and ":" in identifier and not adapter.encodes_alone):
                    return None
                # Where the item begins relative to the block, so that the block knows which part of it it holds.
                found += field(b"M", struct.pack("<qq", offset - start, length) + identifier.encode())
        if self._embeds is not None and start < len(self._embeds):
            found += field(b"E", self._embeddings(start, end))
        return found

    def _embeddings(self, start: int, end: int) -> bytes:
        piece = self._embeds[start:end].detach().cpu().contiguous()
        digest = blake2b(f"{piece.dtype} {tuple(piece.shape)} ".encode(), digest_size=32)
        if self._is_token is not None:
            digest.update(bytes(self._is_token[start:end]))
        import torch  # there already, or there would be no tensor

        digest.update(piece.flatten().view(torch.uint8).numpy())
        return digest.digest()


def field(tag: bytes, content: bytes) -> bytes:
    """Tag, length, content: fields in a row cannot be read as other fields."""
    return tag + len(content).to_bytes(8, "little") + content
