"""Time and memory of hf_reformer beside other implementations: `python -m benchmarks.run --help`."""
