"""How large a tile of queries and of keys every kernel works on, and with how many warps.

A pure function of the kernel, the dtype, the head size and the GPU's architecture. Nothing is tuned while a program
runs: a reversible layer computes its forward a second time and relies on equal bits, and other tiles add in another
order. `dev/compile_triton.py` shows what the choice costs in registers and shared memory, and `dev/tune_triton.py`
measures on a GPU what it earns. It stays below the 99 KiB of shared memory that a block has on the smallest supported
GPUs.
"""

from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """A kernel's configuration; both numbers of rows are powers of two, 16 or more (what a tensor core takes)."""

    queries: int  # tokens, where a kernel hashes; cached tokens at a time, in a decode step
    keys: int  # columns of a rotation, where a kernel hashes, and in a decode step
    warps: int
    stages: int


def choose_tiles(kernel: str, dtype: torch.dtype, size: int, capability: tuple[int, int]) -> Tiles:
    """Tiles of `kernel`: "forward", "backward_queries", "backward_keys", "sweep_queries", "sweep_keys", "hash" or
    "decode".

    Args:
        dtype: of query, key and value.
        size: the larger of the two head sizes, padded to a power of two.
        capability: the GPU's compute capability. The table's newest entry that is no newer serves it.
    """
    kernel = kernel.replace("sweep", "backward")  # which does the same and more
    precision = "single" if dtype == torch.float32 else "half"
    known = max(entry for entry in TABLE if entry <= max(capability, min(TABLE)))
    return TABLE[known][precision][kernel][size > 64]


# Compute capability → precision → kernel → (head sizes up to 64, up to 128). None was measured yet: larger tiles spill
# registers in later rounds or with dropout. `dev/tune_triton.py` prints an entry for the GPU that it runs on.
TABLE: dict[tuple[int, int], dict[str, dict[str, tuple[Tiles, Tiles]]]] = {
    (8, 0): {
        "half": {
            "forward": (Tiles(64, 32, 4, 2), Tiles(64, 32, 8, 2)),
            "backward_queries": (Tiles(64, 32, 4, 2), Tiles(64, 32, 8, 2)),
            "backward_keys": (Tiles(32, 32, 4, 2), Tiles(64, 32, 8, 2)),
        },
        "single": {  # three products for one
            "forward": (Tiles(32, 32, 4, 1), Tiles(16, 32, 4, 1)),
            "backward_queries": (Tiles(16, 32, 8, 1), Tiles(16, 64, 8, 1)),
            "backward_keys": (Tiles(16, 16, 4, 1), Tiles(16, 16, 8, 1)),
            "hash": (Tiles(32, 16, 8, 1), Tiles(32, 16, 8, 1)),
            "decode": (Tiles(64, 16, 8, 1), Tiles(32, 16, 8, 1)),
        },
    },
}
