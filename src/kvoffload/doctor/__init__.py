"""What `kvoffload doctor` finds out about this machine, and about its GPU."""
