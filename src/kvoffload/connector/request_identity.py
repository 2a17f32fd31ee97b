"""What else than its tokens identifies a request's blocks: adapter, salt, multimodal items, prompt embeddings.

Runs on vLLM's thread, but for all that touches adapters' files. Nothing of vLLM or torch is imported.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

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

WAIT_S: Final = 0.002
"""How long a hook waits for a check of an adapter's files at most: on a local file system it takes a tenth of a millisecond."""

RECENT_S: Final = 1.0
"""A request that waited for longer before its first key is derived has its adapter checked again: the engine loads it only now."""

LINGER_S: Final = 60.0
"""How long an adapter's thread waits for its next request: to start one may take longer than `WAIT_S`, to wake it does not."""

CHANGED: Final = "an adapter whose files changed"


class AdapterFiles(Protocol):
    """What is asked of an adapter's files; `weights` is one. Both may take for ever, and raise OSError."""

    def signature(self, directory: Path) -> weights.Signature: ...

    def digest_whole(self, directory: Path) -> str: ...


class RequestIdentity:
    """Tells the extras of requests. Owns the digests of LoRA adapters."""

    def __init__(self, files: AdapterFiles = weights, wait_s: float = WAIT_S) -> None:
        self._files = files
        self._wait_s = wait_s
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
        """Wait until every adapter seen so far has its digest, or is doubted; False when the time ran out. Not for hooks."""
        return all(adapter.settled.wait(timeout_s) for adapter in list(self._adapters.values()))

    def _special(self, request: Request) -> RequestExtras:
        first = b""
        adapter = None
        if request.lora_request is not None:
            adapter = self._adapter(request.lora_request)
            if not adapter.is_proven(time.monotonic()) or adapter.digest is None:
                return self._cannot(adapter.why_not())
            first += field(b"L", adapter.digest)
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
            known = self._adapters[lora.lora_int_id] = _Adapter(lora, self._files, self._wait_s)
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
    """One LoRA adapter, by the number under which the engine keeps it. Its files are touched on threads of its own only.

    The engine loads the files when it first runs the adapter, and again after having evicted it, at times that nobody tells us. So keys
    are given only on proof: a check that began when the request was asked about, or later, found the files unchanged since before
    they were digested. Whatever the engine loaded in between were then these very files. The first doubt is for good.

    Nobody waits for such a check for more than ``wait_s``, nor at all after one that took longer, until one is quick again; a request
    whose check is late has no keys. Not seen are files that are replaced between that check and the engine's loading them for the same
    request: what is saved until the next check ends is under the old files' key. Nor ones replaced after the engine loaded them ahead
    of the adapter's first request.
    """

    def __init__(self, lora: LoRARequest, files: AdapterFiles, wait_s: float) -> None:
        self.settled = threading.Event()
        """There is a digest, or a doubt."""
        self.reason = ""
        self.digest: bytes | None = None
        self._name = (lora.lora_path, lora.is_3d_lora_weight)
        self._files = files
        self._wait_s = wait_s
        self._signature: weights.Signature = ()
        self._state = threading.Condition()  # never held over I/O
        self._has_thread = False
        self._is_slow = False
        self._wanted = self._unchanged = float("-inf")
        """What was asked for last, and the beginning of the last check that found no change."""

    def seen_as(self, lora: LoRARequest) -> None:
        if lora.load_inplace:
            self._doubt("an adapter loaded in place")
        elif (lora.lora_path, lora.is_3d_lora_weight) != self._name:
            self._doubt("two adapters under one number")

    def is_proven(self, since: float) -> bool:
        """A check that began at ``since`` or later, by `time.monotonic`, found the files to be what ``digest`` was made of.

        If none did, one is made; it is waited for a little, unless that is known to be in vain.
        """

        def is_decided() -> bool:
            return bool(self.reason) or self._unchanged >= since

        with self._state:
            if not is_decided():
                self._wanted = max(self._wanted, since)
                self._state.notify_all()
                if not self._has_thread:
                    self._has_thread = True
                    threading.Thread(target=self._run, name="kvoffload-adapter", daemon=True).start()
                # Some tens of MB are read for the digest: that takes longer in any case.
                if self.digest is not None and not self._is_slow:
                    self._is_slow = not self._state.wait_for(is_decided, self._wait_s)
            return not self.reason and self._unchanged >= since

    def why_not(self) -> str:
        if self.reason:
            return self.reason
        return "an adapter whose files are being read" if self.digest is None else "an adapter whose files were not checked in time"

    def _doubt(self, reason: str) -> None:
        with self._state:
            is_first = not self.reason
            self.reason = self.reason or reason
            self._state.notify_all()
        if is_first:
            _log.warning("a LoRA adapter's KV is neither saved nor loaded", adapter=self._name[0], why=reason)
        self.settled.set()

    def _run(self) -> None:
        """Check as long as there is somebody whom no check so far began late enough for."""
        while True:
            with self._state:
                if not self._state.wait_for(lambda: self._wanted > self._unchanged, LINGER_S) or self.reason:
                    self._has_thread = False
                    return
            began, is_first = time.monotonic(), self.digest is None
            reason = self._look()
            if reason:
                self._doubt(reason)
                continue
            with self._state:
                self._unchanged = began
                self._is_slow = not is_first and time.monotonic() - began > self._wait_s
                self._state.notify_all()
            self.settled.set()

    def _look(self) -> str:
        """What is wrong with the files; nothing, if they have, or had the first time, the signature that they are digested under."""
        try:
            # As vLLM finds them; a path that is none of this machine's is a repository's name to it.
            directory = Path(os.path.expanduser(self._name[0]))
            found = self._files.signature(directory)
            if self.digest is not None:
                return "" if found == self._signature else CHANGED
            digest = bytes.fromhex(self._files.digest_whole(directory)) + (b"3" if self._name[1] else b"2")
            if self._files.signature(directory) != found:
                return CHANGED
        except (FileNotFoundError, NotADirectoryError):
            return "an adapter that is no local directory" if self.digest is None else CHANGED
        except (OSError, ValueError) as error:
            return f"an adapter whose files cannot be read ({type(error).__name__})"
        self._signature = found
        self.digest = digest
        return ""
