"""What else than its tokens identifies a request's blocks: adapter, salt, multimodal items, prompt embeddings.

Everything here runs on vLLM's thread. Nothing of vLLM or torch is imported.
"""

from __future__ import annotations

import struct
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog

from kvoffload.connector import weights

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request

RequestExtras = Callable[[int, int], bytes | None] | bytes
"""As `kvoffload.keys.Extras`: of a block by its ``(start, end)`` in tokens, or of every one; a function's None ends the keys."""

NOTHING: Final = b""
"""The extras of nearly every request: there is nothing but its tokens. One shared object."""


def UNIDENTIFIED(start: int, end: int) -> None:
    """The extras of a request that cannot be identified. Given to a `KeyChain` all the same, it stops it before the first block."""


_log = structlog.get_logger(__name__)


class RequestIdentity:
    """Tells the extras of requests. Owns the digests of LoRA adapters, which a thread of its own makes when one is first seen."""

    def __init__(self) -> None:
        self._adapters: dict[int, _Adapter] = {}
        self.unidentified: Counter[str] = Counter()
        """Requests without keys, by reason."""

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
        """Wait until every adapter seen so far has its digest; False when the time ran out."""
        return all(adapter.settled.wait(timeout_s) for adapter in list(self._adapters.values()))

    def _special(self, request: Request) -> RequestExtras:
        first = b""
        adapter = None
        if request.lora_request is not None:
            adapter = self._adapter(request.lora_request)
            digest = adapter.digest_now()
            if digest is None:
                return self._cannot(adapter.reason or "an adapter whose files are being read")
            first += field(b"L", digest)
        if request.prompt_token_ids is None and request.prompt_embeds is None:
            return self._cannot("neither token ids nor embeddings")
        if request.cache_salt is not None:
            first += field(b"S", request.cache_salt.encode())
        if any(not feature.identifier for feature in request.mm_features):
            return self._cannot("a multimodal item without identifier")
        return _BlockExtras(first, adapter, request)

    def _cannot(self, reason: str) -> RequestExtras:
        self.unidentified[reason] += 1
        return UNIDENTIFIED

    def _adapter(self, lora: LoRARequest) -> _Adapter:
        known = self._adapters.get(lora.lora_int_id)
        if known is None:
            known = self._adapters[lora.lora_int_id] = _Adapter(lora)
        known.seen_as(lora)
        return known


class _BlockExtras:
    """The extras of one request's blocks. Adapter and salt go into the first block: the others' keys rest on its key."""

    __slots__ = ("_adapter", "_embeds", "_ends", "_first", "_is_token", "_items")

    def __init__(self, first: bytes, adapter: _Adapter | None, request: Request) -> None:
        self._first = first
        self._adapter = adapter
        self._embeds: Any = request.prompt_embeds
        self._is_token = request.prompt_is_token_ids
        self._items = sorted((item.mm_position.offset, item.mm_position.length, item.identifier) for item in request.mm_features)
        # Items may overlap (audio within video), so their ends need not rise; the greatest end so far does.
        self._ends = list(accumulate((offset + length for offset, length, _ in self._items), max))

    def __call__(self, start: int, end: int) -> bytes | None:
        if self._adapter is not None and self._adapter.reason:
            return None  # it became doubtful while the request lives
        found = self._first if start == 0 else b""
        for index in range(bisect_right(self._ends, start), len(self._items)):
            offset, length, identifier = self._items[index]
            if offset >= end:
                break
            if offset + length > start:
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


class _Adapter:
    """One LoRA adapter, by the number under which the engine keeps it.

    The engine loads its files when it first runs, and again after having evicted it; whether what it computed came from the files
    of which there is a digest can be told only while number, path and files stay the same. So the first doubt is for good.
    """

    def __init__(self, lora: LoRARequest) -> None:
        self.settled = threading.Event()
        self.reason = ""
        self._name = (lora.lora_path, lora.is_3d_lora_weight)
        self._directory = Path(lora.lora_path).expanduser()
        self._signature: tuple[tuple[str, int, int, int], ...] = ()
        self._digest: bytes | None = None
        if not self._directory.is_dir():
            self._doubt("an adapter that is no local directory")
        elif not lora.load_inplace:
            # Some tens of MB are read: not on vLLM's thread. Until then its requests have no keys.
            threading.Thread(target=self._read, name="kvoffload-adapter", daemon=True).start()

    def seen_as(self, lora: LoRARequest) -> None:
        if lora.load_inplace:
            self._doubt("an adapter loaded in place")
        elif (lora.lora_path, lora.is_3d_lora_weight) != self._name:
            self._doubt("two adapters under one number")

    def digest_now(self) -> bytes | None:
        """The digest, provided that the files are still what it was made of; else None, and ``reason`` tells why for good."""
        if self.reason or self._digest is None:
            return None
        try:
            changed = weights.signature(self._directory) != self._signature
        except OSError:
            changed = True
        if changed:
            self._doubt("an adapter whose files changed")
            return None
        return self._digest

    def _doubt(self, reason: str) -> None:
        if not self.reason:
            self.reason = reason
            _log.warning("a LoRA adapter's KV is neither saved nor loaded", adapter=str(self._directory), why=reason)
        self.settled.set()

    def _read(self) -> None:
        try:
            before = weights.signature(self._directory)
            digest = bytes.fromhex(weights.digest_whole(self._directory))
            if weights.signature(self._directory) != before:
                self._doubt("an adapter whose files changed")
                return
            self._signature = before
            self._digest = digest + (b"3" if self._name[1] else b"2")  # last: it makes the signature valid for the other thread
        except OSError as error:
            self._doubt(f"an adapter whose files cannot be read ({type(error).__name__})")
        finally:
            self.settled.set()
