"""The backbone, task heads, losses and outputs."""
