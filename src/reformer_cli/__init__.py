"""The command `hf-reformer`. Its modules import only the standard library, and `hf_reformer` only inside a command.

It is a separate package because importing `hf_reformer` imports torch and transformers, which takes seconds: help and
option errors need neither. `text_generation` and `serving` are exceptions, as only commands import them.
tests/test_imports.py checks what is imported.
"""
