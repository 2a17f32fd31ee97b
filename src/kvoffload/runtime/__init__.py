"""Wires the actors of one engine: a worker runtime per rank, one hub. `vllm` puts loops of their own under them, `standalone` the caller's."""
