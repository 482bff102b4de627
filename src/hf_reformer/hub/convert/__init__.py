"""Checkpoints of other Reformer implementations: transformers' own, reformer-pytorch, Trax. Frozen: no extensions."""

from .conversion import convert, detect, read_folder, to_builtin, to_window

__all__ = ["convert", "detect", "read_folder", "to_builtin", "to_window"]
