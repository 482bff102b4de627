"""Time and memory of hf_reformer compared to other implementations: `python -m benchmarks.run --help`, and `.gpu`."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are made from configs; nothing may access the Hub
