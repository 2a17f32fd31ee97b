"""What the tests do to the KV cache where it is: in the worker, whichever process that is in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any


class KVAccess:
    """Mixed into vLLM's worker (``worker_extension_cls``)."""

    model_runner: Any

    def kv_noise(self, seed: int) -> int:
        """Overwrite the whole KV cache, every layer and block, with finite noise of usual size; returns the bytes written."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        written = 0
        for tensor in self._tensors():
            tensor.copy_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
            written += tensor.numel() * tensor.element_size()
        return written

    def kv_digests(self, blocks: Sequence[int]) -> list[bytes]:
        """Per block a digest of its bytes in all layers."""
        import torch

        found = []
        for block in blocks:
            digest = hashlib.blake2b(digest_size=16)
            for tensor in self._tensors():
                digest.update(tensor[block].contiguous().view(torch.uint8).numpy().tobytes())
            found.append(digest.digest())
        return found

    def kv_flip(self, block: int, layer: int, byte: int, mask: int) -> None:
        """Alter one byte of one block in one layer."""
        import torch

        page = self._tensors()[layer][block]
        assert page.is_contiguous()
        page.view(-1).view(torch.uint8)[byte] ^= mask

    def kv_swap(self, one: int, other: int, layers: Sequence[int] | None = None) -> None:
        """Two blocks change places, in these layers (all)."""
        for index, tensor in enumerate(self._tensors()):
            if layers is None or index in layers:
                kept = tensor[one].clone()
                tensor[one] = tensor[other]
                tensor[other] = kept

    def _tensors(self) -> list[Any]:
        return list(self.model_runner.kv_caches)
