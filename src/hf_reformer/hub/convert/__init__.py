"""Conversion of other Reformers' checkpoints: transformers' own, reformer-pytorch, Trax. Frozen: no new features."""

from .conversion import convert, detect, read_folder, to_builtin, to_window

__all__ = ["convert", "detect", "read_folder", "to_builtin", "to_window"]
