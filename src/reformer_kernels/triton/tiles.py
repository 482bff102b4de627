"""How large a tile of queries and of keys every kernel works on, and with how many warps.

A pure function of the kernel, the dtype and the head size. Nothing is tuned while a program runs: a
reversible layer computes its forward a second time and relies on equal bits, and other tiles add in another order.
`dev/compile_triton.py` shows what the choice costs in registers and shared memory. It stays below the 99 KiB
of shared memory that a block has on the smallest supported GPUs.
"""

from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """A kernel's configuration; both numbers of rows are powers of two, 16 or more (what a tensor core takes)."""

    queries: int
    keys: int
    warps: int
    stages: int


def choose_tiles(kernel: str, dtype: torch.dtype, size: int) -> Tiles:
    """Tiles of `kernel`, one of "forward", "backward_queries", "backward_keys", "sweep_queries" and "sweep_keys".

    Args:
        dtype: of query, key and value.
        size: the larger of the two head sizes, padded to a power of two.
    """
    kernel = kernel.replace("sweep", "backward")  # which does the same and more
    if dtype == torch.float32:
        return _SINGLE[kernel][size > 64]
    return _HALF[kernel][size > 64]


# (up to 64, up to 128). Larger tiles spill registers in later rounds or with dropout.
_HALF = {
    "forward": (Tiles(64, 32, 4, 2), Tiles(64, 32, 8, 2)),
    "backward_queries": (Tiles(64, 32, 4, 2), Tiles(64, 32, 8, 2)),
    "backward_keys": (Tiles(32, 32, 4, 2), Tiles(64, 32, 8, 2)),
}
_SINGLE = {  # three products for one
    "forward": (Tiles(32, 32, 4, 1), Tiles(16, 32, 4, 1)),
    "backward_queries": (Tiles(16, 32, 8, 1), Tiles(16, 64, 8, 1)),
    "backward_keys": (Tiles(16, 16, 4, 1), Tiles(16, 16, 8, 1)),
}
