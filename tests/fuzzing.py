"""How long fuzzing goes on: two minutes in the slow tests, with the same seeds; by hand as long as FUZZ_SECONDS says.

`FUZZ_SECONDS=3600 FUZZ_SEED=1000000 pytest -m slow -k fuzz` tries other cases for an hour; a failure names its seed.
"""

import itertools
import os
import time
from collections.abc import Iterator


def seeds() -> Iterator[int]:
    """Seeds one after the other, until the time is over."""
    end = time.monotonic() + float(os.environ.get("FUZZ_SECONDS", 120))
    first = int(os.environ.get("FUZZ_SEED", 0))
    yield first
    yield from itertools.takewhile(lambda _: time.monotonic() < end, itertools.count(first + 1))
