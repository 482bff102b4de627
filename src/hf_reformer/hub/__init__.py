"""Model repositories: registration, export, model cards, pipelines, and conversion of other checkpoints."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Import `export` and `push_to_hub` on first use, as they need parts of torch that are slow to import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import exporting

    return getattr(exporting, name)


__all__ = ["export", "push_to_hub"]
