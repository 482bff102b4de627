"""Reading checkpoints of other Reformer implementations."""
