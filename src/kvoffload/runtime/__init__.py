"""Wires the actors of one engine: a worker runtime per rank, and one hub. `hosts` puts loops under them inside vLLM."""
