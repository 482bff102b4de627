"""Model repositories: registration, exporting, model cards, pipelines, conversion of other checkpoints."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`export` and `push_to_hub`, imported on first use: they need parts of torch that are slow to import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import exporting

    return getattr(exporting, name)


__all__ = ["export", "push_to_hub"]
