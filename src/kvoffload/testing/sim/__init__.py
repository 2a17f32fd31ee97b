"""A whole engine in one thread and in virtual time: vLLM's scheduler, the connector's halves and L1 are real, the rest is simulated."""
