"""L2: blocks on nodes that engines share. Nothing that comes from there is trusted before it has been verified."""
