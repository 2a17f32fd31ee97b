"""Block keys: who a block of KV is, told by everything that determines its bytes.

A key is ``blake2b-192(parent key ‖ token ids ‖ extras)``; the parent of a prompt's first block is the namespace digest
(`kvoffload.namespace`). So a key identifies its block *and* all that comes before it, in every process alike.
"""

from __future__ import annotations

import hashlib
import operator
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache

from kvoffload.errors import MisuseError
from kvoffload.messages import ROOT, BlockKey

KEY_BYTES = 24
"""Length of a key and of a namespace digest."""

TOKEN_BYTES = 4
"""A token id is hashed as a little-endian uint32."""

Extras = Callable[[int, int], bytes | None] | bytes | None
"""What determines a block's KV beside its tokens: bytes for every block, or a function of the block's ``(start, end)`` in tokens.

The function's ``None`` means "cannot be identified": no key from there on. ``b""`` means that there is nothing to add.
"""

_PERSON = b"kvoffload.key.1"  # the format's version: another one gives other keys
_TOKENS_AT_ONCE = 4096  # bounds the copies that packing makes of a long prompt
_PIECE_BYTES = 1024  # hashlib gives the interpreter lock away from 2 KiB on, which costs far more than such a hash


@lru_cache(maxsize=64)
def _seed(block_size: int) -> hashlib.blake2b:
    """The state before any input. The block size sits in its salt, which costs nothing per block."""
    return hashlib.blake2b(digest_size=KEY_BYTES, person=_PERSON, salt=struct.pack("<Q", block_size))


class KeyChain:
    """The keys of one sequence of tokens, derived as it grows.

    Fields are of fixed width but for the last (24 bytes, 4 per token, then extras): no two inputs run together to the same bytes.
    Parts that a caller joins into one block's extras must be delimited by the caller.
    """

    __slots__ = ("_seed", "_stopped", "block_size", "keys", "namespace")

    def __init__(self, namespace: bytes, block_size: int) -> None:
        """``namespace``: 24 bytes, of `namespace_digest`; ``block_size`` in tokens."""
        if len(namespace) != KEY_BYTES:
            raise MisuseError(f"a namespace digest has {KEY_BYTES} bytes, not {len(namespace)}: make it with namespace_digest()")
        if block_size < 1:
            raise MisuseError(f"block_size must be at least 1 token, not {block_size}")
        self.namespace = namespace
        self.block_size = block_size
        self.keys: list[BlockKey] = []
        self._seed = _seed(block_size)
        self._stopped = False

    @property
    def is_stopped(self) -> bool:
        """The block after the last key cannot be identified; only `recut` to before it makes the chain go on."""
        return self._stopped

    def parent_of(self, index: int) -> BlockKey:
        """The key before ``keys[index]`` as messages carry it: `ROOT` for the first block."""
        return self.keys[index - 1] if index else ROOT

    def extend(self, tokens: Sequence[int], extras: Extras = None, num_tokens: int | None = None) -> None:
        """Derive the keys of all further full blocks of ``tokens``, the whole sequence from its first token; of its first
        ``num_tokens`` only, where that is given.

        Tokens that already have keys are not looked at: `recut` first when one of them changed. Fewer tokens than keys cut the
        chain; a smaller ``num_tokens`` does not. A token id outside uint32, or extras of None, end the chain before that block. An
        id that is no integer is a `MisuseError`.
        """
        size = self.block_size
        have = len(self.keys)
        available = len(tokens)
        if available < (have + 1) * size:
            if available < have * size or self._stopped:
                self.recut(available)
            return
        full = (available if num_tokens is None else min(available, num_tokens)) // size
        stride = max(1, _TOKENS_AT_ONCE // size)
        while have < full and not self._stopped:
            until = min(have + stride, full)
            self._append(self._pack(tokens[have * size : until * size]), have, extras)
            have = until

    def recut(self, num_tokens: int) -> None:
        """Keep only the keys of blocks that lie wholly within the first ``num_tokens`` tokens."""
        if num_tokens < (len(self.keys) + 1) * self.block_size:
            del self.keys[max(0, num_tokens) // self.block_size :]
            self._stopped = False  # of the block that stopped the chain, a token is gone

    def _pack(self, tokens: Sequence[int]) -> bytes:
        """The bytes of these tokens, up to the first block that holds an id outside uint32."""
        # struct packs a list some 3 times as fast as array and numpy make an array of it, and, unlike msgpack (as fast), to a fixed
        # width, so that one call serves all new blocks and slices of its result the single ones.
        try:
            return struct.pack(f"<{len(tokens)}I", *tokens)
        except struct.error:
            self._stopped = True
        good = 0
        for position, token in enumerate(tokens):
            try:
                if not 0 <= operator.index(token) < 2**32:
                    break
            except TypeError:
                raise MisuseError(f"token ids are integers, not {token!r} (at {position} of the new tokens)") from None
            good = position + 1
        good -= good % self.block_size
        return struct.pack(f"<{good}I", *tokens[:good])

    def _append(self, packed: bytes, first: int, extras: Extras) -> None:
        """Hash block after block. One copied state and two updates take half as long as a new blake2b object per block."""
        width = self.block_size * TOKEN_BYTES
        parent = self.keys[-1] if self.keys else self.namespace
        copy, append = self._seed.copy, self.keys.append
        if not extras and width <= _PIECE_BYTES:
            for at in range(0, len(packed), width):
                state = copy()
                state.update(parent)
                state.update(packed[at : at + width])
                parent = state.digest()
                append(parent)
            return
        for at in range(0, len(packed), width):
            extra: bytes | None = extras or b"" if not callable(extras) else self._extra_of(extras, first + at // width)
            if extra is None:
                self._stopped = True
                return
            state = copy()
            state.update(parent)
            for piece in range(at, at + width, _PIECE_BYTES):
                state.update(packed[piece : min(piece + _PIECE_BYTES, at + width)])
            state.update(extra)
            parent = state.digest()
            append(parent)

    def _extra_of(self, extras: Callable[[int, int], bytes | None], block: int) -> bytes | None:
        return extras(block * self.block_size, (block + 1) * self.block_size)
