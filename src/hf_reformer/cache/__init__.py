"""The cache that generation uses for earlier tokens."""

from .cache import ReformerCache

__all__ = ["ReformerCache"]
