"""The command `hf-reformer`. Its modules import nothing but Python's own, and `hf_reformer` only inside a command.

That is why it is a package beside `hf_reformer`, whose import brings in torch and transformers, and so takes seconds:
help, and mistakes in options, need neither. `text_generation` and `serving` are exceptions: commands import them.
tests/test_imports.py counts what is imported.
"""
