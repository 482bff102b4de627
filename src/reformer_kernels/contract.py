"""Definitions shared by the backends: interface version, limits, and constants of `hf_reformer.ops`."""

from typing import NamedTuple

import torch

CONTRACT = 10  # version of the interface used by hf_reformer.ops.dispatch; changes whenever it does
MAX_POSITIONS = 2**29  # sorted positions per head; positions that wrap around still fit in int32

# The constants of hf_reformer.ops.reference and .prng; a test compares them.
SELF_SCORE, MASKED_SCORE = -1e5, -1e9
GOLDEN, MIX_1, MIX_2 = -1640531527, -2048144789, -1028477387


class CacheTensors(NamedTuple):
    """The cache of a layer. Kernels write new tokens to its tensors.

    Attributes:
        keys, values: (B, H, capacity, D), contiguous, indexed by token modulo the capacity.
        buckets: (B, H, R, capacity) int32; this and the following are only used by LSH layers.
        newest, previous: those of `bucket_tables.BucketChains`.
        rotations: (H, D, R, sum(factors) / 2) float32.
        factors: bucket factors.
        window: number of newest members of every bucket that a token attends to.
        sums: (B, H, D) float64, sum of all unit vectors so far; None: vectors are hashed without centering.
        share: of their mean that is subtracted before hashing.
    """

    keys: torch.Tensor
    values: torch.Tensor
    buckets: torch.Tensor | None = None
    newest: torch.Tensor | None = None
    previous: torch.Tensor | None = None
    rotations: torch.Tensor | None = None
    factors: tuple[int, ...] = ()
    window: int = 0
    sums: torch.Tensor | None = None
    share: float = 1.0


def check_positions(perm: torch.Tensor) -> None:
    """Raise ValueError for permutations, (B, H, R, T), with more than MAX_POSITIONS sorted positions."""
    positions = perm.shape[2] * perm.shape[3]
    if positions > MAX_POSITIONS:
        raise ValueError(
            f"{positions} sorted positions (rounds x tokens) are more than {MAX_POSITIONS}. Split the sequence."
        )


def keep_threshold(dropout: float) -> int:
    """Return the smallest random int32 for which a pair is kept (`hf_reformer.ops.prng.keep_threshold`)."""
    return min(round(dropout * 2**32), 2**32 - 1) - 2**31


def check_fits(cache: CacheTensors, query: torch.Tensor, indices: torch.Tensor) -> None:
    """Raise ValueError unless new queries, (B, H, T, D), and indices, (B, T), fit the shape of the cache."""
    batch, heads, length, size = query.shape
    if cache.keys.shape[:2] != (batch, heads) or cache.keys.shape[3] != size or indices.shape != (batch, length):
        raise ValueError(f"A cache of {tuple(cache.keys.shape)} cannot take tokens of {tuple(query.shape)}.")
