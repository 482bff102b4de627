"""One module per task: what `hf-reformer train NAME` and `scripts/train_*.py` run."""
