"""Random inputs, the same in every run, for two minutes a target. By hand as long, and from which seed, as one likes:

FUZZ_SECONDS=3600 FUZZ_SEED=1000000 python -m pytest -m slow -k fuzz tests/hub/test_fuzz_files.py
"""

import itertools
import os
import random
import time
from collections.abc import Iterator


def seeds() -> Iterator[tuple[int, random.Random]]:
    """Seeds, each with a generator of its own: a failure is repeated by `FUZZ_SEED` alone."""
    end = time.monotonic() + float(os.environ.get("FUZZ_SECONDS", "120"))
    for seed in itertools.count(int(os.environ.get("FUZZ_SEED", "0"))):
        if time.monotonic() > end:
            return
        yield seed, random.Random(seed)
