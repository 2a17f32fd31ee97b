"""LoRA adapters, told apart by their files, and doubted where vLLM's own caches could take one for another."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import structlog

from kvoffload.connector import weights

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

_log = structlog.get_logger(__name__)

WAIT_S: Final = 0.002
"""How long a hook waits for a check of an adapter's files at most: on a local file system it takes a tenth of a millisecond."""

RECENT_S: Final = 1.0
"""A request that waited for longer before its first key is derived has its adapter checked again: the engine loads it only now."""

LINGER_S: Final = 60.0
"""How long an adapter's thread waits for its next request: to start one may take longer than `WAIT_S`, to wake it does not."""

LIMIT: Final = 16384
"""Adapters that an engine's life may see. None is forgotten: vLLM's caches may hold what it made for as long."""

CHANGED: Final = "an adapter whose files changed"
SUCCESSOR: Final = "another adapter under one name and path"


class AdapterFiles(Protocol):
    """What is asked of an adapter's files; `weights` is one. Both may take for ever, and raise OSError."""

    def signature(self, directory: Path) -> weights.Signature: ...

    def digest_whole(self, directory: Path) -> str: ...


class Adapters:
    """All adapters that requests named so far, by the engine's number."""

    def __init__(self, files: AdapterFiles, wait_s: float, limit: int) -> None:
        self._files = files
        self._wait_s = wait_s
        self._limit = limit
        self._adapters: dict[int, Adapter] = {}
        self._places: dict[tuple[str, str], _Cached] = {}
        self._encoded: dict[str, _Cached] = {}

    def seen(self, lora: LoRARequest) -> Adapter | None:
        """The adapter of a request; None if it is one too many. For vLLM's thread: touches no file."""
        known = self._adapters.get(lora.lora_int_id)
        if known is None:
            if self._is_full():
                return None
            place, encoded = self._cached(lora)
            encoded.loaded += 1
            known = self._adapters[lora.lora_int_id] = Adapter(lora, self._files, self._wait_s, place, encoded)
        reason = known.seen_as(lora)
        if reason and not self._is_full():
            # vLLM's caches may keep, under what it is called now, what it made before. (None comes after it where there is no room.)
            for cached in self._cached(lora):
                cached.doubt(reason)
        return known

    def wait(self, timeout_s: float) -> bool:
        """Wait until every adapter has its digest, or is doubted; False when the time ran out. Not for hooks."""
        return all(adapter.reason or adapter.settled.wait(timeout_s) for adapter in list(self._adapters.values()))

    def _is_full(self) -> bool:
        return max(len(self._adapters), len(self._places)) >= self._limit

    def _cached(self, lora: LoRARequest) -> tuple[_Cached, _Cached]:
        place = self._places.setdefault((lora.lora_name, lora.lora_path), _Cached())
        return place, self._encoded.setdefault(lora.lora_name, _Cached())


class _Cached:
    """One adapter, as a cache of vLLM's sees it: all that are loaded one after the other under one name, or name and path.

    The cache may hand out to one what another has computed. So once two of them differ, or any is in doubt, all are for good.
    """

    __slots__ = ("_digest", "_read", "_state", "loaded", "reason")

    def __init__(self) -> None:
        self._state = threading.Lock()
        self._digest: bytes | None = None
        self._read = 0
        self.loaded = 0
        """How many there are; written by vLLM's thread only."""
        self.reason = ""

    @property
    def is_one(self) -> bool:
        """All of them were read, and are the same."""
        return not self.reason and self._read == self.loaded

    def holds(self, digest: bytes) -> bool:
        """An adapter with this digest is among them; whether all are the same."""
        with self._state:
            self._read += 1
            self._digest = self._digest or digest
            if self._digest != digest:
                self.reason = self.reason or SUCCESSOR
            return not self.reason

    def doubt(self, reason: str) -> bool:
        """Whether this is the first doubt."""
        with self._state:
            is_first = not self.reason
            self.reason = self.reason or reason
            return is_first


class Adapter:
    """One LoRA adapter, by the number under which the engine keeps it. Its files are touched on threads of its own only.

    The engine loads the files when it first runs the adapter, and again after having evicted it, at times that nobody tells us. So keys
    are given only on proof: a check that began when the request was asked about, or later, found the files unchanged since before
    they were digested. Whatever the engine loaded in between were then these very files. The first doubt is for good.

    Nobody waits for such a check for more than ``wait_s``, nor at all after one that took longer, until one is quick again; a request
    whose check is late has no keys. Not seen are files that are replaced between that check and the engine's loading them for the same
    request: what is saved until the next check ends is under the old files' key. Nor ones replaced after the engine loaded them ahead
    of the adapter's first request.
    """

    def __init__(self, lora: LoRARequest, files: AdapterFiles, wait_s: float, place: _Cached, encoded: _Cached) -> None:
        """``place``: what vLLM's prefix cache knows it by, that is name and path; ``encoded``: its cache of encoder outputs, the name."""
        self.settled = threading.Event()
        """There is a digest, or a doubt."""
        self.digest: bytes | None = None
        self._name = (lora.lora_name, lora.lora_path, lora.is_3d_lora_weight)
        self._place = place
        self._encoded = encoded
        self._files = files
        self._wait_s = wait_s
        self._signature: weights.Signature = ()
        self._state = threading.Condition()  # never held over I/O
        self._has_thread = False
        self._is_slow = False
        self._wanted = self._unchanged = float("-inf")
        """What was asked for last, and the beginning of the last check that found no change."""

    @property
    def reason(self) -> str:
        """Why it is in doubt, or nothing. It shares the doubt with all that vLLM takes for the same adapter."""
        return self._place.reason

    @property
    def encodes_alone(self) -> bool:
        """Whether no other adapter can have made what vLLM keeps of the encoder's outputs under this one's name."""
        return self._encoded.is_one

    def seen_as(self, lora: LoRARequest) -> str:
        """A request named it so; why that puts it in doubt, or nothing."""
        reason = ""
        if lora.load_inplace:
            reason = "an adapter loaded in place"
        elif (lora.lora_name, lora.lora_path, lora.is_3d_lora_weight) != self._name:
            reason = "two adapters under one number"
        if reason:
            self._doubt(reason)
        return reason

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
        is_first = self._place.doubt(reason)
        self._encoded.doubt(reason)
        with self._state:
            self._state.notify_all()
        if is_first:
            _log.warning("a LoRA adapter's KV is neither saved nor loaded", adapter=self._name[0], path=self._name[1], why=reason)
        self.settled.set()

    def _run(self) -> None:
        """Check as long as there is somebody whom no check so far began late enough for."""
        while True:
            with self._state:
                if not self._state.wait_for(lambda: self._wanted > self._unchanged, LINGER_S) or self.reason:
                    self._has_thread = False
                    if self.reason:
                        self.settled.set()
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
            directory = Path(os.path.expanduser(self._name[1]))
            found = self._files.signature(directory)
            if self.digest is not None:
                return "" if found == self._signature else CHANGED
            digest = bytes.fromhex(self._files.digest_whole(directory)) + (b"3" if self._name[2] else b"2")
            if self._files.signature(directory) != found:
                return CHANGED
            self._encoded.holds(digest)
            if not self._place.holds(digest):
                return SUCCESSOR
        except (FileNotFoundError, NotADirectoryError):
            return "an adapter that is no local directory" if self.digest is None else CHANGED
        except (OSError, ValueError) as error:
            return f"an adapter whose files cannot be read ({type(error).__name__})"
        self._signature = found
        self.digest = digest
        return ""
