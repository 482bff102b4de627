"""The cache of past tokens for generation."""

from .cache import ReformerCache

__all__ = ["ReformerCache"]
