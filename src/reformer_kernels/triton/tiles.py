"""Tile sizes and numbers of warps of every kernel.

They are a pure function of the kernel, the dtype, the head size and the GPU's architecture. There is no autotuning at
run time: a reversible layer computes its forward twice and relies on equal bits, and other tiles sum in another order.
`dev/compile_triton.py` shows the registers and shared memory used, and `dev/tune_triton.py` measures the speed on a
GPU. Shared memory stays below the 99 KiB per block of the smallest supported GPUs.
"""

from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """A kernel's configuration; both tile sizes are powers of two of at least 16, as tensor cores require."""

    queries: int  # tokens in hashing kernels; cached tokens at a time in a decode step
    keys: int  # columns of a rotation in hashing kernels and in a decode step
    warps: int
    stages: int


def choose_tiles(kernel: str, dtype: torch.dtype, size: int, capability: tuple[int, int]) -> Tiles:
    """Choose the tiles of a kernel.

    Args:
        kernel: "forward", "backward_queries", "backward_keys", "sweep_queries", "sweep_keys", "hash" or "decode".
        dtype: dtype of query, key and value.
        size: the larger of the two head sizes, padded to a power of two.
        capability: compute capability of the GPU; the newest entry of the table up to it is used.
    """
    kernel = kernel.replace("sweep", "backward")  # backward does the same and more
    precision = "single" if dtype == torch.float32 else "half"
    known = max(entry for entry in TABLE if entry <= max(capability, min(TABLE)))
    return TABLE[known][precision][kernel][size > 64]


# Compute capability → precision → kernel → (head sizes up to 64, up to 128). None was measured yet: larger tiles spill
# registers in later rounds or with dropout. `dev/tune_triton.py` prints an entry for the GPU on which it runs.
TABLE: dict[tuple[int, int], dict[str, dict[str, tuple[Tiles, Tiles]]]] = {
    (8, 0): {
        "half": {
            "forward": (Tiles(64, 32, 4, 2), Tiles(64, 32, 8, 2)),
            "backward_queries": (Tiles(64, 32, 4, 2), Tiles(64, 32, 8, 2)),
            "backward_keys": (Tiles(32, 32, 4, 2), Tiles(64, 32, 8, 2)),
        },
        "single": {  # three products instead of one
            "forward": (Tiles(32, 32, 4, 1), Tiles(16, 32, 4, 1)),
            "backward_queries": (Tiles(16, 32, 8, 1), Tiles(16, 64, 8, 1)),
            "backward_keys": (Tiles(16, 16, 4, 1), Tiles(16, 16, 8, 1)),
            "hash": (Tiles(32, 16, 8, 1), Tiles(32, 16, 8, 1)),
            "decode": (Tiles(64, 16, 8, 1), Tiles(32, 16, 8, 1)),
        },
    },
}
