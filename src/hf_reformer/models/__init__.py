"""The backbone, its heads, their losses and outputs."""
