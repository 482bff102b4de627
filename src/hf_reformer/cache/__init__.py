"""What generation keeps of earlier tokens."""

from .cache import ReformerCache

__all__ = ["ReformerCache"]
