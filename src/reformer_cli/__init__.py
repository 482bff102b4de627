"""The `hf-reformer` command. Its modules import only the standard library, and `hf_reformer` only inside a command.

It is a separate package because importing `hf_reformer` imports torch and transformers, which takes seconds: help and
option errors need neither. `text_generation` and `serving` are exceptions, as they are imported only by commands.
tests/test_imports.py checks what is imported.
"""
