"""Reversible residual layers with exact reconstruction, for any layer; depends on torch, but not on the Reformer."""
