"""The command line, `hf-reformer`."""
