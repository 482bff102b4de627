"""Reversible residual layers with exact reconstruction, for any layer: knows torch, and nothing of Reformer."""
